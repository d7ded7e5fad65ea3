"""Links: from Gaussian logits to class probabilities, in closed form."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
