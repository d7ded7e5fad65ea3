"""The links: expected softmax of Gaussian logits, and what must leave it alone."""

import math

import pytest
import torch
from models import chunks, mlp_batch, randn, tiny_mlp

from laplace_llm import DiagLoraLaplace, FullLoraLaplace, KronLoraLaplace, LowRankLoraLaplace
from laplace_llm.links import CLOSED_FORMS, mean_field, probit, quasi_monte_carlo

EXACT = {"rtol": 1e-10, "atol": 1e-12}
INTEGRALS = {"mean_field": mean_field, "qmc": quasi_monte_carlo}
EACH_LINK = pytest.mark.parametrize("link", CLOSED_FORMS.values(), ids=CLOSED_FORMS)
EACH_INTEGRAL = pytest.mark.parametrize("link", INTEGRALS.values(), ids=INTEGRALS)
CLASSES = pytest.mark.parametrize("classes", [2, 3, 5, 10])


def gaussians(n, classes, seed=0, decades=(-1.0, 1.5)):
    """Return means and covariances of logits, the latter from small to large."""
    scales = torch.logspace(*decades, n).double()[:, None, None]
    root = randn(n, classes, classes, seed=seed)
    return 2 * randn(n, classes, seed=seed + 1), scales * root @ root.mT / classes


def monte_carlo(mean, covariance, samples=50_000):
    """Return the expected softmax of each row, to a standard error of at most 0.0023."""
    rows = []
    for m, c in zip(mean, covariance, strict=True):
        values, vectors = torch.linalg.eigh(c)
        noise = torch.randn(samples, len(m), generator=torch.Generator().manual_seed(1)).double()
        logits = m + noise @ (vectors * values.clamp_min(0).sqrt()).T
        rows.append(torch.softmax(logits, -1).mean(0))
    return torch.stack(rows)


def quadrature(mean, covariance, points=40_001):
    """Return the two classes' probabilities by the trapezoidal rule on their difference."""
    difference = mean[:, 0] - mean[:, 1]
    variance = covariance[:, 0, 0] + covariance[:, 1, 1] - 2 * covariance[:, 0, 1]
    z = torch.linspace(-12, 12, points).double()
    values = torch.sigmoid(difference[:, None] + variance.sqrt()[:, None] * z)
    first = torch.trapezoid(values * torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi), z)
    return torch.stack([first, 1 - first], 1)


# Accuracy -----------------------------------------------------------------------------------------


@CLASSES
def test_quasi_monte_carlo_equals_monte_carlo(classes):
    """Allowed: 0.012 for the largest of the 60 to 300 errors, 0.003 in quadratic mean."""
    mean, covariance = gaussians(30, classes)
    error = quasi_monte_carlo(mean, covariance) - monte_carlo(mean, covariance)
    assert error.abs().max() < 0.012
    assert error.square().mean().sqrt() < 0.003


def test_quasi_monte_carlo_converges():
    mean, covariance = gaussians(60, 4)
    truth = quasi_monte_carlo(mean, covariance, 2**16)
    errors = [
        float((quasi_monte_carlo(mean, covariance, points) - truth).square().mean().sqrt())
        for points in (2**6, 2**9, 2**12)
    ]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


@CLASSES
@pytest.mark.parametrize(("decades", "limit"), [((-2.0, 0.0), 0.08), ((-1.0, 1.5), 0.2)])
def test_mean_field_is_near_monte_carlo(classes, decades, limit):
    """Allowed: 0.08 for the largest error where standard deviations are up to one, else 0.2."""
    mean, covariance = gaussians(30, classes, decades=decades)
    truth = monte_carlo(mean, covariance)
    error = mean_field(mean, covariance) - truth
    assert error.abs().max() < limit
    plain = torch.softmax(mean, -1) - truth
    assert error.square().mean() < 0.6 * plain.square().mean()


def test_two_classes_against_quadrature():
    mean, covariance = gaussians(60, 2, decades=(-3.0, 3.0))
    truth = quadrature(mean, covariance)
    assert (quasi_monte_carlo(mean, covariance) - truth).abs().max() < 2e-3
    assert (mean_field(mean, covariance) - truth).abs().max() < 0.02


def test_two_classes_in_the_mean_field_are_a_sigmoid_probit():
    mean, covariance = gaussians(60, 2)
    variance = covariance[:, 0, 0] + covariance[:, 1, 1] - 2 * covariance[:, 0, 1]
    scaled = (mean[:, 0] - mean[:, 1]) / (1 + math.pi / 8 * variance).sqrt()
    expected = torch.stack([torch.sigmoid(scaled), torch.sigmoid(-scaled)], 1)
    torch.testing.assert_close(mean_field(mean, covariance), expected, **EXACT)


def test_probit_scales_each_logit_by_its_own_variance():
    mean, covariance = gaussians(60, 4)
    scaled = [
        [m / math.sqrt(1 + math.pi / 8 * c[k, k]) for k, m in enumerate(row)]
        for row, c in zip(mean.tolist(), covariance, strict=True)
    ]
    expected = torch.softmax(torch.tensor(scaled, dtype=torch.float64), -1)
    torch.testing.assert_close(probit(mean, covariance), expected, **EXACT)


# What changes nothing -----------------------------------------------------------------------------


@EACH_LINK
@CLASSES
def test_without_covariance_it_is_a_softmax(link, classes):
    mean = 5 * randn(20, classes)
    zeros = torch.zeros(20, classes, classes).double()
    torch.testing.assert_close(link(mean, zeros), torch.softmax(mean, -1), **EXACT)


@EACH_LINK
def test_one_class_is_certain(link):
    ones = torch.ones(3, 1).double()
    torch.testing.assert_close(link(randn(3, 1), torch.ones(3, 1, 1).double()), ones, **EXACT)


@EACH_INTEGRAL
@CLASSES
@pytest.mark.parametrize("shared", [0.3, 100.0])
def test_what_all_logits_share_changes_nothing(link, classes, shared):
    mean, covariance = gaussians(20, classes)
    shifted = link(mean + 7.0, covariance + shared)
    torch.testing.assert_close(shifted, link(mean, covariance), rtol=1e-9, atol=1e-11)


@EACH_LINK
def test_permuting_classes_permutes_the_result(link):
    mean, covariance = gaussians(20, 5)
    order = torch.tensor([3, 0, 4, 1, 2])
    permuted = link(mean[:, order], covariance[:, order][:, :, order])
    torch.testing.assert_close(permuted, link(mean, covariance)[:, order], **EXACT)


def indefinite():
    """Return a matrix that is no covariance, as interpolation may leave one."""
    vectors = torch.linalg.qr(randn(4, 4, seed=3))[0]
    return vectors * torch.tensor([2.0, 1.0, 0.5, -1e-4]).double() @ vectors.T


@EACH_LINK
@pytest.mark.parametrize("other", [torch.zeros(4, 4), 1e12 * torch.eye(4), indefinite()])
def test_a_row_does_not_depend_on_the_rest_of_the_batch(link, other):
    mean, covariance = gaussians(6, 4)
    alone = torch.cat([link(mean[i : i + 1], covariance[i : i + 1]) for i in range(5)])
    covariance[5] = other
    torch.testing.assert_close(link(mean, covariance)[:5], alone, **EXACT)


@EACH_LINK
def test_independent_logits_may_be_given_as_variances(link):
    mean, variances = randn(20, 4), randn(20, 4, seed=1).square()
    expected = link(mean, torch.diag_embed(variances))
    assert torch.equal(link(mean, variances), expected)


@EACH_LINK
def test_two_calls_agree_whatever_the_seed(link):
    mean, covariance = gaussians(20, 4)
    first = link(mean, covariance)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert torch.equal(link(mean, covariance), first)
    assert torch.equal(torch.get_rng_state(), state)


@EACH_LINK
def test_inputs_are_left_alone(link):
    mean, covariance = gaussians(20, 4)
    copies = mean.clone(), covariance.clone()
    link(mean, covariance)
    assert torch.equal(mean, copies[0])
    assert torch.equal(covariance, copies[1])


# Extremes -----------------------------------------------------------------------------------------

ONES = torch.ones(3, 3).double()
LINE = torch.tensor([1.0, -2.0, 0.5]).double()
EXTREMES = {
    "equal logits": ONES,
    "rank one": torch.outer(LINE, LINE),
    "rank one, huge": 1e12 * torch.outer(LINE, LINE),
    "zero": 0 * ONES,
    "huge": 1e12 * torch.eye(3).double(),
    "tiny": 1e-30 * torch.eye(3).double(),
    "below single precision": 1e-60 * torch.eye(3).double(),
    "scales": torch.tensor([1e-12, 1.0, 1e12]).double().diag(),
    "one certain": torch.tensor([0.0, 1.0, 1.0]).double().diag(),
    "indefinite by rounding": torch.outer(LINE, LINE) - 1e-9 * torch.eye(3).double(),
}


@EACH_LINK
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("covariance", EXTREMES.values(), ids=EXTREMES)
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_extremes_give_probabilities(link, dtype, covariance, scale):
    mean = (scale * torch.tensor([[0.3, -1.0, 2.0], [1.0, 1.0, 1.0]])).to(dtype)
    probabilities = link(mean, covariance.to(dtype).expand(2, 3, 3))
    assert probabilities.dtype == dtype
    assert (probabilities >= 0).all()
    torch.testing.assert_close(probabilities.sum(1), torch.ones(2, dtype=dtype))


@EACH_LINK
def test_single_precision(link):
    mean, covariance = gaussians(20, 5)
    single = link(mean.float(), covariance.float())
    torch.testing.assert_close(single, link(mean, covariance).float(), rtol=0, atol=2e-5)


# Choices that a row does not have -----------------------------------------------------------------

PRESENT = torch.tensor(
    [[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 1, 0]]
).bool()


def ragged_gaussians():
    """Return moments whose absent choices have covariances too, of which nothing may be seen."""
    mean, covariance = gaussians(5, 4)
    return mean.masked_fill(~PRESENT, -torch.inf), covariance


@EACH_LINK
@pytest.mark.parametrize("diagonal", [False, True])
def test_absent_choices_are_impossible_and_leave_the_others_alone(link, diagonal):
    mean, covariance = ragged_gaussians()
    if diagonal:
        covariance = covariance.diagonal(dim1=1, dim2=2)
    probabilities = link(mean, covariance)
    assert torch.equal(probabilities > 0, PRESENT)
    for row, here, m, c in zip(probabilities, PRESENT, mean, covariance, strict=True):
        block = c[here] if diagonal else c[here][:, here]
        torch.testing.assert_close(row[here], link(m[here][None], block[None])[0], **EXACT)


@EACH_LINK
def test_absent_choices_have_no_gradient(link):
    mean, covariance = ragged_gaussians()
    mean.requires_grad_()
    covariance.requires_grad_()
    value = link(mean, covariance).square().sum()
    for gradient in torch.autograd.grad(value, (mean, covariance)):
        assert gradient.isfinite().all()
        assert not gradient[~PRESENT].any()
    assert torch.autograd.gradcheck(lambda c: link(mean.detach(), c @ c.mT), covariance)


@pytest.mark.parametrize("link", [probit, mean_field])
def test_absent_choices_in_a_grid_of_moments(link):
    mean, covariance = (part.expand(3, *part.shape) for part in ragged_gaussians())
    scales = torch.tensor([0.1, 1.0, 10.0]).double()[:, None, None, None]
    result = link(mean, scales * covariance)
    for row, m, c in zip(result, mean, scales * covariance, strict=True):
        torch.testing.assert_close(row, link(m, c), **EXACT)


# Gradients ----------------------------------------------------------------------------------------


@EACH_LINK
@pytest.mark.parametrize("rank", [4, 1])
def test_gradients(link, rank):
    mean, root = randn(3, 4).requires_grad_(), randn(3, 4, rank, seed=1).requires_grad_()
    # Of a singular covariance the jitter (1e-14) is seen by steps in it, so steps in its root.
    ridge = 0.01 * torch.eye(4).double() if rank == 1 else 0.0
    assert torch.autograd.gradcheck(lambda m, r: link(m, r @ r.mT + ridge), (mean, root))


@EACH_LINK
def test_gradients_are_finite_where_a_row_is_no_covariance(link):
    mean, covariance = gaussians(3, 4)
    covariance[1], covariance[2] = indefinite(), 0.0
    mean.requires_grad_()
    covariance.requires_grad_()
    gradients = torch.autograd.grad(link(mean, covariance)[:, 0].sum(), (mean, covariance))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_gradients_after_a_first_call_in_inference_mode():
    mean, covariance = gaussians(3, 4)
    points = 2**7  # no other test uses so many, so none has made them yet
    with torch.inference_mode():
        quasi_monte_carlo(mean, covariance, points)
    covariance.requires_grad_()
    quasi_monte_carlo(mean, covariance, points)[:, 0].sum().backward()
    assert covariance.grad.abs().sum() > 0


# In the predictive --------------------------------------------------------------------------------

POSTERIORS = [KronLoraLaplace, LowRankLoraLaplace, DiagLoraLaplace, FullLoraLaplace]


def fitted(cls, likelihood="classification"):
    batch = mlp_batch(12, regression=likelihood == "regression")
    la = cls(tiny_mlp(), likelihood, prior_precision=0.3)
    la.fit(chunks(batch, 5))
    return la, batch[0]


@pytest.mark.parametrize("cls", POSTERIORS)
def test_predictions_are_links_of_the_moments(cls):
    la, x = fitted(cls)
    mean, covariance = la._glm_predictive_distribution(x)
    diagonal = torch.diag_embed(covariance.diagonal(dim1=1, dim2=2))
    for name, link in CLOSED_FORMS.items():
        expected = link(mean, covariance)
        torch.testing.assert_close(la(x, link_approx=name), expected, **EXACT)
    assert torch.equal(la(x), la(x, link_approx="qmc"))
    assert not torch.allclose(la(x), la(x, link_approx="probit"), atol=1e-3)
    for name, link in INTEGRALS.items():
        marginal = la(x, link_approx=name, diagonal_output=True)
        torch.testing.assert_close(marginal, link(mean, diagonal), **EXACT)
        assert not torch.allclose(marginal, la(x, link_approx=name), atol=1e-4)


def test_the_default_is_what_sampling_converges_to():
    """Allowed: 0.02, as 10,000 samples have a standard error of at most 0.005."""
    la, x = fitted(KronLoraLaplace)
    sampled = la(x, link_approx="mc", n_samples=10_000)
    assert (la(x) - sampled).abs().max() < 0.02


@pytest.mark.parametrize("cls", POSTERIORS)
def test_regression_has_no_link(cls):
    la, x = fitted(cls, "regression")
    moments = la._glm_predictive_distribution(x)
    for link in ("qmc", "mean_field", "probit"):
        for result, expected in zip(la(x, link_approx=link), moments, strict=True):
            assert torch.equal(result, expected)


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_sampled_weights_need_the_mc_link(likelihood):
    la, x = fitted(KronLoraLaplace, likelihood)
    with pytest.raises(ValueError, match="Only mc link approximation is supported for nn"):
        la(x, pred_type="nn")
