"""A Gaussian-process head of random Fourier features, with Laplace covariance.

The head of SNGP (Liu et al., NeurIPS 2020) on frozen features: without spectral normalisation of
the backbone, which a fine-tuned language model does not have.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from laplace_llm.benchmark.calibration.features import LastLayerMethod, labelled_features
from laplace_llm.benchmark.calibration.linear import Standardize
from laplace_llm.benchmark.calibration.method import register

if TYPE_CHECKING:
    from laplace_llm.benchmark.calibration.problem import Problem


@register
class RandomFeatureGP(LastLayerMethod):
    """RBF kernel on standardised features, its length scale the median distance between them.

    The weights' MAP is a convex problem and solved as one; the prior precision (the inverse of the
    kernel's amplitude) is the one of the grid with the lowest NLL on the validation split.
    """

    name = "random-feature GP (SNGP head)"
    tuned: ClassVar[bool] = True
    n_features: ClassVar[int] = 1024
    grid: ClassVar[tuple[float, ...]] = tuple(10 ** (k / 2) for k in range(-6, 4))

    def fit_features(self, problem: Problem) -> None:
        """Draw the features, and fit one posterior for each prior precision."""
        features, labels = labelled_features(problem, "train")
        self.draw(features, problem.seed)
        phi = self.random_features(features)
        val_features, val_labels = labelled_features(problem, "val")
        best = math.inf
        start = torch.zeros(self.n_features, problem.n_classes, dtype=phi.dtype, device=phi.device)
        # From strong to weak, each from the last one's solution.
        for precision in sorted(self.grid, reverse=True):
            start = map_weights(phi, labels, precision, start)
            factors = covariance_factors(phi, torch.softmax(phi @ start, -1), precision)
            probs = self._probs(val_features, start, factors)
            nll = float(F.nll_loss(probs.log(), val_labels))
            if nll < best:
                best, self.precision = nll, precision
                self._weights, self._factors = start, factors
        self.note = f"prior precision {self.precision:.3g}"
        self.extra_parameters = (
            self._frequencies.numel()
            + self._phases.numel()
            + self._weights.numel()
            + self._factors.numel()
        )

    def predict_features(self, features: Tensor) -> Tensor:
        """Return softmax of the mean-field logits (B, C)."""
        return self._probs(features, self._weights, self._factors).to(features.dtype)

    def draw(self, features: Tensor, seed: int) -> None:
        """Draw the random features for a training split (N, d)."""
        self._standardize = Standardize(features.double())
        x = self._standardize(features.double())
        generator = torch.Generator().manual_seed(seed)
        size = (x.shape[1], self.n_features)
        frequencies = torch.randn(size, generator=generator, dtype=torch.float64)
        phases = 2 * math.pi * torch.rand(size[1], generator=generator, dtype=torch.float64)
        some = x[torch.randperm(len(x), generator=generator)[:1000].to(x.device)]
        self._frequencies = frequencies.to(x.device) / torch.pdist(some).median().clamp_min(1e-6)
        self._phases = phases.to(x.device)

    def random_features(self, features: Tensor) -> Tensor:
        """Return (B, D), whose inner products approximate the kernel."""
        angles = self._standardize(features.double()) @ self._frequencies + self._phases
        return (2 / self.n_features) ** 0.5 * torch.cos(angles)

    def _probs(self, features: Tensor, weights: Tensor, factors: Tensor) -> Tensor:
        phi = self.random_features(features)
        variances = torch.linalg.solve_triangular(factors, phi.mT, upper=False).square().sum(-2).mT
        return torch.softmax(phi @ weights / (1 + math.pi / 8 * variances).sqrt(), -1)


def map_weights(phi: Tensor, labels: Tensor, precision: float, start: Tensor) -> Tensor:
    """Return the weights (D, C) that minimise the cross-entropy plus the prior's penalty."""
    weights = start.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-6
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        fit = F.cross_entropy(phi @ weights, labels, reduction="sum")
        loss = (fit + precision / 2 * weights.square().sum()) / len(phi)
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weights.detach()


def covariance_factors(phi: Tensor, probs: Tensor, precision: float) -> Tensor:
    """Return Cholesky factors (C, D, D) of the classes' posterior precisions.

    ``precision I + sum_n p_nk (1 - p_nk) phi_n phi_n^T`` for class k; equation (9) of the paper.
    """
    scaled = (probs * (1 - probs)).sqrt().mT[:, :, None] * phi
    eye = torch.eye(phi.shape[1], dtype=phi.dtype, device=phi.device)
    return torch.linalg.cholesky(scaled.mT @ scaled + precision * eye)
