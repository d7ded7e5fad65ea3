"""The examples: laplace-torch's own with the subset of weights changed, and the Trainer's."""

import re
import sys
from collections.abc import MutableMapping

import pytest
import torch
import trainer
from laplace import Laplace
from models import VOCABULARY, frozen, snapshot, tiny_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, GPT2Config, GPT2ForSequenceClassification

import laplace_llm  # noqa: F401  # registers subset_of_weights="lora"

TEXTS = ["the sky is blue and the sea", "red grass", "snow", "what is the colour ?"]
LABELS = [1, 0, 1, 1]


class MyGPT2(nn.Module):
    """The example's wrapper, around a small random model."""

    def __init__(self, pad_token_id: int) -> None:
        super().__init__()
        config = GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=32,
            pad_token_id=pad_token_id,
            num_labels=2,
            bos_token_id=0,
            eos_token_id=0,
        )
        self.hf_model = GPT2ForSequenceClassification(config)

    def forward(self, data: MutableMapping) -> Tensor:
        device = next(self.parameters()).device
        input_ids = data["input_ids"].to(device)
        attn_mask = data["attention_mask"].to(device)
        output_dict = self.hf_model(input_ids=input_ids, attention_mask=attn_mask)
        return output_dict.logits


def get_dataloader() -> DataLoader:
    tokenizer = tiny_tokenizer()
    rows = [
        {key: tokenizer(text)[key] for key in ("input_ids", "attention_mask")} | {"label": label}
        for text, label in zip(TEXTS, LABELS, strict=True)
    ]
    # Renames "label" to "labels" and returns a UserDict.
    return DataLoader(rows, batch_size=100, collate_fn=DataCollatorWithPadding(tokenizer))


def get_lora_model() -> PeftModel:
    config = LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules=["c_attn"],  # LoRA on the attention weights
        lora_dropout=0.1,
        bias="none",
        fan_in_fan_out=True,
    )
    model = get_peft_model(MyGPT2(tiny_tokenizer().pad_token_id), config)
    for name, parameter in model.named_parameters():  # in place of training
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    model.eval()
    return model


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_huggingface_example(structure):
    dataloader, lora_model = get_dataloader(), get_lora_model()
    before = snapshot(lora_model)
    lora_la = Laplace(
        lora_model,
        likelihood="classification",
        subset_of_weights="lora",
        hessian_structure=structure,
    )
    lora_la.fit(dataloader)
    prior = frozen(lora_la.prior_precision)
    lora_la.optimize_prior_precision()
    assert frozen(lora_la.prior_precision) != prior

    X_test = next(iter(dataloader))
    lora_la.prior_precision = 1.0  # whatever was chosen for a model at random
    probabilities = lora_la(X_test)
    assert probabilities.shape == (4, 2)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(4))
    map_probabilities = lora_model(X_test).softmax(1).detach()
    assert (probabilities - map_probabilities).abs().max() > 1e-4
    lora_la.prior_precision = 1e8
    torch.testing.assert_close(lora_la(X_test), map_probabilities)
    assert lora_la.n_data == 4
    assert len(lora_la.tensors) == 4
    assert snapshot(lora_model) == before


def test_the_trainers_adapter_and_posterior_answer_the_same_once_loaded(
    tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    arguments = ["--random", "--train", "12", "--epochs", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["trainer.py", *arguments])
    trainer.main()
    names = {path.name for path in out.iterdir()}
    assert names >= {"adapter_model.safetensors", "laplace_model.safetensors"}
    printed = capsys.readouterr().out
    answers = re.findall(r" ((?:[01]\.\d+ ?){4}), loaded ((?:[01]\.\d+ ?){4})", printed)
    assert len(answers) == 8
    assert all(before == after for before, after in answers)
    assert printed.count("laplace_log_marginal_likelihood") == 2
