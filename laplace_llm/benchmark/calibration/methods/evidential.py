"""An evidential last layer (Sensoy, Kaplan and Kandemir, NeurIPS 2018) on frozen features."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import Dirichlet, kl_divergence
from torch.nn import functional as F

from laplace_llm.benchmark.calibration.features import LastLayerMethod, labelled_features
from laplace_llm.benchmark.calibration.linear import Standardize, train_layer
from laplace_llm.benchmark.calibration.method import register

if TYPE_CHECKING:
    from laplace_llm.benchmark.calibration.problem import Problem


@register
class Evidential(LastLayerMethod):
    """A linear layer whose softplus is evidence for each class; evidence + 1 is a Dirichlet.

    Trained anew: the head's logits mean something only up to a constant, evidence does not.
    Softplus for the paper's ReLU, whose gradient vanishes where no class has evidence.
    """

    name = "evidential head"
    epochs: ClassVar[int] = 100
    lr: ClassVar[float] = 1e-3
    annealing_epochs: ClassVar[int] = 10

    def fit_features(self, problem: Problem) -> None:
        """Train the layer."""
        features, labels = labelled_features(problem, "train")
        self._standardize = Standardize(features)
        self._layer = nn.Linear(features.shape[1], problem.n_classes, device="meta")
        self._layer = self._layer.to_empty(device=features.device).to(features.dtype)
        nn.init.zeros_(self._layer.weight)
        nn.init.zeros_(self._layer.bias)
        train_layer(
            self._layer,
            self._standardize(features),
            labels,
            lambda x, y, epoch: evidential_loss(
                self._alpha(x), y, min(1.0, epoch / self.annealing_epochs)
            ),
            epochs=self.epochs,
            seed=problem.seed,
            optimizer=torch.optim.AdamW(self._layer.parameters(), self.lr),
        )
        self.extra_parameters = sum(p.numel() for p in self._layer.parameters())

    def _alpha(self, standardized: Tensor) -> Tensor:
        return F.softplus(self._layer(standardized)) + 1

    def concentration(self, features: Tensor) -> Tensor:
        """Return the Dirichlet's concentration (B, C)."""
        return self._alpha(self._standardize(features))

    def predict_features(self, features: Tensor) -> Tensor:
        """Return the Dirichlet's mean (B, C)."""
        alpha = self.concentration(features)
        return alpha / alpha.sum(-1, keepdim=True)


def evidential_loss(alpha: Tensor, labels: Tensor, weight: float) -> Tensor:
    """Return the expected squared error under Dirichlets (B, C), and a penalty on wrong evidence.

    Equation (5) of the paper plus `weight` times the KL divergence from the uniform Dirichlet once
    the label's own evidence is taken out.
    """
    target = F.one_hot(labels, alpha.shape[1]).to(alpha)
    total = alpha.sum(-1, keepdim=True)
    mean = alpha / total
    error = (target - mean).square() + mean * (1 - mean) / (total + 1)
    wrong = target + (1 - target) * alpha
    uniform = Dirichlet(torch.ones_like(alpha))
    return (error.sum(-1) + weight * kl_divergence(Dirichlet(wrong), uniform)).mean()
