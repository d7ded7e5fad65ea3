"""Streaming second-moment matrices ``M = sum a a^T``: exact, or sketched at a fixed rank.

Both kinds are sums over data: they do not depend on batch order or batch size, two of them add
up, and `spectrum` turns either into the eigenpairs that the posterior's algebra needs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from laplace_llm.errors import OptionError

DEFAULT_RANK = 64
DENSE_UP_TO = 1024


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of a PSD matrix: ``U diag(l) U^T + rho (I - U U^T)``.

    Attributes
    ----------
    vectors : Tensor
        U of shape (d, k), orthonormal columns.
    values : Tensor
        l of shape (k,), non-negative.
    rest : Tensor
        rho, a scalar: the mean eigenvalue of the complement (0 where k = d).
    """

    vectors: Tensor
    values: Tensor
    rest: Tensor

    @property
    def dim(self) -> int:
        """Side length d of the matrix."""
        return self.vectors.shape[0]

    def scaled(self, factor: Tensor | float) -> Spectrum:
        """Return the spectrum of ``factor`` times the matrix."""
        return replace(self, values=self.values * factor, rest=self.rest * factor)

    def dense(self) -> Tensor:
        """Return the (d, d) matrix; for tests and small sides."""
        complement = torch.eye(self.dim).to(self.vectors) - self.vectors @ self.vectors.T
        return (self.vectors * self.values) @ self.vectors.T + self.rest * complement


class DenseMoment:
    """The exact (d, d) matrix ``sum a a^T``."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def add(self, rows: Tensor) -> None:
        """Add ``rows^T rows`` for rows of shape (n, d)."""
        self.matrix += rows.T @ rows

    def merge(self, other: Moment) -> None:
        """Add another moment of the same kind."""
        assert isinstance(other, DenseMoment)
        self.matrix += other.matrix

    @property
    def trace(self) -> Tensor:
        """Trace of the matrix, exact."""
        return self.matrix.trace()

    def spectrum(self) -> Spectrum:
        """Eigendecompose; eigenvalues are clamped at zero."""
        values, vectors = torch.linalg.eigh(self.matrix)
        return Spectrum(vectors, values.clamp_min(0), values.new_zeros(()))


class SketchedMoment:
    """A fixed-rank summary of ``M = sum a a^T``: the sketch ``Y = M Omega`` and the trace.

    Memory is d x s instead of d x d, with s = 2 * rank columns. `spectrum` is the fixed-rank
    Nystrom approximation of Tropp, Yurtsever, Udell and Cevher (*Fixed-rank approximation of a
    positive-semidefinite matrix from streaming data*, NeurIPS 2017, algorithm 3); what it leaves
    of the trace is spread evenly over the complement.
    """

    def __init__(self, sketch: Tensor, trace: Tensor, rank: int) -> None:
        self.sketch = sketch
        self._trace = trace
        self.rank = rank

    @property
    def _omega(self) -> Tensor:
        return test_matrix(*self.sketch.shape, self.sketch.dtype, self.sketch.device)

    def add(self, rows: Tensor) -> None:
        """Add ``rows^T rows`` for rows of shape (n, d)."""
        self.sketch += rows.T @ (rows @ self._omega)
        self._trace += rows.square().sum()

    def merge(self, other: Moment) -> None:
        """Add another moment of the same kind (and so the same test matrix)."""
        assert isinstance(other, SketchedMoment)
        self.sketch += other.sketch
        self._trace += other._trace

    @property
    def trace(self) -> Tensor:
        """Trace of the summarised matrix, exact."""
        return self._trace

    def spectrum(self) -> Spectrum:
        """Return the rank-k Nystrom approximation with the lost trace in `Spectrum.rest`."""
        dim, dtype = self.sketch.shape[0], self.sketch.dtype
        sketch, omega = self.sketch.double(), self._omega.double()
        # The shift nu makes Omega^T (M + nu I) Omega safely positive definite at the precision of
        # the *stored* sketch; it is taken off the eigenvalues again.
        shift = torch.finfo(dtype).eps * sketch.norm() / dim**0.5
        shifted = sketch + shift * omega
        core = omega.T @ shifted
        values, vectors = torch.linalg.eigh((core + core.T) / 2)
        keep = values > shift  # below it, rounding of the stored sketch is all there is
        root = shifted @ (vectors[:, keep] / values[keep].sqrt())
        left, singular, _ = torch.linalg.svd(root, full_matrices=False)
        k = min(self.rank, left.shape[1])
        left, eigenvalues = left[:, :k], (singular[:k].square() - shift).clamp_min(0)
        lost = (self._trace.double() - eigenvalues.sum()).clamp_min(0)
        rest = lost / (dim - k) if dim > k else lost.new_zeros(())
        return Spectrum(left.to(dtype), eigenvalues.to(dtype), rest.to(dtype))


Moment = DenseMoment | SketchedMoment


def new_moment(
    dim: int, rank: int | None, dtype: torch.dtype, device: torch.device | str, small: bool = False
) -> Moment:
    """Make an empty second-moment accumulator.

    Parameters
    ----------
    dim : int
        Side length d.
    rank : int, optional
        Rank kept of a side longer than this; None keeps sides of up to 1,024 exact and rank 64 of
        longer ones.
    dtype, device
        Of the accumulators.
    small : bool, default=False
        Whether to keep the side exact whatever its length (the LoRA rank's side).

    Raises
    ------
    OptionError
        If `rank` is smaller than one.
    """
    check_rank(rank)
    limit, rank = (DENSE_UP_TO, DEFAULT_RANK) if rank is None else (rank, rank)
    if small or dim <= limit:
        return DenseMoment(torch.zeros(dim, dim, dtype=dtype, device=device))
    columns = min(2 * rank, dim)
    zeros = torch.zeros(dim, columns, dtype=dtype, device=device)
    return SketchedMoment(zeros, zeros.new_zeros(()), rank)


def check_rank(rank: int | None) -> None:
    """Raise OptionError unless `rank` is None or a positive integer."""
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise OptionError(f"Expected rank=None or an integer >= 1, but got {rank!r}.")


@lru_cache(maxsize=16)
def test_matrix(dim: int, columns: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Return the fixed Gaussian test matrix Omega (d, s): the same in every run and process."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(dim, columns, generator=generator, dtype=torch.float64).to(device, dtype)


test_matrix.__test__ = False  # type: ignore[attr-defined]  # pytest: not a test
