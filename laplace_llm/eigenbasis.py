"""Eigenvalues refitted in the eigenbasis of Kronecker factors: sums over data, as the factors are.

In the basis of ``B (x) A`` the best diagonal, in Frobenius norm, is not made of products of the
factors' eigenvalues, but of the second moments of per-example gradients G along the basis' axes,
``s_ij = sum (q_i^T G u_j)^2`` (George et al., *Fast Approximate Natural Gradient Descent in a
Kronecker-factored Eigenbasis*, NeurIPS 2018). They take another pass over the data, as the basis
has to be known first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from laplace_llm.errors import StateError
from laplace_llm.kronecker import Block, CorrectedBlock, LoraKronDecomposed
from laplace_llm.sketch import ROUNDING, Spectrum, above_rounding


class EigenbasisMoments:
    """Second moments of per-example gradients along the axes of each tensor's eigenbasis.

    Sums over data: they depend neither on batch order nor on batch size.

    Parameters
    ----------
    blocks : Sequence[Block]
        The eigenbases, one block a tensor.

    Attributes
    ----------
    kept : list[Tensor]
        (r, k) for each tensor, in float64: ``sum (q_i^T G u_j)^2``.
    totals : list[Tensor]
        (r,) for each tensor, in float64: ``sum ||q_i^T G||^2``.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = list(blocks)
        self.kept, self.totals = [], []
        for block in self.blocks:
            r, k = block.small.dim, block.large.vectors.shape[1]
            self.kept.append(torch.zeros(r, k, dtype=torch.float64, device=block.device))
            self.totals.append(torch.zeros(r, dtype=torch.float64, device=block.device))

    def add(self, index: int, gradients: Tensor) -> None:
        """Add per-example gradients (B, out * in) of one tensor."""
        block = self.blocks[index]
        rotated = block.small.vectors.T @ block.fold(gradients)  # (B, r, d)
        self.totals[index] += rotated.square().sum((0, 2), dtype=torch.float64)
        inner = rotated @ block.large.vectors
        self.kept[index] += inner.square().sum(0, dtype=torch.float64)

    def tensors(self) -> list[Tensor]:
        """Return what adds up over parts of the data; to be written to."""
        return [*self.kept, *self.totals]

    def merge(self, other: EigenbasisMoments) -> None:
        """Add the moments of other data in the same basis."""
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine += theirs

    def decompose(self) -> LoraKronDecomposed:
        """Return the curvature with these eigenvalues."""
        moments = zip(self.blocks, self.kept, self.totals, strict=True)
        return LoraKronDecomposed([_corrected(*each) for each in moments])

    def state(self) -> dict[str, Any]:
        """Return plain containers of tensors, for `torch.save`."""
        return {"kept": self.kept, "totals": self.totals}

    def load(self, state: dict[str, Any]) -> EigenbasisMoments:
        """Return new moments in the same basis with the contents of `state`.

        Raises
        ------
        StateError
            If they are of another shape.
        """
        loaded = EigenbasisMoments(self.blocks)
        for key in ("kept", "totals"):
            mine = getattr(self, key)
            expected, came = ([tuple(t.shape) for t in ts] for ts in (mine, state[key]))
            if expected != came:
                raise StateError(
                    f"Expected eigenvalues of shapes {expected}, but the state has {came}. Load it "
                    "with the same adapter and backend_kwargs (rank) as it was saved."
                )
            setattr(loaded, key, [t.to(m) for t, m in zip(state[key], mine, strict=True)])
        return loaded


def _corrected(block: Block, kept: Tensor, total: Tensor) -> CorrectedBlock:
    """Return the block with its best eigenvalues.

    Which vectors span the complement of a sketch, or a factor's null space, is arbitrary. So that
    nothing depends on it, all of them together have one value a row.
    """
    axes = _axes(block.large)
    lost = (block.large.dim - axes.sum()).clamp_min(1)
    # Moments are sums of squares, whose rounding is that of their roots.
    dtype, largest = block.large.vectors.dtype, total.max().sqrt()
    kept, total = (above_rounding(m.sqrt(), largest, dtype).square() for m in (kept, total))
    rest = above_rounding(total - (kept * axes).sum(1), total, dtype) / lost
    kept = torch.where(axes, kept, rest[:, None])
    rows = _axes(block.small)[:, None]
    others = (~rows).sum().clamp_min(1)
    kept = torch.where(rows, kept, (kept * ~rows).sum(0) / others)
    rest = torch.where(rows[:, 0], rest, (rest * ~rows[:, 0]).sum() / others)
    return CorrectedBlock(block.small, block.large, block.transposed, kept, rest)


def _axes(spectrum: Spectrum) -> Tensor:
    """Return which columns (k,) are eigenvectors of an eigenvalue that is not zero."""
    values = spectrum.values
    rounding = ROUNDING * torch.finfo(values.dtype).eps * values.max()
    return spectrum.vectors.any(0) & (values > rounding)
