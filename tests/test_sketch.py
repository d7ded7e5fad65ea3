"""Streaming second moments: exact and sketched."""

import pytest
import torch

from laplace_llm.errors import OptionError
from laplace_llm.sketch import (
    DEFAULT_RANK,
    DENSE_UP_TO,
    DenseMoment,
    SketchedMoment,
    check_rank,
    new_moment,
)

DIM = 60
INDEX = torch.arange(1, DIM + 1, dtype=torch.float64)
DECAYS = {
    "1/i": 1 / INDEX,
    "1/i^2": 1 / INDEX**2,
    "exponential": torch.exp(-INDEX / 5),
    "fast exponential": torch.exp(-INDEX),
    "rank 5 and noise": torch.where(INDEX <= 5, 1.0, 1e-3).double(),
}


def rows_with(eigenvalues, seed=0):
    """Return rows (d, d) whose second moment has the given eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    d = len(eigenvalues)
    noise = torch.randn(2, d, d, generator=generator, dtype=torch.float64)
    left, right = torch.linalg.qr(noise)[0]
    return left @ (eigenvalues.sqrt()[:, None] * right.T)


def sketched(dim, rank, dtype=torch.float64, columns=None):
    columns = min(2 * rank, dim) if columns is None else columns
    return SketchedMoment(
        torch.zeros(dim, columns, dtype=dtype), torch.zeros((), dtype=dtype), rank
    )


def nuclear_norm(matrix):
    return torch.linalg.svdvals(matrix.double()).sum()


def assert_same(left, right, **tolerance):
    tolerance = tolerance or {"rtol": 1e-8, "atol": 1e-12}
    torch.testing.assert_close(left.dense(), right.dense(), **tolerance)


@pytest.mark.parametrize("decay", DECAYS)
def test_dense_spectrum_reproduces_the_matrix(decay):
    rows = rows_with(DECAYS[decay])
    moment = new_moment(DIM, None, torch.float64, "cpu")
    moment.add(rows)
    spectrum = moment.spectrum()
    torch.testing.assert_close(spectrum.dense(), rows.T @ rows, rtol=1e-8, atol=1e-13)
    torch.testing.assert_close(moment.trace, DECAYS[decay].sum())
    assert spectrum.rest == 0


@pytest.mark.parametrize("decay", DECAYS)
def test_sketch_of_full_width_is_exact(decay):
    rows = rows_with(DECAYS[decay])
    moment = sketched(DIM, rank=DIM)
    moment.add(rows)
    torch.testing.assert_close(moment.spectrum().dense(), rows.T @ rows, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("rank", [DIM // 2, DIM - 1])
def test_sketch_with_as_many_columns_as_rows_is_the_best_of_its_rank(rank):
    eigenvalues = DECAYS["1/i"]
    moment = new_moment(DIM, rank, torch.float64, "cpu")
    assert moment.sketch.shape == (DIM, DIM)
    moment.add(rows_with(eigenvalues))
    spectrum = moment.spectrum()
    torch.testing.assert_close(spectrum.values, eigenvalues[:rank], rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(spectrum.rest, eigenvalues[rank:].mean(), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rank", [3, 8, 16])
@pytest.mark.parametrize("decay", DECAYS)
def test_error_is_near_that_of_the_best_approximation_of_the_rank(decay, rank, dtype):
    eigenvalues = DECAYS[decay]
    rows = rows_with(eigenvalues)
    moment = sketched(DIM, rank, dtype)
    moment.add(rows.to(dtype))
    spectrum = moment.spectrum()
    kept = (spectrum.vectors * spectrum.values) @ spectrum.vectors.T
    error = nuclear_norm(rows.T @ rows - kept.double())
    # The expected error is at most this multiple of the best one (Tropp et al. 2017, theorem 4.2).
    factor = 1 + rank / (moment.sketch.shape[1] - rank - 1)
    rounding = DIM * torch.finfo(dtype).eps * eigenvalues.sum()
    assert error <= factor * eigenvalues[rank:].sum() + rounding


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rank", [1, 4, 16, 40])
@pytest.mark.parametrize("decay", DECAYS)
def test_spectrum_keeps_the_trace(decay, rank, dtype):
    rows = rows_with(DECAYS[decay]).to(dtype)
    moment = sketched(DIM, rank, dtype)
    moment.add(rows)
    spectrum = moment.spectrum()
    k = len(spectrum.values)
    assert k <= rank
    total = spectrum.values.sum() + spectrum.rest * (DIM - k)
    rtol = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(total, rows.square().sum(), rtol=rtol, atol=0)
    torch.testing.assert_close(moment.trace, rows.square().sum(), rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_spectrum_has_orthonormal_vectors_and_falling_non_negative_values(dtype):
    moment = sketched(DIM, 12, dtype)
    moment.add(rows_with(DECAYS["exponential"]).to(dtype))
    spectrum = moment.spectrum()
    assert spectrum.vectors.dtype == spectrum.values.dtype == spectrum.rest.dtype == dtype
    assert spectrum.vectors.shape == (DIM, 12)
    identity = torch.eye(12, dtype=dtype)
    torch.testing.assert_close(spectrum.vectors.T @ spectrum.vectors, identity)
    assert (spectrum.values >= 0).all()
    assert (spectrum.values.diff() <= 0).all()


@pytest.mark.parametrize("rank", [None, 8])
def test_sums_do_not_depend_on_order_or_splitting(rank):
    rows = rows_with(DECAYS["1/i"])
    whole, pieces, reversed_ = (new_moment(DIM, rank, torch.float64, "cpu") for _ in range(3))
    whole.add(rows)
    reversed_.add(rows.flip(0))
    for piece in rows.split(7):
        pieces.add(piece)
    assert_same(pieces.spectrum(), whole.spectrum())
    assert_same(reversed_.spectrum(), whole.spectrum())


@pytest.mark.parametrize("rank", [None, 8])
def test_merging_equals_adding_to_one(rank):
    rows = rows_with(DECAYS["1/i^2"])
    whole, left, right = (new_moment(DIM, rank, torch.float64, "cpu") for _ in range(3))
    whole.add(rows)
    left.add(rows[:20])
    right.add(rows[20:])
    left.merge(right)
    assert_same(left.spectrum(), whole.spectrum())
    torch.testing.assert_close(left.trace, whole.trace)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("true_rank", [1, 3])
def test_rank_deficient_matrix_is_recovered(true_rank, dtype):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(true_rank, DIM, generator=generator, dtype=torch.float64).to(dtype)
    moment = sketched(DIM, 10, dtype)
    moment.add(rows)
    atol = 1e-4 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(moment.spectrum().dense(), rows.T @ rows, rtol=0, atol=atol)


@pytest.mark.parametrize("rank", [None, 10])
def test_zero_matrix(rank):
    moment = new_moment(DIM, rank, torch.float64, "cpu")
    moment.add(torch.zeros(4, DIM).double())
    spectrum = moment.spectrum()
    assert spectrum.dim == DIM
    torch.testing.assert_close(spectrum.dense(), torch.zeros(DIM, DIM).double(), rtol=0, atol=0)


@pytest.mark.parametrize("rank", [None, 10])
def test_scaled_spectrum_is_that_of_the_scaled_matrix(rank):
    moment = new_moment(DIM, rank, torch.float64, "cpu")
    moment.add(rows_with(DECAYS["1/i"]))
    spectrum = moment.spectrum()
    torch.testing.assert_close(spectrum.scaled(0.25).dense(), 0.25 * spectrum.dense())


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_sketch_is_equivariant_to_scale(scale):
    rows = rows_with(DECAYS["exponential"])
    one, other = sketched(DIM, 8), sketched(DIM, 8)
    one.add(rows)
    other.add(rows * scale**0.5)
    expected = one.spectrum().scaled(scale)
    assert_same(other.spectrum(), expected, rtol=1e-6, atol=1e-12 * scale)


def test_new_moment_is_dense_up_to_the_default_limit():
    assert isinstance(new_moment(DENSE_UP_TO, None, torch.float32, "cpu"), DenseMoment)
    moment = new_moment(DENSE_UP_TO + 1, None, torch.float32, "cpu")
    assert isinstance(moment, SketchedMoment)
    assert moment.sketch.shape == (DENSE_UP_TO + 1, 2 * DEFAULT_RANK)
    assert moment.rank == DEFAULT_RANK


def test_new_moment_sketches_sides_longer_than_the_rank():
    assert isinstance(new_moment(10, 10, torch.float32, "cpu"), DenseMoment)
    moment = new_moment(11, 10, torch.float32, "cpu")
    assert isinstance(moment, SketchedMoment)
    assert moment.sketch.shape == (11, 11)
    assert new_moment(50, 10, torch.float32, "cpu").sketch.shape == (50, 20)


def test_new_moment_keeps_a_small_side_dense_whatever_its_length():
    assert isinstance(new_moment(2000, 4, torch.float32, "cpu", small=True), DenseMoment)


@pytest.mark.parametrize("rank", [0, -3, 2.5, True, "8"])
def test_rank_must_be_a_positive_integer(rank):
    with pytest.raises(OptionError, match="rank"):
        new_moment(10, rank, torch.float32, "cpu")
    with pytest.raises(OptionError, match="rank"):
        check_rank(rank)
