"""What is measured on: a model of a real shape, its adapter under a head, and batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from laplace_llm import MultipleChoiceHead
from laplace_llm.benchmark.models import load_model
from laplace_llm.benchmark.speed.four_bit import quantise

# What a batch is made of where it is run through the model and through a posterior.
Batch = dict[str, Tensor]


class Preset(NamedTuple):
    """A model's shape, where its adapter sits, and the batch to measure on.

    Without a ``model_type`` in `config` it is Llama's. `four_bit` says whether the base is in 4
    bits (`four_bit.quantise`) instead of in `dtype`.
    """

    config: dict[str, int | float | bool | str]
    dtype: torch.dtype
    targets: tuple[str, ...]
    rank: int
    batch: int
    tokens: int
    choices: int
    four_bit: bool = False


PRESETS = {
    "smollm2-135m": Preset(
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "rope_theta": 100000.0,
            "tie_word_embeddings": True,
        },
        torch.float32,
        ("q_proj", "v_proj"),
        rank=8,
        batch=8,
        tokens=66,
        choices=4,
    ),
    "llama2-7b": Preset(
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
        },
        torch.bfloat16,
        ("q_proj", "v_proj", "lm_head"),
        rank=8,
        batch=4,
        tokens=300,
        choices=4,
    ),
    # Qwen2.5-32B; tokens as for 7B, so that the two compare.
    "qwen2.5-32b": Preset(
        {
            "model_type": "qwen2",
            "vocab_size": 152064,
            "hidden_size": 5120,
            "intermediate_size": 27648,
            "num_hidden_layers": 64,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "max_window_layers": 64,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": False,
        },
        torch.bfloat16,
        ("q_proj", "v_proj", "lm_head"),
        rank=8,
        batch=4,
        tokens=300,
        choices=4,
        four_bit=True,
    ),
    # For the tests: everything in a second.
    "tiny": Preset(
        {
            "vocab_size": 64,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "tie_word_embeddings": True,
        },
        torch.float32,
        ("q_proj", "v_proj"),
        rank=3,
        batch=4,
        tokens=7,
        choices=3,
    ),
}


def config(preset: str) -> PretrainedConfig:
    """Return the shape of a preset's model."""
    return AutoConfig.for_model(**{"model_type": "llama", **PRESETS[preset].config})


@dataclass(frozen=True)
class Workload:
    """A model and a batch's shape, in plain values that another process can read.

    Attributes
    ----------
    preset : str
        Gives the precision (4 bits included) and, unless there is a `model`, the shape.
    model : str or None
        A model to load (`load_model`) instead of random weights.
    batch, tokens, choices : int
        B questions of T tokens and C choices.
    rank : int
        LoRA's r.
    targets : list[str]
        The layers it is on.
    device : str
        Where to put everything; 'meta' for the accounting.
    """

    preset: str
    model: str | None
    batch: int
    tokens: int
    choices: int
    rank: int
    targets: list[str]
    device: str

    @classmethod
    def of(cls, preset: str, device: str, model: str | None = None, **given: Any) -> Workload:
        """Take from the preset whatever is not given."""
        values: dict[str, Any] = {
            key: given.get(key) or getattr(PRESETS[preset], key)
            for key in ("batch", "tokens", "choices", "rank", "targets")
        }
        values["targets"] = list(values["targets"])
        return cls(preset=preset, model=model, device=device, **values)


class Problem:
    """The head, and as many batches of random tokens as are asked for.

    Parameters
    ----------
    workload : Workload
        What to build.
    """

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.device = torch.device(workload.device)
        torch.manual_seed(0)
        self.head = _head(workload, self.device)
        self.parameters = [p for p in self.head.parameters() if p.requires_grad]
        self.longest = max(max(p.shape) for p in self.parameters)

    @cached_property
    def batch(self) -> Batch:
        """The batch that operations are timed on; every token is real."""
        return next(iter(self.loader(1)))

    def loader(self, batches: int) -> DataLoader[Batch]:
        """Return a loader of so many batches, the first of them always `batch`."""
        work, vocabulary = self.workload, _vocabulary(self.head.model)
        generator = torch.Generator().manual_seed(0)
        rows: Sequence[Any] = [
            {
                "input_ids": torch.randint(0, vocabulary, (work.tokens,), generator=generator),
                "attention_mask": torch.ones(work.tokens, dtype=torch.long),
                "labels": torch.randint(0, work.choices, (), generator=generator),
            }
            for _ in range(batches * work.batch)
        ]
        rows = [{key: value.to(self.device) for key, value in row.items()} for row in rows]
        return DataLoader(rows, work.batch)  # type: ignore[arg-type]


def _head(workload: Workload, device: torch.device) -> MultipleChoiceHead:
    preset = PRESETS[workload.preset]
    if workload.model is None:
        # On the device from the start: 7B parameters need not fit into the machine's memory.
        with device:
            model: nn.Module = AutoModelForCausalLM.from_config(
                config(workload.preset), dtype=preset.dtype
            )
    else:
        model = load_model(workload.model, preset.dtype)[0].to(device)
    if preset.four_bit:
        quantise(model)
    lora = LoraConfig(
        r=workload.rank,
        lora_alpha=2 * workload.rank,
        lora_dropout=0.0,
        target_modules=workload.targets,
    )
    with device:
        model = get_peft_model(model, lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # PEFT starts at zero, where half of the curvature vanishes
            nn.init.normal_(parameter.data, std=0.02)
    vocabulary = _vocabulary(model)
    if workload.choices > vocabulary:
        raise ValueError(
            f"Expected --choices of at most {vocabulary}, the size of the vocabulary, but got "
            f"{workload.choices}."
        )
    step = max(vocabulary // workload.choices, 1)
    return MultipleChoiceHead(model, [step * c for c in range(workload.choices)]).eval()


def _vocabulary(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])
