"""Factors of the loss's Hessian in logit space: seeds S with ``S S^T = H``, one column a backward.

For softmax with probabilities p the Hessian ``diag(p) - p p^T`` has rank C - 1, so C - 1
backward passes give the exact type-2 GGN; one sampled column gives an unbiased Fisher.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def softmax_seeds(logits: Tensor) -> Tensor:
    """Return S of shape (B, C, C - 1) with ``S S^T = diag(p) - p p^T``, exactly.

    With q = sqrt(p), a unit vector, ``diag(p) - p p^T = diag(q) (I - q q^T) diag(q)``. The
    Householder reflection that sends e_m to -q has q's complement in its other C - 1 columns;
    m is the likeliest class, so that nothing cancels however confident the model is.
    """
    q = torch.softmax(logits, -1).sqrt()
    m = q.argmax(-1, keepdim=True)  # (B, 1)
    u = q.scatter_add(-1, m, torch.ones_like(q[:, :1]))
    reflection = torch.eye(q.shape[1]).to(q) - u[:, :, None] * (u / (1 + q.gather(-1, m)))[:, None]
    others = torch.arange(q.shape[1] - 1, device=q.device)
    others = others + (others >= m)  # (B, C - 1), all classes but m
    basis = reflection.gather(-1, others[:, None].expand(-1, q.shape[1], -1))
    return q[:, :, None] * basis


def sampled_softmax_seeds(logits: Tensor, samples: int) -> Tensor:
    """Return S (B, C, K) with ``E[S S^T] = diag(p) - p p^T``, from K labels drawn from the model.

    Labels are drawn from torch's global random state.
    """
    p = torch.softmax(logits, -1)
    labels = torch.multinomial(p, samples, replacement=True)  # (B, K)
    return (p[:, :, None] - F.one_hot(labels, p.shape[1]).to(p).mT) / samples**0.5


def regression_seeds(outputs: Tensor) -> Tensor:
    """Return the identity (B, C, C): the Hessian of ``||y - f||^2 / 2``."""
    b, c = outputs.shape
    return torch.eye(c).to(outputs).expand(b, c, c)


def sampled_regression_seeds(outputs: Tensor, samples: int) -> Tensor:
    """Return S (B, C, K) with ``E[S S^T] = I``, from K targets drawn around the outputs."""
    return torch.randn(*outputs.shape, samples).to(outputs) / samples**0.5


def empirical_seeds(logits: Tensor, labels: Tensor, regression: bool) -> Tensor:
    """Return the loss's own gradient as one seed, (B, C, 1).

    For regression this is ``sqrt(2) (f - y)``: laplace-torch's empirical Fisher is half the outer
    product of the gradients of the *unhalved* squared error, so twice that of the likelihood.
    """
    if regression:
        return 2**0.5 * (logits - labels)[:, :, None]
    return (torch.softmax(logits, -1) - F.one_hot(labels, logits.shape[1]))[:, :, None]


def default_generator(device: torch.device) -> torch.Generator:
    """Return what torch draws from on a device where it is given no generator."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return torch.default_generator
