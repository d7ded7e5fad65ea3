"""The head's last linear layer on its own, and methods that need no more than that."""

from __future__ import annotations

from abc import abstractmethod
from copy import deepcopy
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from laplace_llm.benchmark.calibration.method import Method, NotApplicable
from laplace_llm.causal_heads import CausalHead
from laplace_llm.heads import at_least_float32

if TYPE_CHECKING:
    from laplace_llm.benchmark.calibration.problem import Problem


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
        # What some architectures do to logits. A function, so that copies of this module (which
        # laplace-torch makes) do not copy the language model.
        self._finish = lambda logits: (
            head._finish(logits) if isinstance(head, CausalHead) else logits
        )

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (B, C)."""
        return self._finish(at_least_float32(self.layer(features)))


class LastLayerMethod(Method):
    """A method that sees nothing of the model but its last layer and that layer's inputs.

    Subclasses say what to do with features, which the problem makes once for all such methods.
    """

    group: ClassVar[str] = "last layer"

    def fit(self, problem: Problem) -> None:
        """Fit on the cached features.

        Raises
        ------
        NotApplicable
            If the head does not end in a linear layer.
        """
        last_layer(problem.head)
        self._problem = problem
        self.fit_features(problem)

    @torch.no_grad()
    def predict(self, batch: Any) -> Tensor:
        """Return probabilities (B, C), or (S, B, C) of S samples."""
        return self.predict_features(self._problem.batch_features(batch))

    @abstractmethod
    def fit_features(self, problem: Problem) -> None:
        """Do all that comes before the first prediction."""

    @abstractmethod
    def predict_features(self, features: Tensor) -> Tensor:
        """Return probabilities (B, C), or (S, B, C) of S samples, given features (B, d)."""


def labelled_features(problem: Problem, split: str) -> tuple[Tensor, Tensor]:
    """Return the features (N, d) and labels (N,) of 'train' or 'val', on the same device."""
    features, labels = problem.features(split)
    return features, labels.to(features.device)
