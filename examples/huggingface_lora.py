"""laplace-torch's own Hugging Face example, with ``subset_of_weights="lora"``.

PEFT around a custom module whose forward takes the batch as a mapping. In the parent's
``examples/huggingface_example.py`` the line ``lora_la.fit(dataloader)`` is commented out; here it
runs. ``--random`` uses a small GPT-2 with random weights, so that nothing is downloaded.
"""

from __future__ import annotations

import argparse
from collections.abc import MutableMapping

import torch
import torch.utils.data as data_utils
from datasets import Dataset
from laplace import Laplace
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    DataCollatorWithPadding,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2Tokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

import laplace_llm  # noqa: F401  # registers subset_of_weights="lora"

DATA = [
    {"text": "Today is hot, but I will manage!!!!", "label": 1},
    {"text": "Tomorrow is cold", "label": 0},
    {"text": "Carpe diem", "label": 1},
    {"text": "Tempus fugit", "label": 1},
]


class MyGPT2(nn.Module):
    """Hugging Face LLM wrapper.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        Needed since the model needs to know the padding token id.
    random : bool
        Whether to use a small model with random weights.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, random: bool) -> None:
        super().__init__()
        if random:
            config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2)
        else:
            config = GPT2Config.from_pretrained("gpt2")
        config.pad_token_id = tokenizer.pad_token_id
        config.num_labels = 2
        self.hf_model = (
            GPT2ForSequenceClassification(config)
            if random
            else GPT2ForSequenceClassification.from_pretrained("gpt2", config=config)
        )

    def forward(self, data: MutableMapping) -> torch.Tensor:
        """Return logits (B, 2) of a batch with `input_ids` and `attention_mask`."""
        device = next(self.parameters()).device
        input_ids = data["input_ids"].to(device)
        attn_mask = data["attention_mask"].to(device)
        output_dict = self.hf_model(input_ids=input_ids, attention_mask=attn_mask)
        return output_dict.logits


def get_tokenizer(random: bool) -> PreTrainedTokenizerBase:
    """Return GPT-2's tokenizer, or one of the data's own words."""
    if random:
        words = {word for row in DATA for word in row["text"].split()}
        vocabulary = {word: i for i, word in enumerate(["<|endoftext|>", *sorted(words)])}
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    else:
        tokenizer = GPT2Tokenizer.from_pretrained("gpt2")
    tokenizer.pad_token_id = tokenizer.eos_token_id
    return tokenizer


def main() -> None:
    """Fit, tune and predict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--random", action="store_true", help="a small model, no download")
    random = parser.parse_args().random
    torch.manual_seed(0)

    tokenizer = get_tokenizer(random)
    dataset = Dataset.from_list(DATA)
    dataset = dataset.map(lambda row: tokenizer(row["text"]), remove_columns=["text"])
    dataset.set_format(type="torch", columns=["input_ids", "attention_mask", "label"])
    dataloader = data_utils.DataLoader(
        dataset, batch_size=100, collate_fn=DataCollatorWithPadding(tokenizer)
    )

    config = LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules=["c_attn"],  # LoRA on the attention weights
        lora_dropout=0.1,
        bias="none",
        fan_in_fan_out=True,  # c_attn is a Conv1D
    )
    lora_model = get_peft_model(MyGPT2(tokenizer, random), config)
    # Train it as usual

    lora_model.eval()

    lora_la = Laplace(
        lora_model,
        likelihood="classification",
        subset_of_weights="lora",
        hessian_structure="kron",
    )
    lora_la.fit(dataloader)
    lora_la.optimize_prior_precision()

    X_test = next(iter(dataloader))
    print(f"[LoRA-LLM] The predictive tensor is of shape: {lora_la(X_test).shape}.")


if __name__ == "__main__":
    main()
