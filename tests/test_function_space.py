"""The linear model in function space, against the same model in the space of its weights."""

import pytest
import torch
from models import explicit_ggn, randn
from torch.nn import functional as F

from laplace_llm.contrasts import choice_contrasts
from laplace_llm.function_space import FunctionSpace

EXACT = {"rtol": 1e-7, "atol": 1e-9}
DELTAS = [0.05, 1.0, 30.0]


class Linear:
    """Outputs ``b + J w`` with ``w ~ N(0, 1 / delta)``: explicit weights, dense matrices."""

    def __init__(self, n=8, c=3, p=20, regression=False, factor=1.0, scale=1.0, ragged=False):
        self.jacobians = scale * randn(n, c, p)
        self.bias = randn(n, c, seed=1)
        self.regression, self.factor, self.c = regression, factor, c
        generator = torch.Generator().manual_seed(2)
        self.labels = torch.randint(c, (n,), generator=generator)
        if regression:
            self.labels = randn(n, c, seed=2)
        self.present = torch.ones(n, c, dtype=torch.bool)
        if ragged:  # of one to c choices, which may be any
            self.present = torch.rand(n, c, generator=generator) > 0.4
            self.present[torch.arange(n), self.labels] = True
            self.bias = self.bias.masked_fill(~self.present, -torch.inf)
            self.jacobians = self.jacobians * self.present[..., None]
        # Where it was trained to is another point altogether.
        self.trained = self.outputs(0.3 * randn(p, seed=3))

    def outputs(self, weights):
        return self.bias + self.jacobians @ weights

    def without(self, i):
        """Return the model that has not seen example i."""
        rest = Linear.__new__(Linear)
        rest.__dict__.update(self.__dict__)
        keep = torch.arange(len(self.bias)) != i
        for name in ("jacobians", "bias", "labels", "trained", "present"):
            setattr(rest, name, getattr(self, name)[keep])
        return rest

    def log_likelihood(self, outputs):
        if self.regression:
            return -0.5 * self.factor * (self.labels - outputs).square().sum()
        return -self.factor * F.cross_entropy(outputs, self.labels, reduction="sum")

    def curvature(self, outputs):
        logits = None if self.regression else outputs
        return self.factor * explicit_ggn(self.jacobians, logits)

    def precision(self, outputs, delta):
        return self.curvature(outputs) + delta * torch.eye(self.jacobians.shape[2]).double()

    def fit(self, delta, start=None):
        """Return the weights that minimise the penalised loss: Newton's method with halving."""

        def energy(w):
            return 0.5 * delta * w.square().sum() - self.log_likelihood(self.outputs(w))

        weights = torch.zeros(self.jacobians.shape[2]).double() if start is None else start
        for _ in range(200):
            gradient = torch.func.grad(energy)(weights)
            if gradient.abs().max() < 1e-10:
                break
            step = torch.linalg.solve(self.precision(self.outputs(weights), delta), gradient)
            size = 1.0
            while energy(weights - size * step) > energy(weights) and size > 1e-12:
                size /= 2
            weights = weights - size * step
        return weights

    def space(self):
        basis = choice_contrasts(self.present, self.bias)
        if self.regression:
            basis = torch.eye(self.c).double().expand(len(self.bias), -1, -1)
        features = (basis.mT @ self.jacobians).flatten(0, 1)
        return FunctionSpace(
            *(
                torch.einsum("nc,nck->nk", f.nan_to_num(neginf=0), basis)
                for f in (self.trained, self.bias)
            ),
            self.labels,
            features @ features.T,
            self.factor,
            None if self.present.all() else self.present,
        )

    def project(self, outputs, present=None):
        """Return outputs less what the present classes share; for regression, as they are."""
        if self.regression:
            return outputs
        present = self.present if present is None else present
        shared = outputs.where(present, 0).sum(-1, keepdim=True) / present.sum(-1, keepdim=True)
        return outputs - shared


LINEARS = {
    "three classes": {},
    "two classes": {"c": 2},
    "five classes": {"c": 5},
    "more data than weights": {"n": 15, "p": 6},
    "temperature": {"factor": 1 / 0.3},
    "strong features": {"scale": 5.0},
    "some of four classes": {"c": 4, "ragged": True},
    "some of four classes, temperature": {"c": 4, "ragged": True, "factor": 1 / 0.3},
    "regression": {"regression": True, "factor": 1 / 0.7**2},
    "regression, one output": {"regression": True, "c": 1},
}
EACH_LINEAR = pytest.mark.parametrize("options", LINEARS.values(), ids=LINEARS)
EACH_DELTA = pytest.mark.parametrize("delta", DELTAS)


# The mode -----------------------------------------------------------------------------------------


@EACH_LINEAR
@EACH_DELTA
def test_mode_minimises_the_penalised_loss(options, delta):
    linear = Linear(**options)
    space = linear.space()
    mode = space.mode(delta)
    weights = linear.fit(delta)
    outputs = linear.outputs(weights)
    torch.testing.assert_close(space.outputs(mode.latent), linear.project(outputs), **EXACT)
    outputs.requires_grad_()
    (gradient,) = torch.autograd.grad(linear.log_likelihood(outputs), outputs)
    dual = (mode.dual[:, None] @ space.basis.mT)[:, 0]
    torch.testing.assert_close(dual, gradient, **EXACT)
    # The dual's norm under the kernel is that of the weights.
    norm = mode.dual.flatten() @ space.kernel @ mode.dual.flatten() / delta
    torch.testing.assert_close(norm, delta * weights.square().sum(), **EXACT)
    expected = linear.log_likelihood(outputs)
    torch.testing.assert_close(space.log_likelihood(mode.latent), expected.detach(), **EXACT)


@EACH_LINEAR
def test_mode_does_not_depend_on_where_it_starts(options):
    space = Linear(**options).space()
    expected = space.mode(0.3)
    for start in (1e-3, 0.29, 1e4):
        for result, value in zip(space.mode(0.3, space.mode(start)), expected, strict=True):
            torch.testing.assert_close(result, value, **EXACT)


@EACH_LINEAR
@EACH_DELTA
def test_log_evidence_equals_the_dense_formula(options, delta):
    linear = Linear(**options)
    weights = linear.fit(delta)
    outputs = linear.outputs(weights)
    logdet = torch.logdet(linear.precision(outputs, delta) / delta)
    prior = 0.5 * delta * weights.square().sum()
    expected = linear.log_likelihood(outputs) - prior - 0.5 * logdet
    evidence, mode = linear.space().log_evidence(delta)
    torch.testing.assert_close(evidence, expected, **EXACT)
    torch.testing.assert_close(mode.latent, linear.space().mode(delta).latent, **EXACT)


# Leave one out ------------------------------------------------------------------------------------


def centred(linear, covariance, i):
    """Return an example's covariance less what its choices share."""
    if linear.regression:
        return covariance
    here = linear.present[i].double()
    centre = here.diag() - here.outer(here) / here.sum()
    return centre @ covariance @ centre


def refit(linear, i, delta):
    """Return the mean and covariance of example i from a fit to the others."""
    rest = linear.without(i)
    weights = rest.fit(delta)
    covariance = torch.linalg.inv(rest.precision(rest.outputs(weights), delta))
    j = linear.jacobians[i]
    mean = linear.project(linear.bias[i] + j @ weights, linear.present[i])
    return mean, centred(linear, j @ covariance @ j.T, i)


@EACH_DELTA
@pytest.mark.parametrize("options", [{}, {"c": 1}, {"n": 15, "p": 6}, {"factor": 4.0}])
def test_leave_one_out_is_exact_in_regression(options, delta):
    linear = Linear(regression=True, **options)
    space = linear.space()
    moments = space.leave_one_out(space.mode(delta), delta)
    for i in range(len(linear.bias)):
        mean, covariance = refit(linear, i, delta)
        torch.testing.assert_close(moments.mean[i], mean, **EXACT)
        torch.testing.assert_close(moments.covariance[i], covariance, **EXACT)


@EACH_LINEAR
@EACH_DELTA
@pytest.mark.parametrize("ratio", [1.0, 0.1])
def test_leave_one_out_equals_its_formula_in_weight_space(options, delta, ratio):
    """The example's own curvature is taken off the precision; also where the mode is another's."""
    linear = Linear(**options)
    space = linear.space()
    outputs = linear.outputs(linear.fit(ratio * delta))
    moments = space.leave_one_out(space.mode(ratio * delta), delta)
    precision = linear.precision(outputs, delta)
    at = outputs.clone().requires_grad_()
    (residuals,) = torch.autograd.grad(linear.log_likelihood(at), at)
    for i, j in enumerate(linear.jacobians):
        p = torch.softmax(outputs[i], -1)
        hessian = torch.eye(linear.c).double() if linear.regression else p.diag() - p.outer(p)
        cavity = torch.linalg.inv(precision - linear.factor * j.T @ hessian @ j)
        covariance = centred(linear, j @ cavity @ j.T, i)
        mean = linear.project(outputs[i], linear.present[i]) - covariance @ residuals[i]
        torch.testing.assert_close(moments.covariance[i], covariance, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(moments.mean[i], mean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [{"n": 30, "p": 8}, {"n": 30, "p": 8, "c": 2}])
@pytest.mark.parametrize(("delta", "limit"), [(1.0, 0.3), (30.0, 0.02)])
def test_leave_one_out_is_close_to_refitting(options, delta, limit):
    """Allowed: 0.3 (weak prior) or 0.02 of a distribution's width, and of a covariance's size."""
    linear = Linear(**options)
    space = linear.space()
    moments = space.leave_one_out(space.mode(delta), delta)
    for i in range(30):
        mean, covariance = refit(linear, i, delta)
        width = covariance.trace().sqrt()
        assert (moments.mean[i] - mean).norm() < limit * width
        error = torch.linalg.matrix_norm(moments.covariance[i] - covariance)
        assert error < limit * torch.linalg.matrix_norm(covariance)


# Invariances --------------------------------------------------------------------------------------


def permuted(space, order):
    k = space.trained.shape[1]
    rows = (k * order[:, None] + torch.arange(k)).flatten()
    return FunctionSpace(
        space.trained[order],
        space.initial[order],
        space.labels[order],
        space.kernel[rows][:, rows],
        space.factor,
        None if space.present is None else space.present[order],
    )


@EACH_LINEAR
def test_order_of_examples_does_not_matter(options):
    space = Linear(**options).space()
    order = torch.randperm(len(space.trained), generator=torch.Generator().manual_seed(0))
    other = permuted(space, order)
    for delta in DELTAS:
        (value, mode), (expected, reference) = (s.log_evidence(delta) for s in (other, space))
        torch.testing.assert_close(value, expected, **EXACT)
        torch.testing.assert_close(mode.latent, reference.latent[order], **EXACT)
        moments, truth = (s.leave_one_out(m, delta) for s, m in ((other, mode), (space, reference)))
        torch.testing.assert_close(moments.mean, truth.mean[order], **EXACT)
        torch.testing.assert_close(moments.covariance, truth.covariance[order], **EXACT)


def test_a_temperature_divides_the_likelihood_and_multiplies_the_prior():
    """At temperature T everything is as at T = 1 under T times the prior precision, but V is."""
    cold, warm = Linear(factor=4.0).space(), Linear().space()
    mode, expected = cold.mode(2.0), warm.mode(0.5)
    torch.testing.assert_close(mode.latent, expected.latent, **EXACT)
    torch.testing.assert_close(mode.dual, 4 * expected.dual, **EXACT)
    moments, truth = cold.leave_one_out(mode, 2.0), warm.leave_one_out(expected, 0.5)
    torch.testing.assert_close(moments.mean, truth.mean, **EXACT)
    torch.testing.assert_close(4 * moments.covariance, truth.covariance, **EXACT)


# Extremes -----------------------------------------------------------------------------------------


def check_finite(space, deltas):
    mode = None
    for delta in deltas:
        evidence, mode = space.log_evidence(delta, mode)
        moments = space.leave_one_out(mode, delta)
        assert evidence.isfinite()
        assert mode.latent.isfinite().all()
        here = torch.ones_like(moments.mean).bool() if space.present is None else space.present
        assert torch.equal(moments.mean.isfinite(), here)
        assert torch.equal(moments.mean == -torch.inf, ~here)
        lowest = torch.linalg.eigvalsh(moments.covariance)[:, 0]
        assert (lowest >= -1e-9 * moments.covariance.abs().amax((1, 2))).all()


@EACH_LINEAR
@pytest.mark.parametrize("descending", [True, False])
def test_extreme_prior_precisions(options, descending):
    deltas = torch.logspace(-8, 8, 17).double().tolist()
    check_finite(Linear(**options).space(), deltas[::-1] if descending else deltas)


@pytest.mark.parametrize("delta", [1e-8, 1e-4, 1e4, 1e8])
@pytest.mark.parametrize(
    "options",
    [{}, {"c": 2}, {"n": 15, "p": 6}, {"regression": True}, {"c": 4, "ragged": True}],
)
def test_leave_one_out_under_extreme_prior_precisions(options, delta):
    """The covariance still is that of the formula, to 1e-3 of it."""
    linear = Linear(**options)
    space = linear.space()
    mode = space.mode(1.0)
    outputs = linear.outputs(linear.fit(1.0))
    moments = space.leave_one_out(mode, delta)
    for i, j in enumerate(linear.jacobians):
        rest = linear.without(i)
        roots = rest.jacobians
        if not linear.regression:
            p = torch.softmax(outputs[torch.arange(len(outputs)) != i], -1)
            values, vectors = torch.linalg.eigh(torch.diag_embed(p) - p[:, :, None] * p[:, None])
            roots = (values.clamp_min(0).sqrt()[:, :, None] * vectors.mT) @ roots
        # By singular values, in which small precisions are not lost beside large ones.
        singular = torch.linalg.svd(roots.flatten(0, 1))
        curvature = torch.zeros(j.shape[1]).double()
        curvature[: len(singular.S)] = singular.S.square()
        rotated = j @ singular.Vh.T
        expected = centred(linear, (rotated / (curvature + delta)) @ rotated.T, i)
        error = torch.linalg.matrix_norm(moments.covariance[i] - expected)
        assert error <= 1e-3 * torch.linalg.matrix_norm(expected)


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("classes", [2, 4])
def test_confident_examples(classes, right):
    linear = Linear(c=classes)
    target = linear.labels if right else (linear.labels + 1) % classes
    space = linear.space()
    certain = 1e3 * F.one_hot(target, classes).double() @ space.basis
    for initial in (certain, space.initial):
        confident = FunctionSpace(certain, initial, space.labels, space.kernel)
        check_finite(confident, [1e4, 1.0, 1e-4])


def test_no_features_leave_the_prior_mean():
    space = Linear().space()
    empty = FunctionSpace(space.trained, space.initial, space.labels, 0 * space.kernel)
    evidence, mode = empty.log_evidence(1.0)
    assert torch.equal(mode.latent, space.initial)
    torch.testing.assert_close(evidence, empty.log_likelihood(space.initial), **EXACT)
    moments = empty.leave_one_out(mode, 1.0)
    torch.testing.assert_close(moments.mean, space.initial @ space.basis.T, **EXACT)
    assert torch.equal(moments.covariance, torch.zeros(8, 3, 3).double())
