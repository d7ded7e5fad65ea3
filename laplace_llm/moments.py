"""Moments of the linearised (GLM) predictive, without the (B, C, P) Jacobian of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from laplace_llm.contrasts import choice_contrasts
from laplace_llm.curvature import StreamingInterface
from laplace_llm.data import slices
from laplace_llm.taps import Batch

# What the Jacobians of one slice of a batch may take, as a part of the model's own size ...
JACOBIAN_SHARE = 0.2
# ... but at least so many bytes.
JACOBIAN_BYTES = 64 * 2**20


class Moments(NamedTuple):
    """Mean (B, C) and covariance (B, C, C) of the latent outputs.

    The mean is -inf for a choice that its row does not have.

    Over a grid of prior precisions, the covariance has shape (G, B, C, C), and the mean may have
    shape (G, B, C).
    """

    mean: Tensor
    covariance: Tensor

    def at(self, index: int) -> Moments:
        """Return the moments under one value of the grid."""
        mean = self.mean[index] if self.mean.ndim == self.covariance.ndim - 1 else self.mean
        return Moments(mean, self.covariance[index])

    def to(self, device: torch.device) -> Moments:
        """Return the moments on another device (the parent's `validate` moves its inputs)."""
        return Moments(self.mean.to(device), self.covariance.to(device))


def glm_moments(
    backend: StreamingInterface,
    batch: Batch,
    variance: Callable[[Sequence[Tensor]], Tensor],
    n_outputs: int,
    create_graph: bool = False,
    centred: bool = False,
) -> Moments:
    """Contract Jacobians with a posterior, tensor by tensor and slice by slice.

    Parameters
    ----------
    backend : StreamingInterface
        Computes the Jacobians: one forward and K backward passes a slice.
    batch : Tensor or MutableMapping
        Model inputs; every tensor has the batch as its first dimension.
    variance : Callable
        Maps one Jacobian a tensor, each (b, K, out * in), to covariances (..., b, K, K).
    n_outputs : int
        C, from which the size of a slice follows.
    create_graph : bool, default=False
        Whether the moments are to be differentiated with respect to the inputs.
    centred : bool, default=False
        Whether the covariance leaves out what an example's choices share; see `jacobian_blocks`.

    Returns
    -------
    moments : Moments
        Mean (B, C) and covariance (..., B, C, C). Of a choice that a row does not have the mean is
        -inf and the covariances are 0.
    """
    means, covariances = [], []
    for part in slices(batch, _slice_rows(backend, n_outputs)):
        blocks, outputs = backend.jacobian_blocks(part, create_graph, centred)
        means.append(outputs)
        covariance = variance(blocks)
        del blocks
        if centred and outputs.shape[1] > 1:
            basis = choice_contrasts(outputs.isfinite(), covariance)
            covariance = basis @ covariance @ basis.mT
        covariances.append(covariance)
    return Moments(torch.cat(means), torch.cat(covariances, -3))


def _slice_rows(backend: StreamingInterface, n_outputs: int) -> int:
    """Return how many examples' Jacobians are held at once."""
    weights = sum(tensor.numel for tensor in backend.tensors)
    model = sum(_bytes(parameter) for parameter in backend.model.parameters())
    budget = max(JACOBIAN_BYTES, int(JACOBIAN_SHARE * model))
    return max(budget // (weights * n_outputs * backend.dtype.itemsize), 1)


def _bytes(tensor: Tensor) -> int:
    """Return the memory of a tensor; of a quantised one (torchao's) that of what it is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()
