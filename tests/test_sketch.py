"""Streaming second moments: exact and sketched."""

import pytest
import torch

from laplace_llm.errors import OptionError
from laplace_llm.options import check_optional_count
from laplace_llm.sketch import (
    DEFAULT_RANK,
    DenseMoment,
    SketchedMoment,
    new_moment,
    spectra,
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
    return SketchedMoment(torch.zeros(dim, columns, dtype=dtype), torch.zeros((), dtype=dtype))


def spectrum_of(moment):
    return spectra([moment])[0]


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
    spectrum = spectrum_of(moment)
    torch.testing.assert_close(spectrum.dense(), rows.T @ rows, rtol=1e-8, atol=1e-13)
    torch.testing.assert_close(moment.trace, DECAYS[decay].sum())
    assert spectrum.rest == 0


@pytest.mark.parametrize("decay", DECAYS)
def test_sketch_of_full_width_is_exact(decay):
    rows = rows_with(DECAYS[decay])
    moment = sketched(DIM, rank=DIM)
    moment.add(rows)
    torch.testing.assert_close(spectrum_of(moment).dense(), rows.T @ rows, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rank", [3, 8, 16])
@pytest.mark.parametrize("decay", DECAYS)
def test_error_is_near_that_of_the_best_approximation_of_the_rank(decay, rank, dtype):
    eigenvalues = DECAYS[decay]
    rows = rows_with(eigenvalues)
    moment = sketched(DIM, rank, dtype)
    moment.add(rows.to(dtype))
    spectrum = spectrum_of(moment)
    kept = (spectrum.vectors * spectrum.values) @ spectrum.vectors.T
    error = nuclear_norm(rows.T @ rows - kept.double())
    # The expected error is at most this multiple of the best one (Tropp et al. 2017, theorem 4.2).
    # It is of the truncated approximation, which the one kept whole is never worse than.
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
    spectrum = spectrum_of(moment)
    k = len(spectrum.values)
    assert k == moment.shape[1]
    total = spectrum.values.sum() + spectrum.rest * (DIM - k)
    rtol = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(total, rows.square().sum(), rtol=rtol, atol=0)
    torch.testing.assert_close(moment.trace, rows.double().square().sum(), rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_spectrum_has_orthonormal_vectors_and_falling_non_negative_values(dtype):
    moment = sketched(DIM, 12, dtype)
    moment.add(rows_with(DECAYS["exponential"]).to(dtype))
    spectrum = spectrum_of(moment)
    assert spectrum.vectors.dtype == spectrum.values.dtype == spectrum.rest.dtype == dtype
    assert spectrum.vectors.shape == (DIM, 24)
    # Below rounding there is nothing to tell directions by: such columns are zero.
    kept = spectrum.vectors.norm(dim=0) > 0
    assert 12 <= kept.sum() <= 24
    identity = torch.diag(kept.to(dtype))
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
    assert_same(spectrum_of(pieces), spectrum_of(whole))
    assert_same(spectrum_of(reversed_), spectrum_of(whole))


@pytest.mark.parametrize("rank", [None, 8])
def test_merging_equals_adding_to_one(rank):
    rows = rows_with(DECAYS["1/i^2"])
    whole, left, right = (new_moment(DIM, rank, torch.float64, "cpu") for _ in range(3))
    whole.add(rows)
    left.add(rows[:20])
    right.add(rows[20:])
    left.merge(right)
    assert_same(spectrum_of(left), spectrum_of(whole))
    torch.testing.assert_close(left.trace, whole.trace)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("true_rank", [1, 3])
def test_rank_deficient_matrix_is_recovered(true_rank, dtype):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(true_rank, DIM, generator=generator, dtype=torch.float64).to(dtype)
    moment = sketched(DIM, 10, dtype)
    moment.add(rows)
    atol = 1e-4 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(spectrum_of(moment).dense(), rows.T @ rows, rtol=0, atol=atol)


@pytest.mark.parametrize("rank", [None, 10])
def test_zero_matrix(rank):
    moment = new_moment(DIM, rank, torch.float64, "cpu")
    moment.add(torch.zeros(4, DIM).double())
    spectrum = spectrum_of(moment)
    assert spectrum.dim == DIM
    torch.testing.assert_close(spectrum.dense(), torch.zeros(DIM, DIM).double(), rtol=0, atol=0)


@pytest.mark.parametrize("rank", [None, 10])
def test_scaled_spectrum_is_that_of_the_scaled_matrix(rank):
    moment = new_moment(DIM, rank, torch.float64, "cpu")
    moment.add(rows_with(DECAYS["1/i"]))
    spectrum = spectrum_of(moment)
    torch.testing.assert_close(spectrum.scaled(0.25).dense(), 0.25 * spectrum.dense())


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_sketch_is_equivariant_to_scale(scale):
    rows = rows_with(DECAYS["exponential"])
    one, other = sketched(DIM, 8), sketched(DIM, 8)
    one.add(rows)
    other.add(rows * scale**0.5)
    expected = spectrum_of(one).scaled(scale)
    assert_same(spectrum_of(other), expected, rtol=1e-6, atol=1e-12 * scale)


@pytest.mark.parametrize("rank", [None, 10])
def test_new_moment_is_dense_up_to_twice_the_rank(rank):
    columns = 2 * (DEFAULT_RANK if rank is None else rank)
    assert isinstance(new_moment(columns, rank, torch.float32, "cpu"), DenseMoment)
    moment = new_moment(columns + 1, rank, torch.float32, "cpu")
    assert isinstance(moment, SketchedMoment)
    assert moment.sketch.shape == (columns + 1, columns)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("decay", DECAYS)
def test_eigenpairs_take_the_sketchs_place_and_give_it_back(decay, dtype):
    rows = rows_with(DECAYS[decay]).to(dtype)
    moment = sketched(DIM, 8, dtype)
    moment.add(rows[:40])
    before = moment.sketch.clone()
    spectrum = spectrum_of(moment)
    assert moment.spectrum is spectrum
    assert spectrum_of(moment) is spectrum  # not computed again
    atol = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(moment.sketch, before, rtol=0, atol=atol * float(before.norm()))
    moment.add(rows[40:])
    assert moment.spectrum is None
    whole = sketched(DIM, 8, dtype)
    whole.add(rows)
    torch.testing.assert_close(moment.sketch, whole.sketch, rtol=0, atol=atol * before.norm())
    torch.testing.assert_close(moment.trace, whole.trace)


def test_spectra_of_many_are_those_of_each(monkeypatch):
    def moments():
        made = []
        for index, (dim, rank) in enumerate([(DIM, 8), (DIM, 8), (9, 8), (DIM, 5), (9, 8)]):
            moment = new_moment(dim, rank, torch.float64, "cpu")
            moment.add(rows_with(DECAYS["exponential"][:dim], seed=index))
            made.append(moment)
        return [*made, made[0]]

    alone = [spectrum_of(moment) for moment in moments()]
    together = spectra(moments())
    monkeypatch.setattr("laplace_llm.sketch.WORKSPACE_BYTES", 7 * 8 * 16)  # a few rows at a time
    in_pieces = spectra(moments())
    assert together[0] is together[-1]
    for one, two, three in zip(alone, together, in_pieces, strict=True):
        assert_same(two, one)
        assert_same(three, one)


def test_new_moment_keeps_a_small_side_dense_whatever_its_length():
    assert isinstance(new_moment(2000, 4, torch.float32, "cpu", small=True), DenseMoment)


@pytest.mark.parametrize("rank", [0, -3, 2.5, True, "8"])
def test_rank_must_be_a_positive_integer(rank):
    with pytest.raises(OptionError, match="rank"):
        new_moment(10, rank, torch.float32, "cpu")
    with pytest.raises(OptionError, match="rank"):
        check_optional_count("rank", rank)
