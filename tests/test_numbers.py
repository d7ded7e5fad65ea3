"""Numbers that stay numbers: extreme scales, sums over millions, solvers that fail."""

import copy

import pytest
import torch
from models import chunks, kept, mlp_batch, randn, tiny_mlp

from laplace_llm import (
    DiagLoraLaplace,
    EkfacLoraLaplace,
    FullLoraLaplace,
    FunctionalLoraLaplace,
    KronLoraLaplace,
    LowRankLoraLaplace,
)
from laplace_llm.curvature import BatchSummary
from laplace_llm.eigen import cholesky, decomposing, eigh
from laplace_llm.errors import DecompositionError, LaplaceLLMError, OutputError
from laplace_llm.links import quasi_monte_carlo
from laplace_llm.shards import as_shard
from laplace_llm.sketch import DenseMoment, SketchedMoment, new_moment, spectra
from laplace_llm.sums import BLOCK, RunningSum

STRUCTURES = {
    "kron": (KronLoraLaplace, {}),
    "kron, rank 1": (KronLoraLaplace, {"backend_kwargs": {"rank": 1}}),
    "kron, damping": (KronLoraLaplace, {"damping": True}),
    "ekfac": (EkfacLoraLaplace, {}),
    "ekfac, rank 1": (EkfacLoraLaplace, {"backend_kwargs": {"rank": 1}}),
    "lowrank": (LowRankLoraLaplace, {}),
    "diag": (DiagLoraLaplace, {}),
    "full": (FullLoraLaplace, {}),
    "gp": (FunctionalLoraLaplace, {}),
}
PRECISIONS = [1e-8, 1e-4, 1.0, 1e4, 1e8]
SCALES = [0.0, 1e-30, 1.0, 1e30]
ALL = pytest.mark.parametrize("structure", STRUCTURES)
LINEAR = pytest.mark.parametrize("structure", [name for name in STRUCTURES if "damp" not in name])
DTYPE = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["64", "32"])
QUERY = mlp_batch(5, seed=1)[0]


def fitted(structure, dtype=torch.float64, n=6, model=None, **kwargs):
    cls, options = STRUCTURES[structure]
    la = cls(tiny_mlp(dtype) if model is None else model, **options, **kwargs)
    regression = la.likelihood == "regression"
    x, y = mlp_batch(n, regression=regression)
    la.fit(chunks((x.to(dtype), y.to(dtype) if regression else y), 4))
    return la


def scaled(state, scale):
    """Return a curvature's state with all factors, second moments and squared rows scaled."""
    if isinstance(state, torch.Tensor):
        return state * scale
    if isinstance(state, list):
        return [scaled(value, scale) for value in state]
    result = dict(state)
    for key, value in state.items():
        if key == "rows":
            result[key] = value * scale**0.5
        elif key in ("pairs", "outputs", "inputs", "factors", "moments") or key in (
            "matrix", "sketch", "values", "rest", "trace", "lost_trace", "kept", "totals",
        ):  # fmt: skip
            result[key] = scaled(value, scale)
    return result


def rescale(la, scale):
    """Scale the curvature of a fitted posterior: of a Kronecker one, each of its two factors."""
    state = scaled(copy.deepcopy(la._curvature_state()), scale)
    la._set_curvature(la._curvature_from_state(state), merge=False)
    return la


def curvature_of(la):
    """Return the dense curvature (P, P) in float64."""
    if isinstance(la, KronLoraLaplace):
        return la.H.to_matrix()
    if isinstance(la, LowRankLoraLaplace):
        return kept(la.H)
    return la.H if la.H.ndim == 2 else la.H.diag()


def spectrum_of(la):
    """Return the eigenpairs of the dense curvature, with a null space that is one."""
    values, vectors = torch.linalg.eigh(curvature_of(la))
    return torch.where(values > 1e-13 * values[-1], values, 0), vectors


def variances(la, precisions=PRECISIONS):
    """Return covariances (G, B, C, C) of outputs, as predictions and grids have them."""
    query = QUERY.to(la._dtype)
    each = []
    for precision in precisions:
        la.prior_precision = precision
        each.append(la._glm_predictive_distribution(query)[1])
    grid = la.moments_grid(query, torch.tensor(precisions, dtype=torch.float64)).covariance
    return torch.stack(each), grid


def assert_psd_and_monotone(covariances):
    """Check covariances (G, B, C, C) under growing prior precisions, each to its own rounding."""
    assert bool(covariances.isfinite().all())
    rounding = 100 * torch.finfo(covariances.dtype).eps
    covariances = covariances.double()
    size = rounding * covariances.abs().amax((-1, -2))  # (G, B)
    assert bool(((covariances - covariances.mT).abs().amax((-1, -2)) <= size).all())
    assert bool((torch.linalg.eigvalsh(covariances)[..., 0] >= -size).all())
    falls = covariances[:-1] - covariances[1:]
    assert bool((torch.linalg.eigvalsh(falls)[..., 0] >= -size[:-1]).all())


# Predictions --------------------------------------------------------------------------------------


@ALL
@DTYPE
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("n", [1, 6])
def test_variances_are_psd_and_fall_with_the_prior_precision(structure, dtype, scale, n):
    la = rescale(fitted(structure, dtype, n), scale)
    for covariances in variances(la):
        assert_psd_and_monotone(covariances)
    # A precision for each tensor, of all of which only one grows.
    if structure != "full" or scale:
        la.prior_precision = torch.ones(la.n_layers)
        before = la._glm_predictive_distribution(QUERY.to(dtype))[1]
        la.prior_precision = torch.tensor([1.0, 1e8, *[1.0] * (la.n_layers - 2)])
        after = la._glm_predictive_distribution(QUERY.to(dtype))[1]
        assert_psd_and_monotone(torch.stack([before, after]))


@LINEAR
@DTYPE
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e15])
@pytest.mark.parametrize("n", [1, 6])
def test_variances_are_those_of_the_dense_curvature(structure, dtype, scale, n):
    exact = fitted(structure, n=n)
    values, vectors = spectrum_of(exact)
    values = values * (scale**2 if structure.startswith("kron") else scale)
    jacobians = exact._streaming.jacobians(QUERY)[0]
    inside = jacobians @ vectors
    la = rescale(fitted(structure, dtype, n), scale)
    for precision, *found in zip(PRECISIONS, *variances(la), strict=True):
        expected = (inside / (values + precision)) @ inside.mT
        # The weights' prior variance is rounded, and so is what the curvature leaves of it.
        largest = float(jacobians.square().sum(-1).max()) / precision
        atol = 100 * torch.finfo(dtype).eps * largest
        for covariance in found:
            torch.testing.assert_close(covariance.double(), expected, rtol=1e-4, atol=atol)


@LINEAR
@DTYPE
def test_a_certain_model_leaves_the_prior(structure, dtype):
    model = tiny_mlp(dtype)
    model.base_model.model.second.base_layer.bias.data[0] = 1e4  # its probability is exactly one
    la = fitted(structure, dtype, model=model)
    jacobians = la._streaming.jacobians(QUERY.to(dtype))[0]
    for precision in PRECISIONS:
        la.prior_precision = precision
        _, covariance = la._glm_predictive_distribution(QUERY.to(dtype))
        expected = jacobians @ jacobians.mT / precision
        torch.testing.assert_close(covariance, expected, rtol=1e-5, atol=1e-5 / precision)
        assert float(la.log_det_ratio) == pytest.approx(0, abs=1e-7)
        assert bool(la.sample(3).isfinite().all())
        assert bool(la.log_marginal_likelihood().isfinite())
        torch.testing.assert_close(la(QUERY.to(dtype)).sum(1), torch.ones(5, dtype=dtype))
    loader = [(QUERY.to(dtype), torch.zeros(5, dtype=torch.long))]  # any other has no chance at all
    for options in ({"method": "loo"}, {"val_loader": loader}, {"method": "marglik", "n_steps": 3}):
        la.optimize_prior_precision(grid_size=5, **options)
        assert float(la.prior_precision) > 0


@ALL
@DTYPE
@pytest.mark.parametrize("precision", [1e-8, 1e8])
def test_tuning_and_sampling_of_one_example(structure, dtype, precision):
    la = fitted(structure, dtype, n=1, prior_precision=precision)
    assert bool(la.log_marginal_likelihood().isfinite())
    assert bool(la.sample(3).isfinite().all())
    for link in ("qmc", "mean_field", "probit", "mc"):
        probabilities = la(QUERY.to(dtype), link_approx=link)
        torch.testing.assert_close(probabilities.sum(1), torch.ones(5, dtype=dtype))
    la.optimize_prior_precision(method="loo", grid_size=5)
    la.optimize_prior_precision(method="marglik", n_steps=3)
    assert bool(la.prior_precision.isfinite().all())


def test_a_grid_from_the_smallest_to_the_largest_precision():
    la = fitted("kron", torch.float32)
    la.optimize_prior_precision(log_prior_prec_min=-8, log_prior_prec_max=8, grid_size=33)
    assert 1e-8 <= float(la.prior_precision) <= 1e8


# Evidence -----------------------------------------------------------------------------------------


@LINEAR
@DTYPE
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_log_det_ratio_is_a_sum_of_small_numbers(structure, dtype, scale):
    values = spectrum_of(fitted(structure))[0]
    values = values * (scale**2 if structure.startswith("kron") else scale)
    la = rescale(fitted(structure, dtype), scale)
    for precision in PRECISIONS:
        la.prior_precision = precision
        expected = float((values / precision).log1p().sum())
        rtol = 1e-9 if dtype == torch.float64 else 2e-4
        if expected > torch.finfo(dtype).tiny:
            assert float(la.log_det_ratio) == pytest.approx(expected, rel=rtol)
        assert la.log_det_ratio.dtype == dtype
        prior = float(la.prior_precision_diag.double().log().sum())
        total = pytest.approx(expected + prior, rel=1e-4, abs=1e-4)
        assert float(la.log_det_posterior_precision) == total


@pytest.mark.parametrize("structure", ["kron", "ekfac", "lowrank", "diag", "gp"])
def test_log_det_ratio_of_many_weights_in_single_precision(structure):
    """Its error was up to 0.1 here, and 0.03 at a prior precision of 1e8, where it is 1e-4."""
    found = {}
    for dtype in (torch.float64, torch.float32):
        model = tiny_mlp(torch.float64, inputs=600, hidden=600, rank=4).to(dtype)
        la = STRUCTURES[structure][0](model)
        x = randn(12, 600).to(dtype)
        la.fit([(x, torch.arange(12) % 3)])
        assert la.n_params > 7000
        for precision in (1.0, 1e4, 1e8):
            la.prior_precision = precision
            found[dtype, precision] = float(la.log_det_ratio)
    for precision in (1.0, 1e4, 1e8):
        exact = found[torch.float64, precision]
        assert found[torch.float32, precision] == pytest.approx(exact, rel=2e-5)


@ALL
def test_log_det_ratio_has_the_right_gradient(structure):
    la = fitted(structure)

    def ratio(logs):
        la.prior_precision = logs.exp()
        return la.log_det_ratio

    for size in (1, la.n_layers):
        logs = torch.linspace(-1, 1, size, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(ratio, logs)


# Sums over millions -------------------------------------------------------------------------------


def test_a_single_precision_sum_of_many_terms_does_not_stall():
    naive, total = torch.zeros(2), RunningSum(torch.zeros(2))
    term, n = torch.tensor([0.1, 1e-30]), 300_000
    for _ in range(n):
        naive += term
        total.open().add_(term)
    exact = n * term.double()
    relative = (total.total().double() - exact).abs() / exact
    assert bool((relative < 3e-5).all())
    assert float((naive[0] - exact[0]).abs() / exact[0]) > 1e-3


def test_terms_far_below_the_sum_count():
    start = torch.tensor([1e8])  # whose neighbours are 8 apart
    total = RunningSum(start)
    for _ in range(3 * BLOCK):
        total.open().add_(1)
    assert float(total.total()) == pytest.approx(1e8 + 3 * BLOCK, abs=8)
    assert float(torch.tensor([1e8]) + 1) == 1e8


def test_a_running_sum_takes_a_second_tensor_when_it_needs_one():
    total = RunningSum(torch.zeros(3))
    for terms in range(1, 2 * BLOCK + 3):
        total.open().add_(1)
        assert len(total.parts()) == (1 if terms <= BLOCK else 2)
    assert total.total().tolist() == [2 * BLOCK + 2] * 3
    assert len(total.parts()) == 1
    exact = RunningSum(torch.ones(1, dtype=torch.float64))
    for _ in range(2 * BLOCK):
        exact.open().add_(1)
    assert len(exact.parts()) == 1
    assert float(exact.total()) == 2 * BLOCK + 1


@pytest.mark.parametrize("dim", [4, 40], ids=["dense", "sketched"])
def test_moments_go_on_where_they_are_large(dim):
    rows = randn(64, dim)
    moments = [new_moment(dim, 4, dtype, "cpu") for dtype in (torch.float32, torch.float64)]
    for moment, dtype in zip(moments, (torch.float32, torch.float64), strict=True):
        moment.add(2**13 * rows.to(dtype))  # 2^26 times the second moment
        moment.tensors()  # as when they are added up, or saved
        large = [tensor.clone() for tensor in moment.tensors()]
        for _ in range(64):
            moment.add(rows.to(dtype))
        assert all(
            not torch.equal(before, after)
            for before, after in zip(large, moment.tensors(), strict=True)
        )
    found, exact = ([t.double() for t in moment.tensors()] for moment in moments)
    for left, right in zip(found, exact, strict=True):
        # Within two units of the sum's last place: of 64 terms of a quarter each.
        torch.testing.assert_close(left, right, rtol=2 * 2**-23, atol=2**-23 * right.abs().max())


@pytest.mark.parametrize("structure", ["kron", "kron, rank 1", "ekfac", "diag", "full"])
def test_a_fit_goes_on_where_sums_are_large(structure):
    """The sums are 2^25 times what a batch adds, which float32 cannot tell from nothing."""
    la, (x, y), n = fitted(structure, torch.float32), mlp_batch(2), 256
    batch = x.float(), y
    la.fit([batch])
    state = la._curvature_from_state(scaled(la._curvature_state(), 2.0**25))
    accumulate = la._accumulate
    if structure.startswith("ekfac"):
        accumulate, state = la._streaming.accumulate_eigenvalues, copy.deepcopy(la.H_moments)
        for tensor in state.tensors():
            tensor *= 2.0**25
    before = [tensor.double().clone() for tensor in tensors_of(state)]
    with la._borrowed():
        for _ in range(n):
            accumulate(state, *batch)
    for old, new in zip(before, tensors_of(state), strict=True):
        unit = float(old.abs().max()) * 2**-23
        torch.testing.assert_close(new - old, n * old / 2**25, rtol=0, atol=4 * unit)
        assert float((new - old).abs().max()) > 32 * unit


def tensors_of(state):
    return [state] if isinstance(state, torch.Tensor) else state.tensors()


def test_saving_running_sums_midway_changes_nothing():
    """A fit that goes on from a saved state ends with the same bits as one that was only saved."""
    la, (x, y) = fitted("kron, rank 1", torch.float32), mlp_batch(6)
    batches = chunks((x.float(), y), 1)
    state = la._empty_curvature()
    with la._borrowed():
        for index in range(BLOCK + 3):
            if index == 700:
                resumed = la._empty_curvature().load(copy.deepcopy(state.state()))
            la._accumulate(state, *batches[index % 6])
            if index >= 700:
                la._accumulate(resumed, *batches[index % 6])
    for left, right in zip(state.tensors(), resumed.tensors(), strict=True):
        assert torch.equal(left, right)


def test_the_loss_does_not_stall():
    la, (x, y) = fitted("diag", torch.float32), mlp_batch(1)
    losses = iter([2.0**24, *[1.0] * 10])

    def accumulate(state, x, y):
        return BatchSummary(torch.tensor(next(losses)), 3)

    shard = as_shard([(x.float(), y)] * 11)
    sums = la._sums_over(shard, lambda: None, accumulate, "", False, None)
    assert float(sums.loss) == 2**24 + 10
    assert sums.loss.dtype == torch.float32


# Overflow -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["kron", "kron, rank 1", "ekfac", "diag", "full"])
def test_overflow_names_the_tensor_and_keeps_the_posterior(structure):
    la = fitted(structure, torch.float32, likelihood="regression")
    before, (x, y) = la.H, mlp_batch(4, regression=True)
    la.tensors[-1].weight.data *= 1e25  # the gradient of lora_A before it is finite; no square is
    with pytest.raises(OutputError, match=r"finite curvature.*'\S*lora_A\S*'"):
        la.fit([(x.float(), y.float())])
    assert la.H is before


def test_factors_whose_product_overflows_are_no_error():
    la, (x, y) = fitted("kron", torch.float32), mlp_batch(4)
    state = la._curvature_from_state(scaled(la._curvature_state(), 1e30))
    with la._borrowed():
        la._accumulate(state, x.float(), y)
    la._set_curvature(state, merge=False)
    assert bool(la.log_det_ratio.isfinite())
    assert_psd_and_monotone(variances(la)[0])


def test_rows_whose_squares_overflow_are_no_error():
    la = rescale(fitted("lowrank", torch.float32), 1e60)
    assert float(la.H.trace) > 1e38
    la.H.add(next(iter(la.H.store.parts())))
    assert bool(la.H.trace.isfinite())


def test_a_factor_with_no_full_rank_has_a_null_space_in_single_precision():
    rows = randn(3, 40).float()
    moments = [new_moment(40, rank, torch.float32, "cpu") for rank in (None, 8)]
    for moment in moments:
        for row in rows.split(1):
            moment.add(1e15 * row)
    assert isinstance(moments[0], DenseMoment)
    assert isinstance(moments[1], SketchedMoment)
    for spectrum in spectra(moments):
        assert int((spectrum.values > 0).sum()) == 3
        assert float(spectrum.rest) == 0
        expected = 1e30 * rows.T @ rows
        torch.testing.assert_close(spectrum.dense(), expected, rtol=0, atol=1e-5 * expected.max())


# Solvers that fail --------------------------------------------------------------------------------


def failing(solver, monkeypatch, works=lambda matrix: False, result=None):
    """Let a solver of torch fail (or return something) but where it works."""
    original, calls = getattr(torch.linalg, solver), []

    def attempt(matrix, *args, **kwargs):
        calls.append(matrix.dtype)
        if works(matrix):
            return original(matrix, *args, **kwargs)
        if result is not None:
            return result(original(matrix, *args, **kwargs))
        raise torch.linalg.LinAlgError("linalg: The algorithm failed to converge.")

    monkeypatch.setattr(torch.linalg, solver, attempt)
    return calls


@pytest.mark.parametrize("how", ["raises", "returns NaN"])
def test_a_failed_decomposition_is_retried_in_float64(how, monkeypatch):
    matrix = randn(5, 5).float()
    matrix = matrix @ matrix.T
    nan = (lambda pair: [part * torch.nan for part in pair]) if how == "returns NaN" else None
    calls = failing("eigh", monkeypatch, lambda m: m.dtype == torch.float64, nan)
    values, vectors = eigh(matrix, "a matrix")
    assert calls == [torch.float32, torch.float64]
    assert values.dtype == vectors.dtype == torch.float32
    torch.testing.assert_close((vectors * values) @ vectors.T, matrix, rtol=1e-5, atol=1e-5)


def test_a_decomposition_that_always_fails_is_an_error_of_ours(monkeypatch):
    calls = failing("eigh", monkeypatch)
    with pytest.raises(
        DecompositionError, match=r"decomposition of the GGN.*CPU.*converge.*larger"
    ):
        eigh(torch.eye(2), "the GGN")
    assert len(calls) == 2


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("decompose", [eigh, cholesky])
def test_a_matrix_that_is_not_finite_is_an_error_of_ours(decompose, bad):
    with pytest.raises(DecompositionError, match="finite numbers in the GGN"):
        decompose(torch.full((2, 2), bad), "the GGN")


def test_a_matrix_that_is_not_positive_definite_is_an_error_of_ours():
    with pytest.raises(DecompositionError, match=r"decomposition of K.*not positive-definite"):
        cholesky(-torch.eye(2), "K")
    with pytest.raises(DecompositionError, match="decomposition of K"), decomposing("K"):
        torch.linalg.solve(torch.zeros(2, 2), torch.ones(2))
    with pytest.raises(torch.linalg.LinAlgError):  # as existing code expects
        cholesky(-torch.eye(2), "K")


def test_other_errors_of_a_solver_are_not_retried():
    with pytest.raises(RuntimeError, match="square") as caught:
        eigh(torch.ones(2, 3), "K")
    assert not isinstance(caught.value, LaplaceLLMError)


@ALL
def test_a_failing_solver_never_ends_the_process(structure, monkeypatch):
    la = fitted(structure)
    la.prior_precision = 2.0
    expected, before = la(QUERY), la.H
    with monkeypatch.context() as context:
        failing("eigh", context)
        if structure not in ("diag", "full"):  # these decompose nothing in fit
            with pytest.raises(DecompositionError, match="Expected a decomposition of"):
                la.fit([mlp_batch(4)])
            assert la.H is before
        la.prior_precision = torch.linspace(1, 2, la.n_layers)
        if structure in ("full", "lowrank", "gp"):
            for call in (lambda: la(QUERY), lambda: la.sample(1), lambda: la.log_det_ratio):
                with pytest.raises(DecompositionError):
                    call()
        la.prior_precision = 2.0
    torch.testing.assert_close(la(QUERY), expected, rtol=0, atol=0)


def test_covariances_without_a_root_are_an_error_of_ours():
    mean = torch.zeros(1, 3)
    with pytest.raises(DecompositionError, match="covariance of outputs"):
        quasi_monte_carlo(mean, torch.full((1, 3, 3), torch.inf))
    la = fitted("kron", torch.float32)
    with pytest.raises(DecompositionError, match="outputs' covariance"):
        la._glm_functional_samples(mean, torch.full((1, 3, 3), torch.nan), 4)
