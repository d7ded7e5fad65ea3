"""Variational Bayesian last layers (Harrison, Willes and Snoek, ICLR 2024), by their package.

The discriminative classifier on frozen features. Its dense covariance has C d^2 numbers, too many
at a language model's width d, hence low rank or diagonal.
"""

from __future__ import annotations

import math
from copy import deepcopy
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from laplace_llm.benchmark.calibration.features import (
    LastLayerMethod,
    labelled_features,
    last_layer,
)
from laplace_llm.benchmark.calibration.linear import seeded, train_layer
from laplace_llm.benchmark.calibration.method import register
from laplace_llm.benchmark.calibration.metrics import question_nll

if TYPE_CHECKING:
    from laplace_llm.benchmark.calibration.problem import Problem


class VBLL(LastLayerMethod):
    """A Gaussian over the last layer's weights, trained on a bound of the marginal likelihood.

    The mean starts at the head's own layer, and the KL term is weighted by one over the number of
    training examples, as the authors do. On a few examples the bound drowns in that term after too
    many epochs, so that the epoch with the lowest NLL on the validation split is kept.
    """

    tuned: ClassVar[bool] = True
    requires: ClassVar[dict[str, str]] = {"vbll": "vbll>=0.4.9"}
    parameterization: ClassVar[str]
    epochs: ClassVar[int] = 100
    lr: ClassVar[float] = 1e-3
    n_samples: ClassVar[int] = 100

    def fit_features(self, problem: Problem) -> None:
        """Train the variational layer."""
        from vbll import DiscClassification

        features, labels = labelled_features(problem, "train")
        self._seed = problem.seed
        weight = last_layer(problem.head).weight.detach()
        # On the CPU: the package makes tensors there whatever the device of its inputs.
        features, labels = features.float().cpu(), labels.cpu()
        with seeded(problem.seed, features.device):
            layer: Any = DiscClassification(
                weight.shape[1],
                weight.shape[0],
                1 / len(features),
                parameterization=self.parameterization,
            )
        layer.W_mean.data.copy_(weight)
        self._layer = layer
        validation, answers = (part.cpu() for part in labelled_features(problem, "val"))
        best, kept = math.inf, deepcopy(layer.state_dict())

        @torch.no_grad()
        def keep_best(epoch: int) -> None:
            nonlocal best, kept
            nll = float(question_nll(self.predict_features(validation), answers).mean())
            if nll < best:
                best, kept = nll, deepcopy(layer.state_dict())
                self.note = f"epoch {epoch + 1} of {self.epochs}"

        train_layer(
            layer,
            features,
            labels,
            lambda x, y, _: layer(x).train_loss_fn(y),
            epochs=self.epochs,
            seed=problem.seed,
            optimizer=torch.optim.Adam((p for p in layer.parameters() if p.requires_grad), self.lr),
            on_epoch=keep_best,
        )
        layer.load_state_dict(kept)
        self.extra_parameters = sum(p.numel() for p in layer.parameters())

    def predict_features(self, features: Tensor) -> Tensor:
        """Return the package's predictive, a mean over samples of the logits (B, C).

        A mean, because the samples hold the model's noise, which is no doubt about weights.
        """
        x = features.float().cpu()
        with seeded(self._seed, x.device):
            samples = self._layer.logit_predictive(x).rsample(torch.Size([self.n_samples]))
        return F.softmax(samples, -1).mean(0).to(features.device)


@register
class LowRankVBLL(VBLL):
    """VBLL with a diagonal plus rank-3 covariance for each class (the package's default rank)."""

    name = "VBLL low-rank"
    parameterization = "lowrank"


@register
class DiagonalVBLL(VBLL):
    """VBLL with a diagonal covariance."""

    name = "VBLL diagonal"
    parameterization = "diagonal"
