"""Seeds: S S^T is the Hessian of the loss in logit space."""

import pytest
import torch
from torch.nn import functional as F

from laplace_llm.seeds import (
    empirical_seeds,
    regression_seeds,
    sampled_regression_seeds,
    sampled_softmax_seeds,
    softmax_seeds,
)


def logits_for(classes, n=6, scale=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, classes, generator=generator, dtype=torch.float64)


def softmax_hessian(logits):
    p = torch.softmax(logits, -1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]


@pytest.mark.parametrize("classes", [2, 3, 4, 7])
def test_softmax_seeds_are_a_factor_of_the_hessian(classes):
    logits = logits_for(classes)
    S = softmax_seeds(logits)
    assert S.shape == (6, classes, classes - 1)
    torch.testing.assert_close(S @ S.mT, softmax_hessian(logits), rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_softmax_seeds_have_rank_one_less_than_classes(classes):
    S = softmax_seeds(logits_for(classes))
    assert torch.linalg.matrix_rank(S).tolist() == [classes - 1] * 6
    torch.testing.assert_close(S.sum(1), torch.zeros(6, classes - 1).double(), rtol=0, atol=1e-14)


def test_softmax_seeds_agree_with_autograd():
    logits = logits_for(4, n=1)
    hessian = torch.func.hessian(lambda f: F.cross_entropy(f, torch.tensor([1])))(logits)
    S = softmax_seeds(logits)[0]
    torch.testing.assert_close(S @ S.T, hessian[0, :, 0], rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("gap", [20.0, 50.0, 800.0])
@pytest.mark.parametrize("hot", [0, 1, 3])
def test_softmax_seeds_near_one_hot(gap, hot):
    logits = logits_for(4, scale=1.0)
    logits[:, hot] += gap
    S = softmax_seeds(logits)
    assert S.isfinite().all()
    torch.testing.assert_close(S @ S.mT, softmax_hessian(logits), rtol=1e-8, atol=3e-16)


def test_softmax_seeds_in_float32():
    logits = logits_for(4)
    S = softmax_seeds(logits.float())
    assert S.dtype == torch.float32
    torch.testing.assert_close((S @ S.mT).double(), softmax_hessian(logits), rtol=1e-5, atol=1e-6)


def test_softmax_seeds_do_not_depend_on_a_shift_of_the_logits():
    logits = logits_for(3)
    torch.testing.assert_close(softmax_seeds(logits + 100), softmax_seeds(logits))


@pytest.mark.parametrize("samples", [1, 2])
def test_sampled_softmax_seeds_converge_to_the_hessian(samples):
    n = 40_000
    logits = logits_for(3, n=1).expand(n, 3)
    torch.manual_seed(0)
    S = sampled_softmax_seeds(logits, samples)
    assert S.shape == (n, 3, samples)
    p = torch.softmax(logits[0], -1)
    expected = softmax_hessian(logits[:1])[0]
    residuals = p - torch.eye(3).double()  # one row for each label that may be drawn
    outer = residuals[:, :, None] * residuals[:, None, :]
    variance = (p[:, None, None] * (outer - expected) ** 2).sum(0) / (n * samples)
    error = (S @ S.mT).mean(0) - expected
    assert (error.abs() <= 5 * variance.sqrt()).all()


def test_regression_seeds_are_the_identity():
    S = regression_seeds(logits_for(3))
    torch.testing.assert_close(S @ S.mT, torch.eye(3).double().expand(6, 3, 3), rtol=0, atol=0)


def test_sampled_regression_seeds_converge_to_the_identity():
    n, samples = 20_000, 2
    torch.manual_seed(0)
    S = sampled_regression_seeds(torch.zeros(n, 3).double(), samples)
    assert S.shape == (n, 3, samples)
    # The variance of a squared normal is 2, that of a product of two is 1.
    deviation = ((torch.eye(3).double() + 1) / (n * samples)).sqrt()
    error = (S @ S.mT).mean(0) - torch.eye(3).double()
    assert (error.abs() <= 5 * deviation).all()


def test_empirical_seeds_are_the_gradient_of_cross_entropy():
    logits, labels = logits_for(4).requires_grad_(), torch.tensor([0, 3, 1, 1, 2, 0])
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), logits)
    torch.testing.assert_close(empirical_seeds(logits.detach(), labels, False)[:, :, 0], gradient)


def test_empirical_seeds_of_regression_follow_the_parents_convention():
    outputs, targets = logits_for(2).requires_grad_(), logits_for(2, seed=1)
    (gradient,) = torch.autograd.grad(F.mse_loss(outputs, targets, reduction="sum"), outputs)
    S = empirical_seeds(outputs.detach(), targets, True)
    torch.testing.assert_close(S @ S.mT, 0.5 * gradient[:, :, None] * gradient[:, None, :])


@pytest.mark.parametrize("confident", range(4))
def test_softmax_seeds_keep_their_relative_accuracy_when_confident(confident):
    logits = torch.tensor([[0.3, -0.2, 0.1, 0.0]])
    logits[0, confident] += 40
    probabilities = logits.double().softmax(-1)
    products = probabilities[:, :, None] * probabilities[:, None, :]
    products = products - torch.diag_embed(products.diagonal(dim1=1, dim2=2))
    exact = torch.diag_embed(products.sum(-1)) - products  # no 1 - p, so nothing cancels
    S = softmax_seeds(logits)
    torch.testing.assert_close((S @ S.mT).double(), exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("present", [[1, 1, 0, 1], [0, 1, 1, 0], [0, 0, 0, 1]])
def test_seeds_of_the_present_choices(present):
    here = torch.tensor(present).bool()
    logits = logits_for(4).masked_fill(~here, -torch.inf)
    own = torch.zeros(6, 4, 4).double()
    own[:, here[:, None] & here] = softmax_hessian(logits[:, here]).flatten(1)
    labels = here.nonzero()[-1].expand(6)
    residuals = torch.softmax(logits, -1) - F.one_hot(labels, 4)
    torch.manual_seed(0)
    sampled = sampled_softmax_seeds(logits, 5)
    for seeds in (softmax_seeds(logits), sampled, empirical_seeds(logits, labels, False)):
        assert seeds.isfinite().all()
        assert not seeds[:, ~here].any()
    S = softmax_seeds(logits)
    torch.testing.assert_close(S @ S.mT, own, rtol=1e-10, atol=1e-15)
    torch.testing.assert_close(empirical_seeds(logits, labels, False)[:, :, 0], residuals)
    # Every sampled column is a residual of a present choice.
    drawn = (torch.softmax(logits, -1)[:, :, None] - 5**0.5 * sampled).round()
    assert torch.equal(drawn.sum(1), torch.ones(6, 5).double())
