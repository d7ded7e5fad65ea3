"""Inputs of the head's last linear layer, and that layer on its own."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from laplace_llm.benchmark.calibration.method import NotApplicable
from laplace_llm.causal_heads import MultipleChoiceHead
from laplace_llm.heads import at_least_float32


def last_layer(head: nn.Module) -> nn.Linear:
    """Return the head's last linear layer.

    Raises
    ------
    NotApplicable
        If the head does not end in one: scored choices, or a vocabulary matrix with an adapter.
    """
    layer = getattr(head, "choice_layer", None)
    if not isinstance(layer, nn.Linear):
        raise NotApplicable(
            f"{type(head).__name__} does not end in a linear layer from features to classes"
        )
    return layer


@torch.no_grad()
def features_of(head: nn.Module, batch: Any) -> Tensor:
    """Return the inputs (B, d) of the head's last linear layer, in its precision.

    Raises
    ------
    NotApplicable
        See `last_layer`.
    """
    seen: list[Tensor] = []
    hook = last_layer(head).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        head(batch)
    finally:
        hook.remove()
    return seen[-1]


class LinearHead(nn.Module):
    """A trainable copy of the head's last layer: features (B, d) in, the head's logits (B, C) out.

    Parameters
    ----------
    head : torch.nn.Module
        The head, which stays as it is.
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.layer = deepcopy(last_layer(head)).requires_grad_(True)
        self._finish: Callable[[Tensor], Tensor] = lambda logits: logits
        if isinstance(head, MultipleChoiceHead):
            # What some architectures do to logits; a list hides the model from nn.Module.
            self._head = [head]
            self._finish = self._finish_as_head

    def _finish_as_head(self, logits: Tensor) -> Tensor:
        return self._head[0]._finish(logits)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (B, C)."""
        return self._finish(at_least_float32(self.layer(features)))
