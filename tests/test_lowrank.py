"""The low-rank algebra and posterior, and lora_B alone, against dense linear algebra."""

import io
import math

import laplace
import mpmath
import pytest
import torch
from laplace.curvature import CurvlinopsGGN
from models import (
    bruteforce_jacobians,
    chunks,
    decaying_rows,
    explicit_ggn,
    frozen,
    gather,
    kept,
    mlp_batch,
    randn,
    snapshot,
    tiny_mlp,
)
from peft import LoraConfig
from torch.nn import functional as F

import laplace_llm
from laplace_llm import LowRankLoraLaplace, StreamingEF
from laplace_llm.errors import OptionError, StateError
from laplace_llm.lowrank import LowRankPrecision

EXACT = {"rtol": 1e-8, "atol": 1e-10}
SIZES = [8, 10, 6]
P = sum(SIZES)
PLACES = pytest.mark.parametrize("place", [None, "cpu", "disk"])

# Algebra ------------------------------------------------------------------------------------------

ROWS = {
    "few": decaying_rows(7, P, 1),
    "more than weights": decaying_rows(60, P, 1),
    "repeated": decaying_rows(5, P, 1).repeat(3, 1),
    "zeros": torch.zeros(3, P).double(),
    "none": torch.zeros(0, P).double(),
}
DELTAS = {
    "scalar": torch.tensor([0.3]).double(),
    "tensor": torch.tensor([0.3, 1.7, 0.05]).double(),
    "weight": torch.linspace(0.1, 2, P).double(),
}
JACOBIANS = randn(4, 3, P, seed=2)
FACTOR = 0.7
ALGEBRA = pytest.mark.parametrize("known", [False, True])
EACH_DELTA = pytest.mark.parametrize("deltas", DELTAS.values(), ids=DELTAS)
EACH_ROWS = pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)


def precision(rows, deltas, known=False, factor=FACTOR, ggn=None):
    """`known`: with the spectrum and Grams given, as the structure does."""
    ggn = gather(rows, SIZES) if ggn is None else ggn
    extra = (torch.linalg.eigh(ggn.gram()), ggn.grams()) if known else ()
    return LowRankPrecision(ggn, factor, deltas, *extra)


def blocks(jacobians=JACOBIANS):
    return jacobians.split(SIZES, -1)


def prior(deltas):
    return deltas if len(deltas) == P else deltas.expand(3).repeat_interleave(torch.tensor(SIZES))


@ALGEBRA
@EACH_DELTA
@EACH_ROWS
def test_algebra_equals_the_dense_matrix(rows, deltas, known):
    low_rank = precision(rows, deltas, known)
    dense = FACTOR * rows.T @ rows + prior(deltas).diag()
    torch.testing.assert_close(low_rank.to_matrix(), dense, **EXACT)
    expected = JACOBIANS @ torch.linalg.inv(dense) @ JACOBIANS.mT
    torch.testing.assert_close(low_rank.variance(blocks()), expected, **EXACT)
    ratio = torch.logdet(dense) - prior(deltas).log().sum()
    torch.testing.assert_close(low_rank.logdet_ratio(), ratio, **EXACT)
    scales = torch.tensor([1e-3, 1.0, 40.0]).double()
    for scale, variance in zip(scales, low_rank.variance_grid(blocks(), scales), strict=True):
        scaled = precision(rows, scale * deltas, known).variance(blocks())
        torch.testing.assert_close(variance, scaled, rtol=1e-8, atol=1e-10)


@ALGEBRA
@EACH_DELTA
@EACH_ROWS
def test_logdet_gradients_equal_those_of_the_dense_matrix(rows, deltas, known):
    """Also where eigenvalues are repeated."""
    deltas, factor = deltas.clone().requires_grad_(), torch.tensor(FACTOR).double().requires_grad_()
    result = precision(rows, deltas, known, factor).logdet_ratio()
    expected = torch.logdet(factor * rows.T @ rows + prior(deltas).diag())
    expected = expected - prior(deltas).log().sum()
    for value in (deltas, factor):
        (gradient,) = torch.autograd.grad(result, value, retain_graph=True)
        (truth,) = torch.autograd.grad(expected, value, retain_graph=True)
        torch.testing.assert_close(gradient, truth, **EXACT)


@ALGEBRA
@EACH_DELTA
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_logdet_of_repeated_rows_under_a_weak_prior(dtype, deltas, known):
    """A Gram's rounding, over the prior precision, is far below -1."""
    rows, deltas = (1e6 * decaying_rows(8, P, 1)).to(dtype), 1e-6 * deltas
    repeated = precision(rows.repeat(3, 1), deltas, known).logdet_ratio()
    whitened = torch.linalg.svdvals(rows.double() / prior(deltas).sqrt())
    expected = (FACTOR * 3 * whitened.square()).log1p().sum()
    torch.testing.assert_close(repeated, expected, rtol=1e-8, atol=0)


@ALGEBRA
@EACH_DELTA
def test_gradients_in_the_prior_precision(deltas, known):
    ggn = gather(ROWS["few"], SIZES)
    value = deltas.clone().requires_grad_()

    def both(value):
        low_rank = precision(None, value, known, ggn=ggn)
        return low_rank.logdet_ratio(), low_rank.variance(blocks(JACOBIANS[:2]))

    assert torch.autograd.gradcheck(both, value)


@EACH_DELTA
@EACH_ROWS
def test_samples_have_the_covariance_of_the_dense_matrix(rows, deltas):
    low_rank, n = precision(rows, deltas), 4000
    samples = low_rank.sample(n, torch.Generator().manual_seed(0))
    white = samples @ torch.linalg.cholesky(low_rank.to_matrix())
    identity = torch.eye(P).double()
    assert (white.mean(0).abs() <= 6 * n**-0.5).all()
    assert ((white.T @ white / n - identity).abs() <= 6 * ((identity + 1) / n) ** 0.5).all()


def exact_moments(rows, jacobians, delta):
    """Return ``J P^-1 J^T`` and ``log det P - log det D`` with 60 digits."""
    with mpmath.workdps(60):
        rows, jacobians = (mpmath.matrix(m.tolist()) for m in (rows, jacobians))
        matrix = FACTOR * (rows.T * rows) + delta * mpmath.eye(P)
        variance = (jacobians * mpmath.inverse(matrix) * jacobians.T).tolist()
        ratio = mpmath.log(mpmath.det(matrix)) - P * mpmath.log(delta)
        return torch.tensor([[float(v) for v in row] for row in variance]).double(), float(ratio)


@pytest.mark.parametrize("delta", [1e-8, 1e-4, 1.0, 1e4, 1e8])
@pytest.mark.parametrize(("decades", "rounding"), [(3, 0.01), (6, 0.1)])
def test_rows_of_very_different_scale(decades, rounding, delta):
    """Rows of 1e-3 to 1e3 are resolved to 1 %; of 1e-6 to 1e6, the least curvature may be lost.

    A float64 Gram has no eigenvalues below ``floor``. Losing them costs at most a part
    ``floor / (1 + floor)`` of the prior variance, on the safe side. Near the floor, eigenvectors
    are orthonormal to 1 / rank only, and so `rounding` is a part of the prior variance.
    """
    rows = decaying_rows(13, P, 2 * decades) * 10**decades
    jacobians = torch.cat([randn(3, P, seed=2), F.normalize(rows)])
    low_rank = precision(rows, torch.tensor([delta]).double())
    variance = low_rank.variance(blocks(jacobians[None]))[0]
    expected, ratio = exact_moments(rows, jacobians, delta)
    values, exact = variance.diagonal(), expected.diagonal()
    floor = 2 * 13 * 2.2e-16 * torch.linalg.matrix_norm(rows, 2).item() ** 2 / delta * FACTOR
    unseen = (jacobians.square().sum(1) / delta) * floor / (1 + floor)
    assert (values >= exact * (1 - rounding)).all()
    assert (values <= exact + unseen + jacobians.square().sum(1) / delta * rounding).all()
    if decades == 3:
        assert (values <= exact * (1 + rounding) + unseen).all()
    logdet = low_rank.logdet_ratio().item()
    assert ratio - 13 * min(floor, 3) - 1e-6 <= logdet <= ratio + 0.01
    torch.testing.assert_close(variance, variance.T, rtol=1e-10, atol=1e-12 / delta)
    assert torch.linalg.eigvalsh(variance)[0] >= -1e-12 * values.max()


@pytest.mark.parametrize("deltas", [torch.ones(1), torch.ones(3), torch.ones(P)])
def test_variance_falls_with_the_prior_precision(deltas):
    rows, scales = decaying_rows(13, P, 12) * 1e6, torch.logspace(-8, 8, 33).double()
    grid = precision(rows, deltas.double()).variance_grid(blocks(), scales)
    assert (torch.linalg.eigvalsh(grid[:-1] - grid[1:]) >= -1e-12 * grid[:-1].amax()).all()


def test_single_precision_resolves_six_decades_of_curvature():
    """Its products alone would lose all curvature below 1e-7 of the largest, times the rank."""
    sizes, n = [200, 300, 100], 100
    left, right = torch.linalg.qr(randn(n, n))[0], torch.linalg.qr(randn(600, n, seed=1))[0]
    values = torch.logspace(3, -3, n).double()
    rows = ((left * values.sqrt()) @ right.T).float()
    jacobians = (randn(10, n, seed=2) @ rows.double() / n**0.5 + 0.01 * randn(10, 600)).float()
    low_rank = LowRankPrecision(gather(rows, sizes), 1.0, torch.full((3,), 1e-2))
    exact = torch.linalg.svd(rows.double())
    weights = torch.cat([exact.S.square(), torch.zeros(500).double()]) + 1e-2
    expected = ((jacobians.double() @ exact.Vh.T).square() / weights).sum(1)
    variance = low_rank.variance([j[:, None] for j in jacobians.split(sizes, 1)]).double()
    torch.testing.assert_close(variance.flatten(), expected, rtol=1e-3, atol=0)
    ratio = (weights / 1e-2).log().sum()
    torch.testing.assert_close(low_rank.logdet_ratio(), ratio, rtol=1e-6, atol=0)


# Posterior ----------------------------------------------------------------------------------------

X, Y = mlp_batch(30)
MIXED = {"temperature": 0.5, "prior_precision": 0.8}


def fitted(structure="lowrank", model=None, **kwargs):
    model = tiny_mlp() if model is None else model
    la = laplace.Laplace(model, "classification", "lora", structure, **{**MIXED, **kwargs})
    la.fit(chunks((X, Y), 8))
    return la


def variance_of(la):
    return la._glm_predictive_distribution(X)[1]


def test_both_factories_build_it():
    for factory in (laplace.Laplace, laplace_llm.Laplace):
        la = factory(
            tiny_mlp(), "classification", subset_of_weights="lora", hessian_structure="lowrank"
        )
        assert type(la) is LowRankLoraLaplace


def test_truncation_only_loses_information_and_less_with_more_rank():
    exact = fitted("full")
    jacobians, expected = bruteforce_jacobians(exact.model, X, exact.tensors), variance_of(exact)
    prior_variance = jacobians.square().sum(2) / 0.8
    lost = []
    for max_rank in (1, 2, 4, 8, 16, 32, exact.n_params, None):
        la = fitted(max_rank=max_rank)
        excess = variance_of(la) - expected
        assert (torch.linalg.eigvalsh(excess) >= -1e-10).all()
        # P^-1 - P_exact^-1 is at most h times what was lost, between two prior covariances.
        bound = la.H.lost_trace / 0.5 * prior_variance / 0.8
        assert (excess.diagonal(dim1=1, dim2=2) <= bound + 1e-10).all()
        lost.append(float(la.H.lost_trace))
        torch.testing.assert_close(la.H.trace, exact.H.trace(), **EXACT)
        curvature = kept(la.H).trace() + la.H.lost_trace
        torch.testing.assert_close(curvature, exact.H.trace(), **EXACT)
    assert lost == sorted(lost, reverse=True)
    assert lost[0] > 0.1 * float(exact.H.trace())
    torch.testing.assert_close(variance_of(la), expected, **EXACT)
    assert lost[-2] < 1e-10
    assert lost[-1] == 0


def test_empirical_fisher():
    la = fitted(backend=StreamingEF)
    residuals = torch.softmax(la.model(X).detach(), 1) - F.one_hot(Y, 3)
    jacobians = bruteforce_jacobians(la.model, X, la.tensors)
    rows = torch.einsum("nc,ncp->np", residuals, jacobians)
    torch.testing.assert_close(kept(la.H), rows.T @ rows, **EXACT)
    assert la.H.rank == 30


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_rank": 0}, "max_rank.*got 0"),
        ({"max_rank": -1}, "max_rank.*got -1"),
        ({"max_rank": True}, "max_rank.*got True"),
        ({"max_rank": 2.5}, r"max_rank.*got 2\.5"),
        ({"factors_on": "gpu"}, "factors_on.*got 'gpu'"),
        ({"factors_on": True}, "factors_on.*got True"),
        ({"backend": CurvlinopsGGN}, "CurvlinopsGGN.*rows.*StreamingGGN"),
        ({"tensors": "A"}, "tensors='B'.*got 'A'"),
        ({"tensors": None}, "tensors='B'.*got None"),
    ],
)
def test_bad_options_leave_the_model_alone(kwargs, message):
    model = tiny_mlp()
    before = snapshot(model)
    with pytest.raises(OptionError, match=message):
        LowRankLoraLaplace(model, **kwargs)
    assert snapshot(model) == before


@PLACES
@pytest.mark.parametrize(("saved", "loaded"), [(6, 6), (None, None), (6, 20), (6, None), (20, 6)])
def test_saving_truncated_posteriors(saved, loaded, place):
    la = fitted(max_rank=saved, prior_precision=torch.linspace(0.5, 2, 4).double())
    file = io.BytesIO()
    torch.save(la.state_dict(), file)
    file.seek(0)
    other = LowRankLoraLaplace(tiny_mlp(), max_rank=loaded, factors_on=place)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.prior_precision, la.prior_precision)
    torch.testing.assert_close(other.H.trace, la.H.trace)
    torch.testing.assert_close(kept(other.H).trace() + other.H.lost_trace, la.H.trace)
    if (saved, loaded) == (20, 6):
        assert other.H.rank == 6
        assert other.H.lost_trace > la.H.lost_trace
    else:
        assert torch.equal(other.H.lost_trace, la.H.lost_trace)
        assert torch.equal(other(X), la(X))
        assert torch.equal(other.log_marginal_likelihood(), la.log_marginal_likelihood())
    other.fit([(X, Y)], override=False)
    assert other.n_data == 60
    torch.testing.assert_close(other.H.trace, 2 * la.H.trace)


def test_states_of_other_weights_are_refused():
    def second():
        model = tiny_mlp()
        model.add_adapter("second", LoraConfig(r=2, target_modules=["first", "second"]))
        model.set_adapter("second")
        return model

    la = fitted(max_rank=6)
    before = frozen(la.state_dict())
    others = [
        fitted(model=second()),
        fitted(model=tiny_mlp(targets=("first",))),
        fitted(model=tiny_mlp(rank=3)),
        fitted(tensors="B"),
        fitted("diag"),
    ]
    for other in others:
        state = other.state_dict()
        with pytest.raises(StateError):
            la.load_state_dict(state)
        with pytest.raises(StateError):
            other.load_state_dict(la.state_dict())
        assert frozen(other.state_dict()) == frozen(state)
    with pytest.raises(StateError, match="rows of 38 weights"):
        la.load_state_dict({**la.state_dict(), "H": fitted(tensors="B").H.state()})
    assert frozen(la.state_dict()) == before


# lora_B alone -------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["full", "kron", "diag", "lowrank"])
def test_posterior_over_lora_b_alone(structure):
    model = tiny_mlp()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)
        parameter.grad = torch.full_like(parameter, float(index))
    before = snapshot(model)
    la = fitted(structure, model, tensors="B")
    variance = variance_of(la)
    assert snapshot(model) == before
    assert [t.name for t in la.tensors] == [n for n, _ in model.named_parameters() if "lora_B" in n]
    assert la.n_params == sum(t.weight.numel() for t in la.tensors) == 18

    jacobians = bruteforce_jacobians(model, X, la.tensors)
    if structure == "kron":  # the factors of the same tensors in a posterior over all
        pairs = zip(fitted("kron").H_facs.pairs, fitted("kron").tensors, strict=True)
        dense = [(p.outputs.matrix, p.inputs.matrix / 30) for p, t in pairs if t.role == "B"]
        curvature = torch.block_diag(*(torch.kron(*pair) for pair in dense))
    else:
        curvature = explicit_ggn(jacobians, model(X).detach())
        curvature = curvature.diagonal().diag() if structure == "diag" else curvature
    matrix = curvature / 0.5 + 0.8 * torch.eye(18).double()
    expected = jacobians @ torch.linalg.inv(matrix) @ jacobians.mT
    torch.testing.assert_close(variance, expected, **EXACT)
    ratio = torch.logdet(matrix) - 18 * math.log(0.8)
    torch.testing.assert_close(la.log_det_ratio, ratio, **EXACT)
    assert la.sample(2).shape == (2, 18)


@pytest.mark.parametrize("structure", ["full", "kron", "diag", "lowrank"])
@pytest.mark.parametrize("value", ["A", "BA", "", None, True])
def test_other_values_of_tensors_are_refused(structure, value):
    with pytest.raises(OptionError, match="tensors='AB' or tensors='B'"):
        fitted(structure, tensors=value)
