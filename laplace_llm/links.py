"""Links: from Gaussian logits to class probabilities, without random numbers.

A mean of -inf stands for a choice that its row does not have: its probability is zero, and the
row's others are what they would be without it (`over_present`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor

from laplace_llm.eigen import cholesky, eigh


def over_present(link: Callable[..., Tensor], absent: float = 0.0) -> Callable[..., Tensor]:
    """Give a link the choices that each row has, and them alone.

    Parameters
    ----------
    link : Callable
        Maps means (n, c) and covariances (n, c, c), or (n, c), to values (..., n, c).
    absent : float, default=0.0
        The value of choices whose mean is -inf.

    Returns
    -------
    link : Callable
        Maps means (..., C) and covariances (..., C, C), or (..., C). Rows with the same choices
        stay together.
    """

    @wraps(link)
    def linked(mean: Tensor, covariance: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        present = mean > -torch.inf
        if bool(present.all()):
            return link(mean, covariance, *args, **kwargs)
        shape, full = mean.shape, covariance.ndim > mean.ndim
        mean, present = mean.reshape(-1, shape[-1]), present.reshape(-1, shape[-1])
        covariance = covariance.reshape(len(mean), *covariance.shape[len(shape) - 1 :])
        result: Tensor | None = None
        for pattern in present.unique(dim=0):
            rows, chosen = (present == pattern).all(1).nonzero(), pattern.nonzero()[:, 0]
            block = (rows[..., None], chosen[:, None], chosen) if full else (rows, chosen)
            values = link(mean[rows, chosen], covariance[block], *args, **kwargs)
            if result is None:
                result = values.new_full((*values.shape[:-2], *mean.shape), absent)
            result[..., rows, chosen] = values
        assert result is not None
        return result.reshape(*result.shape[:-2], *shape)

    return linked


@over_present
def probit(mean: Tensor, covariance: Tensor) -> Tensor:
    """Return the parent's multi-class probit: each logit scaled by its own variance.

    Parameters
    ----------
    mean : Tensor
        (..., C).
    covariance : Tensor
        (..., C, C), or (..., C) for independent logits.

    Returns
    -------
    probabilities : Tensor
        (..., C), summing to one.
    """
    own = covariance
    if covariance.ndim > mean.ndim:
        own = covariance.diagonal(dim1=-2, dim2=-1)
    return torch.softmax(mean / (1 + math.pi / 8 * own).sqrt(), -1)


@over_present
def mean_field(mean: Tensor, covariance: Tensor) -> Tensor:
    """Return the mean-field approximation of ``E[softmax(f)]`` for ``f ~ N(mean, covariance)``.

    ``p_k = 1 / sum_j exp(-(m_k - m_j) / sqrt(1 + pi / 8 Var[f_k - f_j]))``, normalised: each pair
    of classes is compared by the variance of its *difference*, so what all logits share has no
    effect. For two classes this is the probit approximation of a sigmoid. The parent's ``probit``
    scales each logit by its own variance instead.

    Source: Lu, Ie and Sha, *Mean-Field Approximation to Gaussian-Softmax Integral with Application
    to Uncertainty Estimation*, 2020 (arXiv 2006.07584), equation 9.

    Parameters
    ----------
    mean : Tensor
        (..., C).
    covariance : Tensor
        (..., C, C), or (..., C) for independent logits.

    Returns
    -------
    probabilities : Tensor
        (..., C), summing to one.
    """
    if covariance.ndim == mean.ndim:
        covariance = torch.diag_embed(covariance)
    own = covariance.diagonal(dim1=-2, dim2=-1)
    # Rounding may leave the variance of a difference a little below zero.
    variance = (own[..., :, None] + own[..., None, :] - 2 * covariance).clamp_min(0)
    difference = mean[..., :, None] - mean[..., None, :]
    scaled = difference / (1 + math.pi / 8 * variance).sqrt()  # (..., C, C)
    return torch.softmax(-torch.logsumexp(-scaled, -1), -1)


@over_present
def quasi_monte_carlo(mean: Tensor, covariance: Tensor, points: int = 1024) -> Tensor:
    """Return ``E[softmax(f)]`` for ``f ~ N(mean, covariance)`` by quasi-Monte Carlo integration.

    The same scrambled Sobol points serve every row and every call, so the result is deterministic,
    does not depend on the batch, and is smooth in the covariance. What is integrated are the
    differences to the likeliest class, from the second likeliest to the unlikeliest, so that
    neither what all logits share nor the order of the classes has an effect. Where classes tie for
    a place, their order decides, by no more than the integration's error.

    Parameters
    ----------
    mean : Tensor
        (B, C).
    covariance : Tensor
        (B, C, C), or (B, C) for independent logits.
    points : int, default=1024
        Number of points; rounded up to a power of two.

    Returns
    -------
    probabilities : Tensor
        (B, C), summing to one.
    """
    if covariance.ndim == mean.ndim:
        covariance = torch.diag_embed(covariance)
    if mean.shape[1] == 1:
        return torch.ones_like(mean)
    order = mean.detach().argsort(dim=-1, descending=True, stable=True)
    rows = order[:, :, None].expand_as(covariance)
    mean = mean.gather(-1, order)
    covariance = covariance.gather(-2, rows).gather(-1, rows.mT)
    mean, covariance = mean[:, 1:] - mean[:, :1], _differences(covariance)
    noise = _normal_points(mean.shape[1], points).to(mean)  # (S, C - 1)
    logits = mean[:, :, None] + _root(covariance) @ noise.T  # (B, C - 1, S)
    # With the points last, a softmax over a few classes is vectorised.
    likeliest = logits.new_zeros(len(logits), 1, logits.shape[2])
    probabilities = torch.softmax(torch.cat([likeliest, logits], 1), 1).mean(-1)
    return torch.zeros_like(probabilities).scatter(-1, order, probabilities)


def _differences(covariance: Tensor) -> Tensor:
    """Return the covariance (..., C - 1, C - 1) of the differences to the first logit."""
    rows = covariance[..., 1:, :] - covariance[..., :1, :]
    return rows[..., 1:] - rows[..., :1]


def _root(covariance: Tensor) -> Tensor:
    """Return L with ``L L^T`` the covariance, also where it is singular up to rounding."""
    scale = covariance.detach().diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(1e-20)
    jitter = 10 * covariance.shape[-1] * torch.finfo(covariance.dtype).eps * scale
    identity = torch.eye(covariance.shape[-1]).to(covariance)
    root, failed = torch.linalg.cholesky_ex(covariance + jitter[:, None, None] * identity)
    if bool(failed.any()):  # lift the lowest eigenvalue, of these rows alone
        lowest = eigh(covariance.detach(), "the covariance of outputs")[0][:, 0]
        jitter = torch.where(failed > 0, 2 * (jitter - lowest), jitter)
        root = cholesky(covariance + jitter[:, None, None] * identity, "the outputs' covariance")
    return root


@lru_cache(maxsize=8)
def _normal_points(dim: int, points: int) -> Tensor:
    """Return the (S, dim) standard normal points: the same in every run and process."""
    with torch.inference_mode(False):  # kept for calls that need a gradient
        engine = torch.quasirandom.SobolEngine(dim, scramble=True, seed=0)
        uniform = engine.draw(2 ** math.ceil(math.log2(points)), dtype=torch.float64)
        return torch.special.ndtri(uniform.clamp(1e-12, 1 - 1e-12))


# The links that are differentiable functions of the moments alone.
CLOSED_FORMS = {"probit": probit, "mean_field": mean_field, "qmc": quasi_monte_carlo}
# Those of them that only look at differences between logits.
OF_DIFFERENCES = frozenset({"mean_field", "qmc"})
