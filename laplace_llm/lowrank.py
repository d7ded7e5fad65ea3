"""The algebra of a low-rank posterior over all LoRA weights: ``D + h R^T R``, never P x P.

With ``R' = R D^-1/2`` and ``R' R'^T = U diag(s) U^T``, the rows ``Q = diag(s)^-1/2 U^T R'`` are
orthonormal, so that ``D^1/2 P^-1 D^1/2 = (I - Q^T Q) + Q^T diag(1 / (1 + h s)) Q`` and
``log det P - log det D = sum log(1 + h s)``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from laplace_llm.eigen import eigh
from laplace_llm.rows import LowRankGGN


class LowRankPrecision:
    """Posterior precision of all weights together.

    Parameters
    ----------
    ggn : LowRankGGN
        The rows R.
    factor : Tensor or float
        h, what the curvature is multiplied by.
    deltas : Tensor
        Prior precision: (1,), one value a tensor (L,), or one a weight (P,).
    spectrum : tuple[Tensor, Tensor], optional
        Eigenvalues and eigenvectors of ``R R^T``, where they are known.
    grams : Tensor, optional
        ``R_l R_l^T`` of every tensor, (L, m, m), where they are known.
    """

    def __init__(
        self,
        ggn: LowRankGGN,
        factor: Tensor | float,
        deltas: Tensor,
        spectrum: tuple[Tensor, Tensor] | None = None,
        grams: Tensor | None = None,
    ) -> None:
        self.ggn = ggn
        self.factor = factor
        self.deltas = deltas.to(ggn.store.device)
        self._spectrum = spectrum
        self._grams = grams

    def whitened_gram(self) -> Tensor:
        """Return ``R D^-1 R^T`` (m, m) in float64, differentiable in the deltas."""
        deltas = self.deltas.double()
        if len(deltas) == 1 and self._spectrum is not None:
            values, vectors = self._spectrum
            return (vectors * values) @ vectors.T / deltas
        if len(deltas) == 1:
            return self.ggn.gram() / deltas
        if len(deltas) == len(self.ggn.sizes):
            grams = self.ggn.grams() if self._grams is None else self._grams
            return torch.einsum("l,lmn->mn", deltas.reciprocal(), grams)
        total = deltas.new_zeros(self.ggn.rank, self.ggn.rank)
        for (start, stop), delta in zip(self.ggn.blocks(), self._per_tensor(), strict=True):
            columns = self.ggn.store.columns_of(start, stop).double()
            total = total + (columns / delta) @ columns.T
        return total

    def _per_tensor(self) -> Sequence[Tensor]:
        """Return the prior precision of each tensor, (1,) or one value a weight."""
        if len(self.deltas) == 1:
            return [self.deltas] * len(self.ggn.sizes)
        if len(self.deltas) == len(self.ggn.sizes):
            return self.deltas.split(1)
        return self.deltas.split(self.ggn.sizes)

    def _whitened(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``D_l^-1/2`` and ``R'_l`` (m, p_l) of each tensor."""
        for (start, stop), delta in zip(self.ggn.blocks(), self._per_tensor(), strict=True):
            scale = delta.rsqrt()
            yield scale, self.ggn.store.columns_of(start, stop) * scale

    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Return the positive eigenvalues s (k,) of ``R' R'^T`` and their eigenvectors (m, k)."""
        if self._spectrum is not None and len(self.deltas) == 1:
            values, vectors = self._spectrum
            values = values / self.deltas.double()
        else:
            values, vectors = eigh(self.whitened_gram(), "the whitened GGN of all tensors")
        # Below is only noise: the Gram's rounding, or that of products with R' / sqrt(s).
        eps = max(torch.finfo(self.ggn.store.dtype).eps ** 1.5, torch.finfo(values.dtype).eps)
        keep = values > eps * len(values) * values.detach()[-1:].clamp_min(0)
        return values[keep], vectors[:, keep]

    def logdet_ratio(self) -> Tensor:
        """Return ``log det P - log det D`` in float64, differentiable in deltas and factor."""
        return (self.factor * self.spectrum()[0]).log1p().sum()

    def variance(self, jacobians: Sequence[Tensor]) -> Tensor:
        """Return ``J P^-1 J^T`` (B, C, C) from one Jacobian a tensor, (B, C, out * in)."""
        return self.variance_grid(jacobians, self.deltas.new_ones(1))[0]

    def variance_grid(self, jacobians: Sequence[Tensor], scales: Tensor) -> Tensor:
        """Return (G, B, C, C): `variance` with the prior precision times each of G scales."""
        values, vectors = self.spectrum()
        dtype = jacobians[0].dtype
        basis = (vectors / values.sqrt()).to(dtype)  # (m, k): Q = basis^T R'
        inside: Tensor | float = 0.0
        for jacobian, (scale, rows) in zip(jacobians, self._whitened(), strict=True):
            scaled = jacobian.to(scale.device) * scale
            inside = inside + scaled @ rows.T @ basis  # (B, C, k)
        assert isinstance(inside, Tensor)
        outside: Tensor | float = 0.0
        for jacobian, (scale, rows) in zip(jacobians, self._whitened(), strict=True):
            # The part that no row explains, itself and not as a difference of two large squares.
            rest = jacobian.to(scale.device) * scale - (inside @ basis.T) @ rows
            outside = outside + rest @ rest.mT
        assert isinstance(outside, Tensor)
        scales = scales.to(dtype)[:, None]
        weights = 1 / (scales + (self.factor * values).to(dtype))  # (G, k)
        kept = torch.einsum("bck,gk,bek->gbce", inside, weights, inside)
        return kept + outside / scales[..., None, None]

    def sample(self, n_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Return (n_samples, P) draws from ``N(0, P^-1)``."""
        store = self.ggn.store
        noise = torch.randn(
            n_samples, store.columns, dtype=store.dtype, device=store.device, generator=generator
        )
        values, vectors = self.spectrum()
        basis = (vectors / values.sqrt()).to(noise)
        parts = noise.split(self.ggn.sizes, 1)
        inside = torch.zeros(n_samples, basis.shape[1]).to(noise)
        for part, (_, rows) in zip(parts, self._whitened(), strict=True):
            inside += part @ rows.T @ basis
        shrunk = inside * ((1 + self.factor * values).rsqrt() - 1).to(noise)
        return torch.cat(
            [
                (part + (shrunk @ basis.T) @ rows) * scale
                for part, (scale, rows) in zip(parts, self._whitened(), strict=True)
            ],
            1,
        )

    def to_matrix(self) -> Tensor:
        """Return the dense (P, P) matrix; for tests on tiny models."""
        rows = self.ggn.store.columns_of(0, self.ggn.store.columns)
        sizes = torch.tensor(self.ggn.sizes, device=rows.device)
        deltas = self.deltas
        if len(deltas) != rows.shape[1]:
            deltas = deltas.expand(len(sizes)).repeat_interleave(sizes)
        return self.factor * rows.T @ rows + deltas.diag()
