"""Heads: from a Hugging Face classifier to (B, C) logits, called with one mapping."""

from __future__ import annotations

import inspect
from collections.abc import MutableMapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from laplace_llm.errors import OutputError


class SequenceClassificationHead(nn.Module):
    """The ``.logits`` of a Hugging Face sequence classifier or multiple-choice model.

    Parameters
    ----------
    model : torch.nn.Module
        An AutoModelForSequenceClassification or AutoModelForMultipleChoice, with or without PEFT
        around it. Logits come out as (B, C) in float32 or better.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        accepted = inspect.signature(unwrap(model).forward).parameters
        self._accepted = set(accepted) - {"labels", "return_dict", "kwargs"}

    def forward(self, batch: MutableMapping[str, Any]) -> Tensor:
        """Return logits (B, C).

        Parameters
        ----------
        batch : MutableMapping
            The model's inputs, on any device; labels and unknown entries are ignored.

        Raises
        ------
        OutputError
            If the model's output has no logits.
        """
        device = next(self.model.parameters()).device
        inputs = {
            key: value.to(device)
            for key, value in batch.items()
            if key in self._accepted and isinstance(value, Tensor)
        }
        output = self.model(**inputs, return_dict=True)
        if getattr(output, "logits", None) is None:
            raise OutputError(
                f"Expected a model with a classification head, but "
                f"{type(unwrap(self.model)).__name__} returned no logits."
            )
        return at_least_float32(output.logits)


def as_classifier(model: nn.Module) -> nn.Module:
    """Wrap a bare Hugging Face model, which returns a ModelOutput, into its head."""
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    if isinstance(unwrap(model), PreTrainedModel):
        return SequenceClassificationHead(model)
    return model


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside a PeftModel (compiled or not), or the model itself."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if isinstance(model, PeftModel) else model


def at_least_float32(values: Tensor) -> Tensor:
    """Return the values in float32, or their own precision where that is better."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
