"""Several last layers instead of one: SWAG, dropout and an ensemble of them, on frozen features."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector

from laplace_llm.benchmark.calibration.features import (
    LastLayerMethod,
    LinearHead,
    labelled_features,
)
from laplace_llm.benchmark.calibration.linear import Standardize, seeded, train_layer
from laplace_llm.benchmark.calibration.method import register
from laplace_llm.benchmark.calibration.swag import SwagMoments

if TYPE_CHECKING:
    from laplace_llm.benchmark.calibration.problem import Problem


@register
class LastLayerSWAG(LastLayerMethod):
    """SWAG (Maddox et al., NeurIPS 2019): SGD from the head's layer, an iterate an epoch.

    The learning rate is one over the mean squared norm of the features: within what keeps SGD
    stable on a softmax (its Hessian is at most half that norm), and large enough to move.
    """

    name = "last-layer SWAG"
    n_samples: ClassVar[int] = 30
    epochs: ClassVar[int] = 40

    def fit_features(self, problem: Problem) -> None:
        """Collect the moments of the iterates, and draw layers from their Gaussian."""
        features, labels = labelled_features(problem, "train")
        self._model = LinearHead(problem.head)
        lr = 1 / float(features.square().sum(1).mean())
        moments = SwagMoments()
        train_layer(
            self._model,
            features,
            labels,
            lambda x, y, _: F.cross_entropy(self._model(x), y),
            epochs=self.epochs,
            seed=problem.seed,
            optimizer=torch.optim.SGD(
                self._model.parameters(), lr, momentum=0.9, weight_decay=3e-4
            ),
            on_epoch=lambda _: moments.collect(parameters_to_vector(self._model.parameters())),
        )
        self._weights = moments.sample(self.n_samples, problem.seed)
        self.moments = moments
        self.extra_parameters = self._weights.numel()

    def predict_features(self, features: Tensor) -> Tensor:
        """Return the sampled layers' probabilities (S, B, C)."""
        samples = []
        for vector in self._weights:
            weights, start = {}, 0
            for name, parameter in self._model.named_parameters():
                stop = start + parameter.numel()
                weights[name] = vector[start:stop].view_as(parameter)
                start = stop
            samples.append(functional_call(self._model, weights, (features,)).softmax(-1))
        return torch.stack(samples)


@register
class LastLayerDropout(LastLayerMethod):
    """MC dropout (Gal and Ghahramani, ICML 2016) on the features alone.

    The head's layer is trained on with dropout before its dropout masks are sampled.
    """

    name = "last-layer MC dropout"
    rate: ClassVar[float] = 0.1
    n_samples: ClassVar[int] = 30
    epochs: ClassVar[int] = 50
    lr: ClassVar[float] = 1e-4

    def fit_features(self, problem: Problem) -> None:
        """Train the layer on with dropout."""
        features, labels = labelled_features(problem, "train")
        self._seed = problem.seed
        self._model = LinearHead(problem.head)
        train_layer(
            self._model,
            features,
            labels,
            lambda x, y, _: F.cross_entropy(self._model(F.dropout(x, self.rate)), y),
            epochs=self.epochs,
            seed=problem.seed,
            optimizer=torch.optim.AdamW(self._model.parameters(), self.lr),
        )
        self.extra_parameters = sum(p.numel() for p in self._model.parameters())

    def predict_features(self, features: Tensor) -> Tensor:
        """Return probabilities under sampled masks (S, B, C); one mask of a sample for all rows.

        A mask stands for one set of weights, so that rows of a sample share it.
        """
        with seeded(self._seed, torch.device("cpu")):
            masks = F.dropout(torch.ones(self.n_samples, 1, features.shape[1]), self.rate)
        return self._model(features * masks.to(features)).softmax(-1)


@register
class LastLayerEnsemble(LastLayerMethod):
    """Layers trained anew on bootstrap samples, each from its own random start."""

    name = "last-layer ensemble"
    n_members: ClassVar[int] = 10
    epochs: ClassVar[int] = 50
    lr: ClassVar[float] = 1e-3

    def fit_features(self, problem: Problem) -> None:
        """Train the members."""
        features, labels = labelled_features(problem, "train")
        self._standardize = Standardize(features)
        x = self._standardize(features)
        self._members = [
            self._train(x, labels, problem.n_classes, 1000 * problem.seed + member)
            for member in range(self.n_members)
        ]
        self.extra_parameters = sum(p.numel() for m in self._members for p in m.parameters())

    def _train(self, x: Tensor, labels: Tensor, n_classes: int, seed: int) -> nn.Linear:
        with seeded(seed, torch.device("cpu")):
            layer = nn.Linear(x.shape[1], n_classes).to(x)
            rows = torch.randint(len(x), (len(x),)).to(x.device)
        train_layer(
            layer,
            x[rows],
            labels[rows],
            lambda x, y, _: F.cross_entropy(layer(x), y),
            epochs=self.epochs,
            seed=seed,
            optimizer=torch.optim.AdamW(layer.parameters(), self.lr),
        )
        return layer

    def predict_features(self, features: Tensor) -> Tensor:
        """Return the members' probabilities (S, B, C)."""
        x = self._standardize(features)
        return torch.stack([member(x).softmax(-1) for member in self._members])
