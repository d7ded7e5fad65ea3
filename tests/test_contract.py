"""One contract for all structures over all heads, against dense linear algebra."""

import io
import math
from functools import lru_cache
from typing import NamedTuple

import pytest
import torch
from laplace.curvature import AsdlGGN, CurvlinopsGGN
from laplace.utils import RunningNLLMetric
from models import (
    HEADS,
    bruteforce_jacobians,
    by_size,
    chunks,
    explicit_ggn,
    inputs_of,
    labels_of,
    letter_batch,
    mlp_batch,
    pair_batch,
    refitted_blocks,
    select,
    tiny_bert_classifier,
    tiny_mlp,
)
from torch.nn import functional as F

from laplace_llm import (
    DiagLoraLaplace,
    EkfacLoraLaplace,
    FullLoraLaplace,
    FunctionalLoraLaplace,
    KronLoraLaplace,
    LowRankLoraLaplace,
    StreamingEF,
)
from laplace_llm.errors import NotFittedError, PriorError, StateError
from laplace_llm.links import quasi_monte_carlo
from laplace_llm.moments import slices
from laplace_llm.sketch import spectra

EXACT = {"rtol": 1e-8, "atol": 1e-10}
STRUCTURES = {
    "kron": (KronLoraLaplace, {}),
    "kron, rank 2": (KronLoraLaplace, {"backend_kwargs": {"rank": 2}}),
    "kron, damping": (KronLoraLaplace, {"damping": True}),
    "kron, expand": (KronLoraLaplace, {"backend_kwargs": {"kfac_approx": "expand"}}),
    "diag": (DiagLoraLaplace, {}),
    "full": (FullLoraLaplace, {}),
    "lowrank": (LowRankLoraLaplace, {}),
    "lowrank, disk": (LowRankLoraLaplace, {"factors_on": "disk"}),
    "kron, B": (KronLoraLaplace, {"tensors": "B"}),
    "lowrank, B": (LowRankLoraLaplace, {"tensors": "B"}),
    "diag, B": (DiagLoraLaplace, {"tensors": "B"}),
    "ekfac": (EkfacLoraLaplace, {}),
    "ekfac, rank 2": (EkfacLoraLaplace, {"backend_kwargs": {"rank": 2}}),
    "ekfac, B": (EkfacLoraLaplace, {"tensors": "B"}),
    "gp": (FunctionalLoraLaplace, {}),
}
# The eigenbasis changes with new data, so that these pass over earlier ones again.
ONE_PASS = [name for name in STRUCTURES if not name.startswith("ekfac")]
PRIOR = {"temperature": 0.5, "prior_mean": 0.1}


@lru_cache
def make_batch(head):
    return HEADS[head]().make_batch


class Case(NamedTuple):
    structure: str
    head: str
    backend: type | None = None

    def build(self, **kwargs):
        """Return an unfitted posterior with a temperature, a prior mean and a prior a tensor."""
        cls, options = STRUCTURES[self.structure]
        la = cls(HEADS[self.head]().model, backend=self.backend, **{**PRIOR, **options, **kwargs})
        la.prior_precision = torch.linspace(0.5, 2, len(la.tensors), dtype=torch.float64)
        return la

    def batch(self, n=6, seed=0):
        return make_batch(self.head)(n, seed=seed)

    def fitted(self, **kwargs):
        la, batch = self.build(**kwargs), self.batch()
        la.fit(chunks(batch, 4))
        return la, batch


# Whose questions are unlike the others' only in the head and its seeds: one structure of a kind.
ODD = ("ragged letters", "ragged scored", "pairs")
SOME = ("kron", "kron, expand", "diag", "lowrank", "gp")
EXACT_CASES = [
    Case(structure, head) for head in HEADS for structure in (SOME if head in ODD else STRUCTURES)
]
EMPIRICAL_CASES = [
    Case(structure, "letters", StreamingEF) for structure in ("kron", "diag", "full", "ekfac")
]


def cases(*chosen, quick=None):
    """Parametrise a test; slow are variants of a structure, except over letters, and other heads.

    `quick` names the heads that are not slow, if not all.
    """
    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(
                c,
                id=f"{c.head}-{c.structure}{'-empirical' * (c.backend is not None)}",
                marks=[pytest.mark.slow]
                * (("," in c.structure and c.head != "letters") or c.head not in (quick or HEADS)),
            )
            for c in chosen
        ],
    )


ALL = cases(*EXACT_CASES, *EMPIRICAL_CASES)
LONG = cases(*EXACT_CASES, *EMPIRICAL_CASES, quick=("letters", "mlp"))
LETTERS = cases(*(Case(structure, "letters") for structure in STRUCTURES))
MLP = cases(*(Case(structure, "mlp") for structure in STRUCTURES))


def prior_diagonal(la):
    sizes = torch.tensor([tensor.weight.numel() for tensor in la.tensors])
    return la.prior_precision.expand(len(sizes)).repeat_interleave(sizes)


def dense_curvature(la, batch):
    """Return the curvature of the data that a full or diagonal structure claims."""
    x, y = inputs_of(batch), labels_of(batch)
    jacobians = bruteforce_jacobians(la.model, x, la.tensors)
    logits = la.model(x).detach()
    if la.backend.__class__ is StreamingEF:
        residuals = torch.softmax(logits, -1) - F.one_hot(y, logits.shape[1])
        rows = torch.einsum("nc,ncp->np", residuals, jacobians)
        return rows.T @ rows
    if isinstance(la, FunctionalLoraLaplace) and la.likelihood != "regression":
        p = torch.softmax(logits, -1)
        return torch.einsum("ncp,nc,ncq->pq", jacobians, p * (1 - p), jacobians)
    return explicit_ggn(jacobians, None if la.likelihood == "regression" else logits)


def dense_precision(la, batch):
    """Return the posterior precision (P, P) without the code under test's own algebra."""
    factor = 1 / (la.temperature * float(la.sigma_noise) ** 2)
    prior = prior_diagonal(la)
    if isinstance(la, EkfacLoraLaplace):
        blocks = refitted_blocks(la.H_facs, dense_curvature(la, batch))
        return factor * torch.block_diag(*blocks) + prior.diag()
    if not isinstance(la, KronLoraLaplace):
        curvature = factor * dense_curvature(la, batch)
        if isinstance(la, DiagLoraLaplace):
            curvature = curvature.diagonal().diag()
        return curvature + prior.diag()
    blocks = []
    deltas = la.prior_precision.expand(len(la.tensors))
    for pair, delta in zip(la.H_facs.pairs, deltas, strict=True):
        outputs = spectra([pair.outputs])[0].dense() * factor**0.5
        inputs = spectra([pair.inputs])[0].dense() * factor**0.5 / len(labels_of(batch))
        if la.damping:
            outputs = outputs + delta.sqrt() * torch.eye(len(outputs)).double()
            inputs = inputs + delta.sqrt() * torch.eye(len(inputs)).double()
            blocks.append(torch.kron(outputs, inputs))
        else:
            block = torch.kron(outputs, inputs)
            blocks.append(block + delta * torch.eye(len(block)).double())
    return torch.block_diag(*blocks)


def dense_scatter(la, x, prior, y=None, noise=1e-5):
    """Return what the weights, or a Gaussian process's outputs, are away from the prior's."""
    delta = la.mean - la.prior_mean
    if not isinstance(la, FunctionalLoraLaplace):
        return (prior * delta.square()).sum()
    jacobians = bruteforce_jacobians(la.model, x, la.tensors)
    shift = jacobians @ delta + (0 if y is None else y - la.model(x).detach())
    rows, shift = jacobians.flatten(0, 1), shift.flatten()
    kernel = rows / prior @ rows.T + noise * torch.eye(len(rows)).double()
    return shift @ torch.linalg.solve(kernel, shift)


def precision_of(la):
    precision = la.posterior_precision
    if isinstance(la, KronLoraLaplace):
        return precision.to_matrix()
    if isinstance(la, LowRankLoraLaplace):
        (vectors, values), prior = precision
        return (vectors * values) @ vectors.T + prior.diag()
    return precision.diag() if isinstance(la, DiagLoraLaplace) else precision


def assert_same_posterior(left, right):
    torch.testing.assert_close(precision_of(left), precision_of(right), **EXACT)
    torch.testing.assert_close(left.loss, right.loss, **EXACT)
    torch.testing.assert_close(left.mean, right.mean, rtol=0, atol=0)
    assert left.n_data == right.n_data
    assert left.n_outputs == right.n_outputs


# Fit ----------------------------------------------------------------------------------------------


@ALL
def test_posterior_precision_is_what_the_structure_claims(case):
    la, batch = case.fitted()
    torch.testing.assert_close(precision_of(la), dense_precision(la, batch), **EXACT)


@cases(*(Case(structure, head) for structure in STRUCTURES for head in ("letters", "mlp")))
def test_fit_records_what_it_saw(case):
    la, batch = case.fitted()
    assert la.n_data == 6
    assert la.n_outputs == 3
    logits = la.model(inputs_of(batch)).detach()
    expected = F.cross_entropy(logits, labels_of(batch), reduction="sum")
    torch.testing.assert_close(la.loss, expected, **EXACT)
    weights = torch.cat([tensor.weight.detach().flatten() for tensor in la.tensors])
    assert torch.equal(la.mean, weights)


@ALL
def test_fits_on_halves_add_up(case):
    whole, batch = case.fitted()
    halves = case.build()
    halves.fit([select(batch, slice(0, 2))], override=False)
    halves.fit([select(batch, slice(2, 6))], override=False)
    assert_same_posterior(halves, whole)


@LETTERS
def test_fit_starts_anew_by_default(case):
    la, batch = case.fitted()
    expected = la(inputs_of(batch))
    la.fit([case.batch(3, seed=1)])
    assert not torch.allclose(la(inputs_of(batch)), expected)
    la.fit(chunks(batch, 4))
    assert_same_posterior(la, case.fitted()[0])
    torch.testing.assert_close(la(inputs_of(batch)), expected, **EXACT)


@ALL
def test_fit_does_not_depend_on_batch_size_or_order(case):
    la, batch = case.fitted()
    other = case.build()
    other.fit([select(batch, [5, 0]), select(batch, [3]), select(batch, [1, 4, 2])])
    assert_same_posterior(other, la)


class WithoutLength:
    """Yields the same batches whenever it is asked."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


@cases(*(Case(structure, head) for structure in STRUCTURES for head in ("letters", "mlp")))
def test_loaders_need_no_length(case):
    la, batch = case.fitted()
    other = case.build()
    other.fit(WithoutLength(chunks(batch, 2)))
    assert_same_posterior(other, la)


@cases(*(Case(structure, head) for structure in ONE_PASS for head in ("letters", "mlp")))
def test_loaders_can_be_iterators(case):
    la, batch = case.fitted()
    other = case.build()
    other.fit(part for part in chunks(batch, 2))
    assert_same_posterior(other, la)


@LETTERS
def test_monte_carlo_fisher_fits_and_predicts(case):
    options = {**STRUCTURES[case.structure][1].get("backend_kwargs", {}), "stochastic": True}
    exact, batch = case.fitted()
    la, _ = case.fitted(backend_kwargs=options)
    assert not torch.allclose(precision_of(la), precision_of(exact))
    x = inputs_of(batch)
    jacobians = bruteforce_jacobians(la.model, x, la.tensors)
    expected = jacobians @ torch.linalg.inv(precision_of(la)) @ jacobians.mT
    torch.testing.assert_close(la._glm_predictive_distribution(x)[1], expected, **EXACT)


@LETTERS
def test_nothing_works_before_fit(case):
    la, x = case.build(), inputs_of(case.batch())
    for action in (
        lambda: la(x),
        lambda: la.posterior_precision,
        lambda: la.sample(1),
        lambda: la.functional_samples(x),
        lambda: la.log_marginal_likelihood(),
        lambda: la.optimize_prior_precision(),
        lambda: la.moments_grid(x, torch.ones(1)),
        lambda: la.state_dict(),
    ):
        with pytest.raises((NotFittedError, AttributeError)):
            action()


# Moments and evidence -----------------------------------------------------------------------------


@ALL
def test_predictive_moments_equal_the_dense_formula(case):
    la, _ = case.fitted()
    x = inputs_of(case.batch(4, seed=3))
    jacobians = bruteforce_jacobians(la.model, x, la.tensors)
    mean, variance = la._glm_predictive_distribution(x)
    covariance = torch.linalg.inv(dense_precision(la, case.batch()))
    torch.testing.assert_close(mean, la.model(x).detach(), **EXACT)
    torch.testing.assert_close(variance, jacobians @ covariance @ jacobians.mT, **EXACT)
    torch.testing.assert_close(variance, la.functional_variance(jacobians), **EXACT)


@ALL
def test_log_marginal_likelihood_equals_the_dense_formula(case):
    la, batch = case.fitted()
    logits = la.model(inputs_of(batch)).detach()
    log_likelihood = -F.cross_entropy(logits, labels_of(batch), reduction="sum") / la.temperature
    prior = prior_diagonal(la)
    ratio = torch.logdet(dense_precision(la, batch)) - prior.log().sum()
    expected = log_likelihood - 0.5 * (ratio + dense_scatter(la, inputs_of(batch), prior))
    torch.testing.assert_close(la.log_marginal_likelihood(), expected, **EXACT)


@LETTERS
def test_log_marginal_likelihood_takes_and_differentiates_a_prior_precision(case):
    la, _ = case.fitted()
    value = torch.tensor([3.0]).double().requires_grad_()
    (gradient,) = torch.autograd.grad(la.log_marginal_likelihood(value), value)
    step = 1e-4
    values = [la.log_marginal_likelihood(value.detach() + h) for h in (step, -step)]
    torch.testing.assert_close(
        gradient[0], (values[0] - values[1]) / (2 * step), rtol=1e-5, atol=1e-5
    )


@ALL
def test_log_prob_is_that_of_the_dense_gaussian(case):
    la, batch = case.fitted()
    gaussian = torch.distributions.MultivariateNormal(
        la.mean, precision_matrix=dense_precision(la, batch)
    )
    point = la.mean + 0.1 * torch.randn_like(la.mean)
    torch.testing.assert_close(la.log_prob(point), gaussian.log_prob(point), **EXACT)


@LETTERS
def test_moments_grid_equals_one_prediction_a_value(case):
    la, batch = case.fitted()
    before = la.prior_precision.clone()
    values = torch.tensor([0.1, 1.0, 30.0])
    mean, covariances = la.moments_grid(inputs_of(batch), values)
    assert torch.equal(la.prior_precision, before)
    assert covariances.shape == (3, 6, 3, 3)
    for value, covariance in zip(values, covariances, strict=True):
        la.prior_precision = value
        expected_mean, expected = la._glm_predictive_distribution(inputs_of(batch))
        torch.testing.assert_close(mean, expected_mean, **EXACT)
        torch.testing.assert_close(covariance, expected, **EXACT)


@LETTERS
def test_moments_grid_leaves_the_posterior_as_it_was(case):
    la, batch = case.fitted()
    before = la(inputs_of(batch))
    la.moments_grid(inputs_of(batch), torch.tensor([0.1, 30.0]))
    torch.testing.assert_close(la(inputs_of(batch)), before, **EXACT)


@MLP
def test_predictive_variance_can_be_differentiated_in_the_inputs(case):
    la, (x, _) = case.fitted(enable_backprop=True)
    x = x.clone().requires_grad_()
    _, variance = la._glm_predictive_distribution(x)
    (gradient,) = torch.autograd.grad(variance.square().sum(), x)
    precision = dense_precision(la, case.batch())

    def energy(x):
        jacobians = bruteforce_jacobians(la.model, x, la.tensors)
        return (jacobians @ torch.linalg.inv(precision) @ jacobians.mT).square().sum()

    step, direction = 1e-5, torch.randn(x.shape, dtype=x.dtype)
    slope = (energy(x.detach() + step * direction) - energy(x.detach() - step * direction)) / 2
    torch.testing.assert_close((gradient * direction).sum(), slope / step, rtol=1e-5, atol=1e-6)


# Prediction ---------------------------------------------------------------------------------------


@ALL
def test_link_approximations_give_probabilities(case):
    la, _ = case.fitted()
    x = inputs_of(case.batch(4, seed=3))
    results = [la(x, link_approx=link) for link in ("probit", "mc", "bridge", "bridge_norm")]
    for probabilities in results:
        assert probabilities.shape == (4, la.n_outputs)
        assert (probabilities >= 0).all()
        torch.testing.assert_close(probabilities.sum(1), torch.ones(4).double())
    assert not any(torch.allclose(results[0], other) for other in results[1:])


@LETTERS
def test_probit_and_mc_follow_their_formulas(case):
    la, batch = case.fitted()
    x = inputs_of(batch)
    mean, variance = la._glm_predictive_distribution(x)
    scaled = mean / (1 + torch.pi / 8 * variance.diagonal(dim1=1, dim2=2)).sqrt()
    torch.testing.assert_close(la(x, link_approx="probit"), torch.softmax(scaled, -1), **EXACT)
    n = 20_000
    root = torch.linalg.cholesky(variance)
    noise = torch.randn(n, 6, 3, 1, generator=torch.Generator().manual_seed(1)).double()
    draws = torch.softmax(mean + (root @ noise)[..., 0], -1)
    deviation = draws.std(0) * (2 / n) ** 0.5
    error = la(x, link_approx="mc", n_samples=n) - draws.mean(0)
    assert (error.abs() <= 5 * deviation).all()


@LETTERS
def test_all_links_become_the_map_prediction_under_a_strong_prior(case):
    la, batch = case.fitted()
    la.prior_precision = 1e14
    expected = torch.softmax(la.model(inputs_of(batch)).detach(), -1)
    for pred_type, link in (("glm", "probit"), ("glm", "mc"), ("nn", "mc")):
        result = la(inputs_of(batch), pred_type=pred_type, link_approx=link, n_samples=5)
        torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4)


@ALL
def test_nn_predictive_gives_probabilities(case):
    la, _ = case.fitted()
    x = inputs_of(case.batch(4, seed=3))
    probabilities = la(x, pred_type="nn", link_approx="mc", n_samples=3)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(4).double())
    assert not torch.allclose(probabilities, torch.softmax(la.model(x), -1))


@LETTERS
def test_nn_predictive_is_the_mean_over_sampled_weights(case):
    la, batch = case.fitted()
    x = inputs_of(batch)
    generator = torch.Generator()
    result = la(
        x, pred_type="nn", link_approx="mc", n_samples=3, generator=generator.manual_seed(5)
    )
    generator.manual_seed(5)
    expected = 0
    for _ in range(3):
        weights = la.sample(1, generator=generator)[0]
        torch.nn.utils.vector_to_parameters(weights, [tensor.weight for tensor in la.tensors])
        expected = expected + torch.softmax(la.model(x).detach(), -1) / 3
    torch.testing.assert_close(result, expected, **EXACT)


@pytest.mark.parametrize(("pred_type", "link"), [("glm", "mc"), ("nn", "mc")])
@LETTERS
def test_a_generator_makes_predictions_repeatable(case, pred_type, link):
    la, batch = case.fitted()
    results = [
        la(
            inputs_of(batch),
            pred_type=pred_type,
            link_approx=link,
            n_samples=4,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (1, 1, 2)
    ]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


# Samples ------------------------------------------------------------------------------------------


@ALL
def test_samples_have_the_posteriors_mean_and_covariance(case):
    la, batch = case.fitted()
    n = 4000
    samples = la.sample(n, generator=torch.Generator().manual_seed(0))
    assert samples.shape == (n, la.n_params)
    # Whitened with the dense precision, samples are standard normal.
    white = (samples - la.mean) @ torch.linalg.cholesky(dense_precision(la, batch))
    assert (white.mean(0).abs() <= 6 * n**-0.5).all()
    covariance = white.T @ white / n
    identity = torch.eye(la.n_params).double()
    assert ((covariance - identity).abs() <= 6 * ((identity + 1) / n) ** 0.5).all()


@LETTERS
def test_glm_samples_have_the_predictive_mean_and_covariance(case):
    la, batch = case.fitted()
    n, generator = 4000, torch.Generator().manual_seed(0)
    samples = la.functional_samples(inputs_of(batch), n_samples=n, generator=generator)
    mean, variance = la._glm_predictive_distribution(inputs_of(batch))
    white = torch.linalg.solve_triangular(
        torch.linalg.cholesky(variance), (samples - mean)[..., None], upper=False
    )[..., 0]
    assert (white.mean(0).abs() <= 6 * n**-0.5).all()
    covariance = torch.einsum("nbc,nbd->bcd", white, white) / n
    identity = torch.eye(3).double()
    assert ((covariance - identity).abs() <= 6 * ((identity + 1) / n) ** 0.5).all()


@ALL
def test_shapes_of_functional_and_predictive_samples(case):
    la, _ = case.fitted()
    x = inputs_of(case.batch(4, seed=3))
    for pred_type in ("glm", "nn"):
        assert la.functional_samples(x, pred_type=pred_type, n_samples=2).shape == (
            2,
            4,
            la.n_outputs,
        )
        probabilities = la.predictive_samples(x, pred_type=pred_type, n_samples=2)
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 4).double())


# Choices that a row does not have -----------------------------------------------------------------

EACH_STRUCTURE = pytest.mark.parametrize("structure", STRUCTURES)


# A Gaussian process keeps C outputs of every example, and takes no batches of different C.
@pytest.mark.parametrize("structure", [name for name in STRUCTURES if name != "gp"])
@pytest.mark.parametrize("backend", [None, StreamingEF])
def test_absent_choices_add_nothing_to_the_posterior(structure, backend, monkeypatch):
    """It is that of the rows in batches of their own, each with its own number of choices."""
    case = Case(structure, "ragged scored", backend)
    (whole, batch), alone = case.fitted(), case.build()
    # A loader of such batches is refused, for what comes after a fit.
    monkeypatch.setattr("laplace_llm.laplace.check_outputs", lambda count, before: count)
    alone.fit(by_size(batch))
    torch.testing.assert_close(precision_of(whole), precision_of(alone), **EXACT)
    torch.testing.assert_close(whole.loss, alone.loss, **EXACT)


PREDICTIONS = {
    **{link: {"link_approx": link} for link in ("qmc", "mean_field", "probit", "mc")},
    **{link: {"link_approx": link} for link in ("bridge", "bridge_norm")},
    "qmc of marginals": {"diagonal_output": True},
    "mean field of marginals": {"link_approx": "mean_field", "diagonal_output": True},
    "mc of marginals": {"link_approx": "mc", "diagonal_output": True},
    "nn": {"pred_type": "nn", "link_approx": "mc", "n_samples": 3},
}


@pytest.mark.parametrize("options", PREDICTIONS.values(), ids=PREDICTIONS)
@pytest.mark.parametrize("structure", ["kron", "lowrank"])
def test_absent_choices_are_predicted_impossible_and_change_nothing_else(structure, options):
    case = Case(structure, "ragged scored")
    la, _ = case.fitted()
    batch = case.batch(5, seed=2)
    sampled = options.get("link_approx") == "mc"

    def predict(x):
        generator = torch.Generator().manual_seed(0) if sampled else None
        return la(x, **options, generator=generator)

    probabilities = predict(batch)
    assert torch.equal(probabilities > 0, batch["choice_present"])
    assert torch.equal(probabilities == 0, ~batch["choice_present"])
    for row, own in zip(probabilities, by_size(batch), strict=True):
        expected = predict(own)[0]
        torch.testing.assert_close(row[: len(expected)], expected, **EXACT)
        torch.testing.assert_close(expected.sum(), torch.ones(()).double())


def test_mc_draws_the_same_for_every_row_whatever_the_others_have():
    """From torch's global random state too, which moves on."""
    case = Case("kron", "ragged scored")
    la, _ = case.fitted()
    batch = case.batch(5, seed=2)
    torch.manual_seed(3)
    first, second = la(batch, link_approx="mc"), la(batch, link_approx="mc")
    assert not torch.equal(first, second)
    for row, own in zip(first, by_size(batch), strict=True):
        torch.manual_seed(3)
        expected = la(own, link_approx="mc")[0]
        torch.testing.assert_close(row[: len(expected)], expected, **EXACT)


@pytest.mark.parametrize("structure", ["kron", "lowrank"])
@pytest.mark.parametrize("pred_type", ["glm", "nn"])
def test_samples_of_absent_choices_are_minus_infinity(structure, pred_type):
    case = Case(structure, "ragged letters")
    la, batch = case.fitted()
    absent = ~batch["choice_present"].expand(7, 6, 4)
    samples = la.functional_samples(batch, pred_type=pred_type, n_samples=7)
    assert torch.equal(samples == -torch.inf, absent)
    assert not samples.isnan().any()
    probabilities = la.predictive_samples(batch, pred_type=pred_type, n_samples=7)
    assert torch.equal(probabilities == 0, absent)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(7, 6).double())


@EACH_STRUCTURE
def test_batches_of_another_number_of_choices_are_predicted_all_the_same(structure):
    la, _ = Case(structure, "ragged scored").fitted()
    for own in by_size(Case(structure, "ragged scored").batch(3, seed=1)):
        moments = la._glm_predictive_distribution(own)
        expected = quasi_monte_carlo(*moments)
        torch.testing.assert_close(la(own), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("backend", [CurvlinopsGGN, AsdlGGN])
def test_the_parents_backends_leave_absent_choices_out(backend):
    batch = Case("full", "ragged letters").batch()
    la = FullLoraLaplace(HEADS["ragged letters"]().model, backend=backend)
    la.fit([batch])
    torch.testing.assert_close(precision_of(la), dense_precision(la, batch))
    assert torch.equal(la(batch) > 0, batch["choice_present"])


# Preference pairs ---------------------------------------------------------------------------------


def single(pairs, which=0):
    """Return a batch of one sequence of each pair."""
    return {key: value[:, which] for key, value in pairs.items() if value.ndim == 3}


@EACH_STRUCTURE
def test_reward_models_compare_pairs_and_score_single_answers(structure):
    cls, options = STRUCTURES[structure]
    pairs, la = pair_batch(6), cls(tiny_bert_classifier(classes=1), "reward_modeling", **options)
    la.fit(chunks(pairs, 4))  # a bare model, which is wrapped
    precision = dense_precision(la, pairs)
    torch.testing.assert_close(precision_of(la), precision, **EXACT)
    assert la.n_outputs == 2
    covariance = torch.linalg.inv(precision)
    # Rewards of single answers: a Gaussian.
    answers = single(pair_batch(5, seed=3), 1)
    jacobians = bruteforce_jacobians(la.model, answers, la.tensors)
    mean, variance = la(answers)
    torch.testing.assert_close(mean, la.model(answers).detach(), **EXACT)
    torch.testing.assert_close(variance, jacobians @ covariance @ jacobians.mT, **EXACT)
    rows = jacobians.flatten(0, 1)
    torch.testing.assert_close(la(answers, joint=True)[1], rows @ covariance @ rows.T, **EXACT)
    assert la(answers, pred_type="nn", link_approx="mc", n_samples=3)[1].shape == (5, 1)
    for pred_type in ("glm", "nn"):
        samples = la.predictive_samples(answers, pred_type, n_samples=4)
        assert samples.shape == (4, 5, 1)
        assert (samples.std(0) > 0).all()
    # Preferences, and both rewards together.
    jacobians = bruteforce_jacobians(la.model, pairs, la.tensors)
    moments = la.model(pairs).detach(), jacobians @ covariance @ jacobians.mT
    for result, expected in zip(la(pairs), moments, strict=True):
        torch.testing.assert_close(result, expected, **EXACT)
    preferences = la(pairs, fitting=True)
    torch.testing.assert_close(preferences, quasi_monte_carlo(*moments), rtol=1e-6, atol=1e-8)
    for generator in (None, torch.Generator().manual_seed(0)):
        sampled = la(pairs, link_approx="mc", fitting=True, n_samples=5, generator=generator)
        torch.testing.assert_close(sampled.sum(1), torch.ones(6).double())
    # Padding changes nothing.
    padded = pair_batch(6, pad="right", extra=3)
    torch.testing.assert_close(la(padded, fitting=True), preferences, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("structure", ["kron", "kron, expand", "diag", "lowrank"])
def test_tuning_reward_models_is_tuning_classifiers_of_pairs(structure):
    cls, options = STRUCTURES[structure]
    pairs, others = pair_batch(6), chunks(pair_batch(5, seed=4), 3)
    rewards, classes = (
        cls(tiny_bert_classifier(classes=1), likelihood, **options)
        for likelihood in ("reward_modeling", "classification")
    )
    for options in (
        {},
        {"val_loader": others, "grid_size": 5},
        {"val_loader": others, "grid_size": 5, "link_approx": "probit"},
        {"val_loader": others, "method": "val_grad", "n_steps": 3},
        {"method": "marglik", "n_steps": 3},
        {"method": "marglik", "evidence": "linear_mode", "grid_size": 5},
    ):
        for la in (rewards, classes):
            la.fit([pairs])
            la.optimize_prior_precision(**options)
        assert torch.equal(rewards.prior_precision, classes.prior_precision)


# Regression ---------------------------------------------------------------------------------------

REGRESSION = pytest.mark.parametrize("structure", STRUCTURES)


def regression(structure):
    cls, options = STRUCTURES[structure]
    la = cls(tiny_mlp(outputs=2), "regression", sigma_noise=0.7, prior_precision=1.3, **options)
    x, y = mlp_batch(6, outputs=2, regression=True)
    la.fit(chunks((x, y), 4))
    return la, x, y


@REGRESSION
def test_regression_posterior_and_evidence_equal_the_dense_formula(structure):
    la, x, y = regression(structure)
    precision = dense_precision(la, (x, y))
    torch.testing.assert_close(precision_of(la), precision, **EXACT)
    noise = torch.distributions.Normal(la.model(x).detach(), 0.7)
    ratio = torch.logdet(precision) - len(precision) * math.log(1.3)
    expected = noise.log_prob(y).sum() - 0.5 * (ratio + 1.3 * la.mean.square().sum())
    if isinstance(la, FunctionalLoraLaplace):
        scatter = dense_scatter(la, x, prior_diagonal(la), y, noise=0.49)
        expected = -0.5 * (y.numel() * math.log(2 * math.pi * 0.49) + ratio + scatter)
    torch.testing.assert_close(la.log_marginal_likelihood(), expected, **EXACT)


@REGRESSION
def test_regression_predicts_jointly(structure):
    la, x, y = regression(structure)
    jacobians = bruteforce_jacobians(la.model, x, la.tensors)
    covariance = torch.linalg.inv(dense_precision(la, (x, y)))
    rows = jacobians.flatten(0, 1)
    mean, joint = la(x, joint=True)
    torch.testing.assert_close(mean, la.model(x).detach().flatten(), **EXACT)
    torch.testing.assert_close(joint, rows @ covariance @ rows.T, **EXACT)
    torch.testing.assert_close(joint, la.functional_covariance(jacobians), **EXACT)
    mean, marginal = la(x)
    torch.testing.assert_close(mean, la.model(x).detach(), **EXACT)
    torch.testing.assert_close(marginal, jacobians @ covariance @ jacobians.mT, **EXACT)
    _, variances = la(x, diagonal_output=True)
    torch.testing.assert_close(variances, marginal.diagonal(dim1=1, dim2=2), **EXACT)


@REGRESSION
def test_regression_tunes_and_samples(structure):
    la, x, y = regression(structure)
    mean, variance = la(x, pred_type="nn", link_approx="mc", n_samples=3)
    assert mean.shape == variance.shape == (6, 2)
    assert la.predictive_samples(x, n_samples=3).shape == (3, 6, 2)
    la.optimize_prior_precision(method="gridsearch", val_loader=[(x, y)], grid_size=3)
    before = la.log_marginal_likelihood()
    la.optimize_prior_precision(method="marglik", n_steps=30)
    assert la.log_marginal_likelihood() > before


def flat(loader):
    """Return a loader whose targets (B, 1) are (B,), as Hugging Face's collators make them."""
    return [{**batch, "labels": batch["labels"][:, 0]} for batch in loader]


@pytest.mark.parametrize("structure", ["kron", "diag", "lowrank"])
def test_targets_of_one_output_need_no_second_axis(structure):
    cls, options = STRUCTURES[structure]
    batches = chunks(letter_batch(6), 4)
    for batch in batches:
        batch["labels"] = torch.randn(len(batch["labels"]), 1)
    column, flattened = (
        cls(tiny_bert_classifier(classes=1), "regression", sigma_noise=0.7, **options)
        for _ in range(2)
    )
    for la, loader in ((column, batches), (flattened, flat(batches))):
        la.fit(loader)
    assert_same_posterior(column, flattened)
    torch.testing.assert_close(precision_of(column), dense_precision(column, letter_batch(6)))
    for options in (
        {},
        {"method": "gridsearch"},
        {"method": "gridsearch", "loss": lambda mean, variance, y: (mean - y).square().mean()},
        {"method": "gridsearch", "pred_type": "nn", "link_approx": "mc", "n_samples": 2},
        {"method": "val_grad", "n_steps": 3},
    ):
        for la, loader in ((column, batches), (flattened, flat(batches))):
            torch.manual_seed(0)
            if options:
                options["val_loader"] = loader
            la.optimize_prior_precision(**options, grid_size=5)
        assert torch.equal(column.prior_precision, flattened.prior_precision)
    x = inputs_of(batches[0])
    torch.testing.assert_close(column(x)[0], column.model(x).detach())


@REGRESSION
def test_reward_models_classify_while_fitting_and_regress_afterwards(structure):
    cls, options = STRUCTURES[structure]
    x, y = mlp_batch(6, outputs=2)
    rewards, classes = (
        cls(tiny_mlp(outputs=2), likelihood, prior_precision=1.3, **options)
        for likelihood in ("reward_modeling", "classification")
    )
    for la in (rewards, classes):
        la.fit([(x, y)])
    assert_same_posterior(rewards, classes)
    mean, variance = rewards(x)
    torch.testing.assert_close(mean, rewards.model(x).detach(), **EXACT)
    torch.testing.assert_close(variance, classes._glm_predictive_distribution(x)[1], **EXACT)
    torch.testing.assert_close(rewards(x, fitting=True), classes(x), **EXACT)
    for la in (rewards, classes):
        la.optimize_prior_precision(method="gridsearch", val_loader=[(x, y)], grid_size=5)
    assert torch.equal(rewards.prior_precision, classes.prior_precision)


# Tuning -------------------------------------------------------------------------------------------


class RecordingMetric(RunningNLLMetric):
    """Keeps every value it computed."""

    def __init__(self):
        super().__init__()
        self.computed = []

    def compute(self):
        self.computed.append(float(super().compute()))
        return super().compute()


class RecordingLoss:
    """A plain function of probabilities and labels that keeps its results."""

    def __init__(self):
        self.computed = []

    def __call__(self, probabilities, labels):
        loss = F.nll_loss(probabilities.log(), labels)
        self.computed.append(float(loss))
        return loss


def separate_passes(la, batches, interval, link="qmc"):
    """Return the validation NLL of every value, one pass and fresh sums for each."""
    losses = []
    for value in interval:
        la.prior_precision = value
        nll = [
            F.nll_loss(la(inputs_of(b), link_approx=link).log(), labels_of(b), reduction="sum")
            for b in batches
        ]
        losses.append(float(sum(nll)) / sum(len(labels_of(b)) for b in batches))
    return losses


INTERVAL = torch.logspace(-3, 3, 7)
GRID = {
    "method": "gridsearch",
    "log_prior_prec_min": -3,
    "log_prior_prec_max": 3,
    "grid_size": 7,
}


def check_gridsearch(case, loss):
    la, _ = case.fitted()
    batches = chunks(case.batch(5, seed=2), 3)
    la.optimize_prior_precision(val_loader=batches, loss=loss, **GRID)
    chosen = la.prior_precision
    expected = separate_passes(la, batches, INTERVAL)
    computed, expected = torch.tensor(loss.computed), torch.tensor(expected)
    torch.testing.assert_close(computed, expected, rtol=1e-5, atol=1e-6)  # metrics are in float32
    torch.testing.assert_close(chosen, INTERVAL[expected.argmin()].double()[None])


@LONG
def test_gridsearch_with_a_metric_equals_separate_passes(case):
    check_gridsearch(case, RecordingMetric())


@LETTERS
def test_gridsearch_with_a_function_equals_separate_passes(case):
    check_gridsearch(case, RecordingLoss())


@LETTERS
def test_gridsearch_resets_a_used_metric(case):
    la, _ = case.fitted()
    batches = chunks(case.batch(5, seed=2), 3)
    la.optimize_prior_precision(val_loader=batches, **GRID)
    fresh = la.prior_precision
    metric = RunningNLLMetric()
    metric.update(torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([0]))
    assert metric.compute().isinf()
    la.optimize_prior_precision(val_loader=batches, loss=metric, **GRID)
    assert torch.equal(la.prior_precision, fresh)


@pytest.mark.parametrize("link", ["mc", "bridge", "bridge_norm"])
@cases(*(Case(structure, "letters") for structure in ("kron", "diag", "full")))
def test_gridsearch_with_other_links(case, link):
    la, _ = case.fitted()
    batches, loss = chunks(case.batch(5, seed=2), 3), RecordingLoss()
    la.optimize_prior_precision(
        val_loader=batches, loss=loss, link_approx=link, n_samples=10, **GRID
    )
    computed = torch.tensor(loss.computed)
    torch.testing.assert_close(la.prior_precision, INTERVAL[computed.argmin()].double()[None])
    if link != "mc":
        expected = torch.tensor(separate_passes(la, batches, INTERVAL, link))
        torch.testing.assert_close(computed, expected)


@LETTERS
def test_gridsearch_with_sampled_weights(case):
    la, batch = case.fitted()
    la.optimize_prior_precision(
        pred_type="nn",
        method="gridsearch",
        val_loader=[batch],
        link_approx="mc",
        n_samples=2,
        grid_size=3,
        log_prior_prec_min=0,
    )
    assert float(la.prior_precision) in torch.logspace(0, 4, 3).double().tolist()


@LETTERS
def test_gridsearch_without_a_finite_loss_changes_nothing(case):
    la, batch = case.fitted()
    before, probabilities = la.prior_precision, la(inputs_of(batch))
    with pytest.raises(PriorError, match="finite"):
        la.optimize_prior_precision(
            method="gridsearch",
            val_loader=[batch],
            grid_size=3,
            loss=lambda p, y: p.sum() * float("nan"),
        )
    assert torch.equal(la.prior_precision, before)
    torch.testing.assert_close(la(inputs_of(batch)), probabilities, **EXACT)


@LONG
def test_marglik_increases_the_marginal_likelihood(case):
    la, _ = case.fitted()
    for structure, length in (("scalar", 1), ("layerwise", len(la.tensors))):
        before = la.log_marginal_likelihood(torch.tensor(30.0))
        la.optimize_prior_precision(
            method="marglik", init_prior_prec=30.0, n_steps=8, prior_structure=structure
        )
        assert len(la.prior_precision) == length
        assert la.log_marginal_likelihood() > before
        assert not la.prior_precision.requires_grad


@LETTERS
def test_marglik_with_one_precision_a_weight(case):
    la, _ = case.fitted()
    before = la.prior_precision
    if isinstance(la, KronLoraLaplace):
        with pytest.raises(PriorError, match=f"1 or {len(la.tensors)}"):
            la.optimize_prior_precision(method="marglik", n_steps=2, prior_structure="diag")
        assert torch.equal(la.prior_precision, before)
    else:
        evidence = la.log_marginal_likelihood(torch.tensor(30.0))
        la.optimize_prior_precision(
            method="marglik", init_prior_prec=30.0, n_steps=8, prior_structure="diag"
        )
        assert len(la.prior_precision) == la.n_params
        assert la.log_marginal_likelihood() > evidence


@LETTERS
def test_marglik_reaches_a_stationary_point(case):
    la, _ = case.fitted()
    la.optimize_prior_precision(method="marglik", n_steps=150, lr=0.2)
    log_value = la.prior_precision.log().requires_grad_()
    evidence = la.log_marginal_likelihood(log_value.exp())
    (slope,) = torch.autograd.grad(evidence, log_value)
    assert abs(float(slope)) < 0.05


# Saving -------------------------------------------------------------------------------------------


@ALL
def test_state_round_trip_through_a_file_is_bit_exact(case):
    la, batch = case.fitted()
    file = io.BytesIO()
    torch.save(la.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = case.build(temperature=3.0, prior_mean=0.0)
    other.prior_precision = 7.0
    other.load_state_dict(state)
    assert torch.equal(precision_of(other), precision_of(la))
    assert torch.equal(other.mean, la.mean)
    assert torch.equal(other.prior_precision, la.prior_precision)
    assert torch.equal(other.prior_mean.view(()), la.prior_mean.view(()))
    assert other.temperature == la.temperature
    assert other.n_data == la.n_data
    assert torch.equal(other(inputs_of(batch)), la(inputs_of(batch)))
    assert torch.equal(other.log_marginal_likelihood(), la.log_marginal_likelihood())


@cases(*(case for case in EXACT_CASES + EMPIRICAL_CASES if not case.structure.startswith("ekfac")))
def test_a_loaded_posterior_takes_more_data(case):
    whole, batch = case.fitted()
    half, loaded = case.build(), case.build()
    half.fit([select(batch, slice(0, 3))])
    loaded.load_state_dict(half.state_dict())
    loaded.fit([select(batch, slice(3, 6))], override=False)
    assert_same_posterior(loaded, whole)


@cases(*(Case(structure, "letters") for structure in ONE_PASS))
def test_adding_data_to_a_loaded_posterior_leaves_the_state_alone(case):
    la, batch = case.fitted()
    state, other = la.state_dict(), case.build()
    other.load_state_dict(state)
    other.fit([batch], override=False)
    assert_same_posterior(la, case.fitted()[0])
    again = case.build()
    again.load_state_dict(state)
    assert_same_posterior(again, la)


def test_state_of_another_posterior_is_refused():
    state = Case("kron", "letters").fitted()[0].state_dict()
    for case in (
        Case("diag", "letters"),
        Case("kron", "mlp"),
        Case("kron, rank 2", "letters"),
        Case("ekfac", "letters"),
    ):
        la, batch = case.fitted()
        before = la(inputs_of(batch))
        with pytest.raises(StateError):
            la.load_state_dict(state)
        assert torch.equal(la(inputs_of(batch)), before)


# Memory -------------------------------------------------------------------------------------------


@LONG
def test_slicing_a_batch_changes_nothing(case, monkeypatch):
    la, _ = case.fitted()
    x = inputs_of(case.batch(5, seed=3))
    for moments in (la._glm_predictive_distribution, lambda x: la.moments_grid(x, INTERVAL[::3])):
        whole = moments(x)
        with monkeypatch.context() as patch:
            patch.setattr("laplace_llm.moments.JACOBIAN_BYTES", 1)
            patch.setattr("laplace_llm.moments.JACOBIAN_SHARE", 0)
            sliced = moments(x)
        for left, right in zip(sliced, whole, strict=True):
            torch.testing.assert_close(left, right, **EXACT)


@LETTERS
def test_prediction_and_gridsearch_never_build_the_jacobian_of_a_batch(case, monkeypatch):
    la, batch = case.fitted()
    sizes, jacobian_blocks = [], la._streaming.jacobian_blocks

    def watched(x, *args):
        blocks, outputs = jacobian_blocks(x, *args)
        sizes.append(len(outputs))
        assert sum(block.nbytes for block in blocks) <= limit
        return blocks, outputs

    limit = 2 * 3 * la.n_params * 8 + 1  # two rows of three outputs in float64
    monkeypatch.setattr("laplace_llm.moments.JACOBIAN_BYTES", limit)
    monkeypatch.setattr("laplace_llm.moments.JACOBIAN_SHARE", 0)
    monkeypatch.setattr(la._streaming, "jacobian_blocks", watched)
    la(select(batch, slice(0, 5)))
    assert sizes == [2, 2, 1]
    sizes.clear()
    la.functional_samples(select(batch, slice(0, 5)), n_samples=2)
    assert sizes == [2, 2, 1]
    sizes.clear()
    la.optimize_prior_precision(val_loader=[batch, batch], **GRID)
    assert sizes == [2, 2, 2] * 2


def test_slices_cut_what_is_batched_and_pass_on_the_rest():
    batch = {"input_ids": torch.arange(10).view(5, 2), "scale": torch.tensor(3.0), "name": "x"}
    parts = list(slices(batch, 2))
    assert [len(part["input_ids"]) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part["input_ids"] for part in parts]), batch["input_ids"])
    assert all(part["scale"] == 3.0 and part["name"] == "x" for part in parts)
    assert list(slices(batch, 5)) == [batch]
