"""Streaming second-moment matrices ``M = sum a a^T``: exact, or sketched at a fixed rank.

Both kinds are sums over data: they do not depend on batch order or batch size, two of them add
up, and `spectra` turns either into the eigenpairs that the posterior's algebra needs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from laplace_llm.eigen import decomposing, eigh
from laplace_llm.options import check_optional_count
from laplace_llm.sums import RunningSum

DEFAULT_RANK = 64
# Eigenvalues below so many times the rounding of the largest one are rounding themselves.
ROUNDING = 16
# Bytes of double-precision temporaries in an eigendecomposition of several sketches at once.
WORKSPACE_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of a PSD matrix: ``U diag(l) U^T + rho (I - U U^T)``.

    Attributes
    ----------
    vectors : Tensor
        U of shape (d, k). Its columns are orthonormal, or zero where M's rank is below k.
    values : Tensor
        l of shape (k,), non-negative; rho where the column is zero.
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
        self.sum = RunningSum(matrix)

    @property
    def matrix(self) -> Tensor:
        """The (d, d) matrix; what is written to it counts."""
        return self.sum.total()

    def add(self, rows: Tensor) -> None:
        """Add ``rows^T rows`` for rows of shape (n, d)."""
        self.sum.open().addmm_(rows.T, rows)

    def merge(self, other: Moment) -> None:
        """Add another moment of the same kind."""
        assert isinstance(other, DenseMoment)
        self.matrix.add_(other.matrix)

    def tensors(self) -> list[Tensor]:
        """Return what adds up over parts of the data; to be written to."""
        return [self.matrix]

    @property
    def trace(self) -> Tensor:
        """Trace of the matrix, exact, in float64."""
        parts = [part.diagonal().sum(dtype=torch.float64) for part in self.sum.parts()]
        return torch.stack(parts).sum()


class SketchedMoment:
    """A fixed-rank summary of ``M = sum a a^T``: the sketch ``Y = M Omega`` and the trace.

    Memory is d x s instead of d x d. Once `spectra` has decomposed it, its Nystrom eigenpairs,
    which are no larger and give Y back, take the sketch's place.

    Parameters
    ----------
    sketch : Tensor
        (d, s).
    trace : Tensor
        A scalar, in float64.
    """

    def __init__(self, sketch: Tensor, trace: Tensor) -> None:
        self._sum: RunningSum | None = RunningSum(sketch)
        self._spectrum: Spectrum | None = None
        self._trace = trace.double()
        self.shape, self.dtype = sketch.shape, sketch.dtype

    @classmethod
    def of_spectrum(cls, spectrum: Spectrum, trace: Tensor) -> SketchedMoment:
        """Return the moment that has been decomposed into `spectrum`."""
        moment = cls(spectrum.vectors[:0], trace)
        moment.shape = spectrum.vectors.shape
        moment.decomposed(spectrum)
        return moment

    @property
    def sketch(self) -> Tensor:
        """Y of shape (d, s), in memory or worked out from the eigenpairs (``U l U^T Omega``)."""
        if self._spectrum is None:
            assert self._sum is not None
            return self._sum.total()
        U, values = self._spectrum.vectors, self._spectrum.values
        return U @ (values[:, None] * (U.T @ _test_matrix_of(U)))

    @property
    def spectrum(self) -> Spectrum | None:
        """Eigenpairs, if nothing was added since they were computed."""
        return self._spectrum

    def decomposed(self, spectrum: Spectrum) -> None:
        """Keep the eigenpairs in place of the sketch."""
        self._sum, self._spectrum = None, spectrum

    def add(self, rows: Tensor) -> None:
        """Add ``rows^T rows`` for rows of shape (n, d)."""
        sketch = self._writable().open()
        sketch.addmm_(rows.T, rows @ _test_matrix_of(rows.T, self.shape[1]))
        self._trace += rows.square().sum(dtype=torch.float64)

    def merge(self, other: Moment) -> None:
        """Add another moment of the same kind (and so the same test matrix)."""
        assert isinstance(other, SketchedMoment)
        self._writable().total().add_(other.sketch)
        self._trace += other._trace

    def tensors(self) -> list[Tensor]:
        """Return what adds up over parts of the data; to be written to."""
        return [self._writable().total(), self._trace]

    def _writable(self) -> RunningSum:
        if self._sum is None:
            self._sum, self._spectrum = RunningSum(self.sketch), None
        return self._sum

    @property
    def trace(self) -> Tensor:
        """Trace of the summarised matrix, exact, in float64."""
        return self._trace


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
        Rank k whose best approximation is aimed at, by a sketch of 2k columns; sides of up to 2k
        are exact. Default: 64.
    dtype, device
        Of the accumulators.
    small : bool, default=False
        Whether to keep the side exact whatever its length (the LoRA rank's side).

    Raises
    ------
    OptionError
        If `rank` is smaller than one.
    """
    check_optional_count("rank", rank)
    columns = 2 * (DEFAULT_RANK if rank is None else rank)
    if small or dim <= columns:
        return DenseMoment(torch.zeros(dim, dim, dtype=dtype, device=device))
    zeros = torch.zeros(dim, columns, dtype=dtype, device=device)
    return SketchedMoment(zeros, zeros.new_zeros((), dtype=torch.float64))


def spectra(moments: Sequence[Moment]) -> list[Spectrum]:
    """Eigendecompose moments, those of one shape together; sketches become their eigenpairs.

    Parameters
    ----------
    moments : Sequence[Moment]
        An object that comes twice is decomposed once.
    """
    found: dict[int, Spectrum] = {}
    groups: dict[tuple[object, ...], list[Moment]] = defaultdict(list)
    for key, moment in {id(moment): moment for moment in moments}.items():
        if isinstance(moment, DenseMoment):
            groups[moment.matrix.shape, moment.matrix.device, True].append(moment)
        elif moment.spectrum is None:
            groups[moment.shape, moment.sketch.device, False].append(moment)
        else:
            found[key] = moment.spectrum
    for (shape, *_), group in groups.items():
        assert isinstance(shape, torch.Size)
        step = max(WORKSPACE_BYTES // (8 * shape.numel()), 1)
        for start in range(0, len(group), step):
            part = group[start : start + step]
            found |= zip(map(id, part), _decompose(part), strict=True)
    return [found[id(moment)] for moment in moments]


def _decompose(moments: list[Moment]) -> list[Spectrum]:
    """Return the spectra of moments of one kind, shape and device."""
    if isinstance(moments[0], DenseMoment):
        matrices = torch.stack([m.matrix for m in moments if isinstance(m, DenseMoment)])
        what = f"Kronecker factors of shape {tuple(matrices.shape[1:])}"
        values, vectors = (part.to(matrices) for part in eigh(matrices.double(), what))
        values = above_rounding(values, values[:, -1:], matrices.dtype)
        rest = values.new_zeros(())
        return [Spectrum(*pair, rest) for pair in zip(vectors, values, strict=True)]
    sketched = [m for m in moments if isinstance(m, SketchedMoment)]
    sketch = torch.stack([m.sketch for m in sketched])
    values, vectors, dropped, shift = _nystrom(sketch)
    lost = torch.stack([m.trace for m in sketched]) - values.sum(1)
    rest = lost.clamp_min(0) / (sketch.shape[1] - (~dropped).sum(1)).clamp_min(1)
    rest = torch.where(rest > ROUNDING * shift, rest, 0)  # else it comes of the sketch's rounding
    values = torch.where(dropped, rest[:, None], values)
    results = []
    for moment, *parts in zip(sketched, vectors, values.to(sketch), rest.to(sketch), strict=True):
        if len(sketched) > 1:  # as a view, it would keep the others alive
            parts = [part.clone() for part in parts]
        spectrum = Spectrum(*parts)
        moment.decomposed(spectrum)
        results.append(spectrum)
    return results


def above_rounding(values: Tensor, largest: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values, and zeros for those that are the rounding of `largest` in this precision.

    Of a factor that is not of full rank, nothing else is left; next to a small prior precision it
    would be taken for curvature.
    """
    return torch.where(values > ROUNDING * torch.finfo(dtype).eps * largest, values, 0)


def _nystrom(sketch: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return eigenvalues (b, s), falling, eigenvectors (b, d, s), which are dropped, and the shift.

    The Nystrom approximation ``Y (Omega^T Y)^-1 Y^T`` of Tropp, Yurtsever, Udell and Cevher
    (*Fixed-rank approximation of a positive-semidefinite matrix from streaming data*, NeurIPS
    2017, algorithm 3), whose trailing eigenpairs are kept: it never exceeds M, so each of them
    lowers the nuclear-norm error. All that is as long as d is done a few rows at a time.

    Parameters
    ----------
    sketch : Tensor
        Y (b, d, s); the eigenvectors are written over it.
    """
    # The shift makes Omega^T (M + shift I) Omega safely positive definite at the precision of the
    # *stored* sketch; it is taken off the eigenvalues again.
    dim, eps = sketch.shape[1], torch.finfo(sketch.dtype).eps
    shift = eps * sketch.double().norm(dim=(1, 2)) / dim**0.5
    omega, height = _test_matrix_of(sketch), max(WORKSPACE_BYTES // (8 * sketch[:, 0].numel()), 1)

    def shifted() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield a few rows of Y, of Y + shift Omega and of Omega, the latter two in float64."""
        for y, o in zip(sketch.split(height, 1), omega.split(height), strict=True):
            yield y, y.double() + shift[:, None, None] * o.double(), o.double()

    core = sum(o.T @ y for _, y, o in shifted())
    assert isinstance(core, Tensor)
    what = f"sketches of Kronecker factors of shape {(dim, dim)}"
    values, vectors = eigh((core + core.mT) / 2, what)
    kept = values > shift[:, None]  # below it, rounding of the stored sketch is all there is
    root = vectors * torch.where(kept, values.clamp_min(1e-300).rsqrt(), 0)[:, None]
    triangle = sketch.new_zeros(len(sketch), 0, sketch.shape[2], dtype=torch.float64)
    with decomposing(what):
        for _, y, _ in shifted():  # of the QR decomposition of (Y + shift Omega) root
            triangle = torch.linalg.qr(torch.cat([triangle, y @ root], 1), mode="r")[1]
        _, singular, right = torch.linalg.svd(triangle, full_matrices=False)
    values, eps = singular.square(), torch.finfo(torch.float64).eps
    dropped = values <= torch.maximum(2 * shift, eps * values[:, 0])[:, None]
    rotation = right.mT * torch.where(dropped, 0, 1 / singular.clamp_min(1e-300))[:, None]
    for y, exact, _ in shifted():
        y.copy_(exact @ root @ rotation)
    values = (values - shift[:, None]).clamp_min(0)
    return torch.where(dropped, 0, values), sketch, dropped, shift


def _test_matrix_of(like: Tensor, columns: int | None = None) -> Tensor:
    """Return the test matrix (d, s) of a sketch (..., d, s), or of `columns` columns."""
    columns = like.shape[-1] if columns is None else columns
    return test_matrix(like.shape[-2], columns, like.dtype, like.device)


@lru_cache(maxsize=16)
def test_matrix(dim: int, columns: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Return the fixed Gaussian test matrix Omega (d, s): the same in every run and process."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(dim, columns, generator=generator, dtype=torch.float64).to(device, dtype)


test_matrix.__test__ = False  # type: ignore[attr-defined]  # pytest: not a test
