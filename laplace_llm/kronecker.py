"""The algebra of Kronecker-factored LoRA posteriors, dense or low-rank.

Each tensor is brought to the shape (r, d), so its curvature is ``small (x) large``: an r x r
factor that is always dense, and a d x d factor that is dense or low-rank (`laplace_llm.sketch`).
`LoraKronDecomposed` plays the part of `laplace.utils.KronDecomposed` and never holds a d x d
matrix for a low-rank side. Blocks may be on several devices; what is summed over them is on that of
the prior precision.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from laplace_llm.errors import PriorError
from laplace_llm.sketch import Spectrum


@dataclass(frozen=True)
class Block:
    """Eigenpairs of one tensor's curvature, ``small (x) large`` on weights of shape (r, d)."""

    small: Spectrum
    large: Spectrum
    transposed: bool

    @property
    def size(self) -> int:
        """Number of weights r * d."""
        return self.small.dim * self.large.dim

    @property
    def device(self) -> torch.device:
        """Device of the eigenpairs: that of the tensor."""
        return self.small.values.device

    def scaled(self, small: Tensor | float, large: Tensor | float) -> Block:
        """Return the block with its two factors multiplied."""
        return replace(self, small=self.small.scaled(small), large=self.large.scaled(large))

    def fold(self, weights: Tensor) -> Tensor:
        """Turn (..., out * in) into (..., r, d)."""
        r, d = self.small.dim, self.large.dim
        if self.transposed:
            return weights.unflatten(-1, (d, r)).mT
        return weights.unflatten(-1, (r, d))

    def unfold(self, weights: Tensor) -> Tensor:
        """Turn (..., r, d) back into (..., out * in)."""
        return (weights.mT if self.transposed else weights).flatten(-2)

    def eigenvalues(self, delta: Tensor, damping: bool) -> tuple[Tensor, Tensor]:
        """Return the eigenvalues (..., r, k) on the kept pairs and (..., r) on the complement.

        They are in float64, as products of two numbers leave the range of float32 easily.

        Parameters
        ----------
        delta : Tensor
            Prior precision of the block, of any shape (...).
        damping : bool
            See `LoraKron.decompose`.
        """
        b, a, rho = self._factors()
        delta = delta.double()[..., None]
        if damping:
            root = delta.sqrt()
            return (b + root)[..., :, None] * (a + root)[..., None, :], (b + root) * (rho + root)
        return b[:, None] * a + delta[..., None], b * rho + delta

    def log_ratios(self, delta: Tensor, damping: bool) -> tuple[Tensor, Tensor]:
        """Return the logarithms of `eigenvalues` over delta, with nothing cancelling in them."""
        b, a, rho = self._factors()
        delta = delta.double()[..., None]
        if damping:
            root = delta.sqrt()
            b = (b / root).log1p()
            return b[..., :, None] + (a / root).log1p()[..., None, :], b + (rho / root).log1p()
        return (b[:, None] * a / delta[..., None]).log1p(), (b * rho / delta).log1p()

    def _factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the eigenvalues of the small and the large factor in float64, and the rest's."""
        return self.small.values.double(), self.large.values.double(), self.large.rest.double()


@dataclass(frozen=True)
class CorrectedBlock(Block):
    """A block with eigenvalues of its own in place of the products of its factors'.

    Attributes
    ----------
    kept : Tensor
        (r, k), on the kept pairs.
    rest : Tensor
        (r,), on the complement.
    """

    kept: Tensor
    rest: Tensor

    def scaled(self, small: Tensor | float, large: Tensor | float) -> CorrectedBlock:
        """Return the block multiplied by both numbers."""
        kept, rest = self.kept * small * large, self.rest * small * large
        return replace(self, kept=kept, rest=rest)

    def eigenvalues(self, delta: Tensor, damping: bool) -> tuple[Tensor, Tensor]:
        """Return the eigenvalues (..., r, k) and (..., r); there are no factors to damp."""
        assert not damping
        delta = delta.double()[..., None]
        return self.kept + delta[..., None], self.rest + delta

    def log_ratios(self, delta: Tensor, damping: bool) -> tuple[Tensor, Tensor]:
        """Return the logarithms of `eigenvalues` over delta."""
        assert not damping
        delta = delta.double()[..., None]
        return (self.kept / delta[..., None]).log1p(), (self.rest / delta).log1p()


class LoraKronDecomposed:
    """Eigendecomposed Kronecker curvature plus a prior precision per tensor.

    The low-rank algebra: with ``B = Q diag(b) Q^T`` (r x r), ``A = U diag(l) U^T + rho (I -
    U U^T)`` and ``W' = Q^T W``, ``(B (x) A + delta)^e W = Q [((b l^T + delta)^e - (b rho +
    delta)^e) * (W' U)] U^T + Q [(b rho + delta)^e * W']``.

    Parameters
    ----------
    blocks : Sequence[Block]
        Eigenpairs, one block a tensor. With `CorrectedBlock` the eigenvalues ``b l^T`` and ``b
        rho`` are others, in the same eigenbasis.
    deltas : Tensor, optional
        Prior precision of each block, shape (L,); zeros by default.
    damping : bool, default=False
        See `LoraKron.decompose`; unlike in the parent, it survives `+` and `*`.
    """

    def __init__(
        self, blocks: Sequence[Block], deltas: Tensor | None = None, damping: bool = False
    ) -> None:
        self.blocks = list(blocks)
        if deltas is None:
            deltas = self.blocks[0].small.values.new_zeros(len(self.blocks))
        self.deltas = deltas
        self.damping = damping

    def __len__(self) -> int:
        return len(self.blocks)

    def __add__(self, deltas: Tensor) -> LoraKronDecomposed:
        """Add a prior precision, a scalar or one value a tensor."""
        is_tensor = isinstance(deltas, Tensor)
        if not is_tensor or deltas.ndim > 1 or deltas.numel() not in (1, len(self)):
            raise PriorError(
                f"Expected a prior precision with 1 or {len(self)} values, but got {deltas!r}."
            )
        return LoraKronDecomposed(self.blocks, self.deltas + deltas, self.damping)

    def __mul__(self, scalar: Tensor | float) -> LoraKronDecomposed:
        """Multiply the curvature (not the prior) by a scalar."""
        root = torch.as_tensor(scalar).sqrt()
        blocks = [block.scaled(root.to(block.small.values), root.to(block.small.values))
                  for block in self.blocks]  # fmt: skip
        return LoraKronDecomposed(blocks, self.deltas, self.damping)

    __radd__ = __add__
    __rmul__ = __mul__

    def _spectra(self) -> Iterator[tuple[Block, Tensor, Tensor]]:
        for block, delta in zip(self.blocks, self.deltas, strict=True):
            yield block, *block.eigenvalues(delta.to(block.device), self.damping)

    def logdet(self) -> Tensor:
        """Return the log determinant, differentiable in `deltas`."""
        logs = ((block, kept.log(), rest.log()) for block, kept, rest in self._spectra())
        return self._summed(logs).to(self.deltas.dtype)

    def logdet_ratio(self) -> Tensor:
        """Return the log determinant less that of the prior, in float64, differentiable."""
        pairs = zip(self.blocks, self.deltas, strict=True)
        return self._summed((b, *b.log_ratios(d.to(b.device), self.damping)) for b, d in pairs)

    def _summed(self, logs: Iterable[tuple[Block, Tensor, Tensor]]) -> Tensor:
        """Return the sum over all P eigenvalues of what there is on kept pairs and the rest."""
        total = self.deltas.new_zeros((), dtype=torch.float64)
        for block, kept, rest in logs:
            lost = block.large.dim - kept.shape[-1]
            part = kept.sum() + (lost * rest.sum() if lost else 0)
            total = total + part.to(total.device)
        return total

    def bmm(self, W: Tensor, exponent: float = -1) -> Tensor:
        """Return ``self ** exponent`` times vectors W of shape (P,), (B, P) or (B, C, P)."""
        parts = []
        sizes = [block.size for block in self.blocks]
        for part, (block, kept, rest) in zip(W.split(sizes, -1), self._spectra(), strict=True):
            Q, U = block.small.vectors, block.large.vectors
            rotated = Q.T @ block.fold(part.to(block.device))  # (..., r, d)
            kept, rest = (kept**exponent).to(U), (rest[:, None] ** exponent).to(U)
            if kept.shape[-1] < block.large.dim:
                out = ((kept - rest) * (rotated @ U)) @ U.T + rest * rotated
            else:
                out = (kept * (rotated @ U)) @ U.T
            parts.append(block.unfold(Q @ out).to(W.device))
        return torch.cat(parts, -1)

    def inv_square_form(self, W: Tensor) -> Tensor:
        """Return ``W P^-1 W^T`` of shape (B, C, C) for W of shape (B, C, P)."""
        sizes = [block.size for block in self.blocks]
        return self.variance(list(W.split(sizes, -1)))

    def variance(self, jacobians: Sequence[Tensor]) -> Tensor:
        """Return ``sum_l J_l P_l^-1 J_l^T`` of shape (B, C, C).

        Parameters
        ----------
        jacobians : Sequence[Tensor]
            One a tensor, (B, C, out * in).
        """
        return self._grid_variance(jacobians, self.deltas[None])[0]

    def variance_grid(self, jacobians: Sequence[Tensor], deltas: Tensor) -> Tensor:
        """Return the output covariances (G, B, C, C) for G scalar values added to `deltas`.

        The Jacobians are rotated into the eigenbasis once, so that a grid of values costs little
        more than one value.
        """
        return self._grid_variance(jacobians, deltas[:, None] + self.deltas)

    def tensor_variances(self, jacobians: Sequence[Tensor], deltas: Tensor) -> Iterator[Tensor]:
        """Yield each tensor's part (G, B, C, C) of `variance_grid`."""
        return self._parts(jacobians, deltas[:, None] + self.deltas)

    def _grid_variance(self, jacobians: Sequence[Tensor], deltas: Tensor) -> Tensor:
        parts = self._parts(jacobians, deltas)
        total = next(parts)
        for part in parts:
            total = total + part
        return total

    def _parts(self, jacobians: Sequence[Tensor], deltas: Tensor) -> Iterator[Tensor]:
        for index, (block, jacobian) in enumerate(zip(self.blocks, jacobians, strict=True)):
            delta = deltas[:, index].to(block.device)
            kept, rest = block.eigenvalues(delta, self.damping)  # (G, r, k), (G, r)
            Q, U = block.small.vectors, block.large.vectors
            rotated = Q.T @ block.fold(jacobian.to(U))
            inner = rotated @ U  # (B, C, r, k)
            part = _pairs(inner, kept.reciprocal().to(U))
            if kept.shape[-1] < block.large.dim:
                # What U does not explain, itself and not as a difference of two large squares.
                outside = rotated - inner @ U.T
                gram = torch.einsum("bcrd,berd->bcer", outside, outside)
                part = part + torch.einsum("bcer,gr->gbce", gram, rest.reciprocal().to(U))
            yield part.to(deltas.device)

    def diag(self, exponent: float = 1) -> Tensor:
        """Return the diagonal of ``self ** exponent``, shape (P,)."""
        parts = []
        for block, kept, rest in self._spectra():
            Q2, U2 = block.small.vectors.square(), block.large.vectors.square()
            kept, rest = (kept**exponent).to(Q2), (rest[:, None] ** exponent).to(Q2)
            complement = 1 - U2.sum(1) if kept.shape[-1] < block.large.dim else 0 * U2.sum(1)
            part = block.unfold(Q2 @ (kept @ U2.T + rest * complement))
            parts.append(part.to(self.deltas.device))
        return torch.cat(parts)

    def to_matrix(self, exponent: float = 1) -> Tensor:
        """Return the dense (P, P) matrix ``self ** exponent``; for tests on tiny models."""
        size = sum(block.size for block in self.blocks)
        return self.bmm(torch.eye(size).to(self.deltas), exponent)


def _pairs(inner: Tensor, weights: Tensor) -> Tensor:
    """Return ``sum_ij inner[b,c,i,j] weights[g,i,j] inner[b,e,i,j]`` of shape (G, B, C, C)."""
    inner, weights = inner.flatten(-2), weights.flatten(-2)
    if len(weights) == 1:
        return ((inner * weights) @ inner.mT)[None]
    c = inner.shape[1]
    upper = torch.triu_indices(c, c, device=inner.device)
    products = inner[:, upper[0]] * inner[:, upper[1]]  # (B, C (C + 1) / 2, r k)
    values = torch.einsum("bpx,gx->gbp", products, weights)
    out = values.new_empty(*values.shape[:2], c, c)
    out[..., upper[0], upper[1]] = values
    out[..., upper[1], upper[0]] = values
    return out
