"""The gradient of the validation loss, from covariances that are interpolated."""

import math

import pytest
import torch
from laplace.utils import RunningNLLMetric
from models import chunks, mlp_batch
from test_contract import STRUCTURES
from test_tuning import (
    ALL,
    GRID,
    INTERVAL,
    Loader,
    assert_chosen,
    fitted,
    val,
    val_loss,
    whole,
)
from torch.nn import functional as F

from laplace_llm.errors import OptionError, PriorError
from laplace_llm.tuning.val_grad import NODES_PER_DECADE, Interpolation

SEPARABLE = [s for s in STRUCTURES if s.startswith(("kron", "diag"))]

# Interpolation ------------------------------------------------------------------------------------


def grid_of(low, high):
    return torch.logspace(low, high, NODES_PER_DECADE * (high - low) + 1).double()


def relative_error(result, expected):
    return float((result - expected).norm() / expected.norm())


@ALL
def test_interpolation_between_prior_precisions(structure):
    la, x = fitted(structure), mlp_batch(4, seed=3)[0]
    grid = grid_of(-4, 4)
    covariance_at = Interpolation(grid, la.moments_grid(x, grid).covariance[:, None])
    logs = 4 * math.log(10) * (2 * torch.rand(40, dtype=torch.float64) - 1)
    logs = torch.cat([logs, grid[[0, -1]].log()])
    expected = la.moments_grid(x, logs.exp()).covariance
    for value, covariance in zip(logs, expected, strict=True):
        assert relative_error(covariance_at(value[None]), covariance) < 1e-3
    (slope,) = torch.autograd.functional.jacobian(
        lambda v: covariance_at(v).diagonal(dim1=1, dim2=2).sum()[None], logs[:1]
    )
    steps = la.moments_grid(x, (logs[0] + torch.tensor([1e-5, -1e-5]).double()).exp()).covariance
    difference = (steps[0] - steps[1]).diagonal(dim1=1, dim2=2).sum() / 2e-5
    torch.testing.assert_close(slope[0], difference, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("structure", SEPARABLE)
def test_interpolation_of_each_tensors_part(structure):
    la, x = fitted(structure), mlp_batch(4, seed=3)[0]
    grid = grid_of(-3, 3)
    parts = la.moments_grid(x, grid, layerwise=True).covariance
    total = la.moments_grid(x, grid).covariance
    torch.testing.assert_close(parts.sum(1), total, rtol=1e-9, atol=1e-12)
    covariance_at = Interpolation(grid, parts)
    for _ in range(10):
        logs = 3 * math.log(10) * (2 * torch.rand(len(la.tensors), dtype=torch.float64) - 1)
        la.prior_precision = logs.exp()
        expected = la._glm_predictive_distribution(x)[1]
        assert relative_error(covariance_at(logs), expected) < 1e-3


# Descent ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("structure", "prior_structure"),
    [*((s, "scalar") for s in STRUCTURES), *((s, "layerwise") for s in SEPARABLE)],
)
def test_val_grad_is_no_worse_than_the_grid(structure, prior_structure):
    la, loader = fitted(structure), val()
    la.optimize_prior_precision(
        method="val_grad", val_loader=loader, prior_structure=prior_structure, n_steps=40, **GRID
    )
    assert loader.passes == 1
    assert len(la.prior_precision) == (1 if prior_structure == "scalar" else len(la.tensors))
    assert (la.prior_precision >= 0.99e-2).all()
    assert (la.prior_precision <= 1.01e3).all()
    loss, scalar = val_loss(la, loader), fitted(structure)
    losses = []
    for value in torch.logspace(-2, 3, 21):
        scalar.prior_precision = value
        losses.append(val_loss(scalar, loader))
    assert loss <= min(losses) + 1e-5
    if prior_structure == "layerwise":
        assert loss < min(losses) - 1e-4


def test_val_grad_moves_to_a_stationary_point():
    la, loader = fitted(), val()
    la.optimize_prior_precision(method="val_grad", val_loader=loader, n_steps=200, lr=0.02, **GRID)
    best = float(la.prior_precision)
    assert 2e-2 < best < 5e2
    loss = val_loss(la, loader)
    for factor in (0.98, 1.02):
        la.prior_precision = factor * best
        assert val_loss(la, loader) > loss - 1e-7


def test_val_grad_without_steps_is_a_grid_search():
    la = fitted()
    la.optimize_prior_precision(method="val_grad", val_loader=val(), n_steps=0, **GRID)
    values = torch.logspace(-2, 3, 61)
    fine = {**GRID, "grid_size": 61}
    other = fitted()
    other.optimize_prior_precision(val_loader=val(), **fine)
    torch.testing.assert_close(la.prior_precision, other.prior_precision)
    assert float(la.prior_precision) in (pytest.approx(float(value)) for value in values)


@pytest.mark.parametrize("structure", ["kron", "full"])
def test_val_grad_in_regression(structure):
    x, y = mlp_batch(12, regression=True)
    la = fitted(structure, [(x, y)], "regression", sigma_noise=0.5)
    loader = Loader(chunks(mlp_batch(10, seed=1, regression=True), 4))
    la.optimize_prior_precision(method="val_grad", val_loader=loader, **GRID)
    best, losses = float(la.prior_precision), []
    val_x, val_y = whole(loader)
    for value in [best, *INTERVAL.tolist()]:
        la.prior_precision = value
        mean, covariance = la(val_x)
        deviation = (covariance.diagonal(dim1=1, dim2=2) + 0.25).sqrt()
        normal = torch.distributions.Normal(mean, deviation)
        losses.append(float(-normal.log_prob(val_y).mean()))
    assert losses[0] <= min(losses[1:]) + 1e-5


@pytest.mark.parametrize("link", ["qmc", "mean_field", "probit", "mc"])
def test_val_grad_takes_a_differentiable_loss(link):
    def brier(probabilities, labels):
        return (probabilities - F.one_hot(labels, 3)).square().sum(1).mean()

    la, (x, y) = fitted(), whole(val())
    la.optimize_prior_precision(
        method="val_grad", val_loader=val(), loss=brier, link_approx=link, **GRID
    )
    link, losses = "qmc" if link == "mc" else link, []
    for value in [float(la.prior_precision), *INTERVAL.tolist()]:
        la.prior_precision = value
        losses.append(float(brier(la(x, link_approx=link), y)))
    assert losses[0] <= min(losses[1:]) + 1e-5
    assert losses[0] < max(losses[1:]) - 1e-2


@pytest.mark.parametrize(
    ("structure", "options", "message"),
    [
        ("full", {"prior_structure": "layerwise"}, "do not add up"),
        ("lowrank", {"prior_structure": "layerwise"}, "do not add up"),
        ("lowrank, B", {"prior_structure": "layerwise"}, "do not add up"),
        ("kron", {"prior_structure": "diag"}, "'scalar' or 'layerwise'.*'diag'"),
        ("kron", {"loss": RunningNLLMetric()}, "differentiable.*RunningNLLMetric"),
        ("kron", {"loss": "nll"}, "differentiable.*str"),
        ("kron", {"link_approx": "bridge"}, "gradient.*'bridge'"),
        ("kron", {"link_approx": "logit"}, "link_approx.*'logit'"),
        ("kron", {"val_loader": None}, "val_loader.*'val_grad'"),
    ],
)
def test_val_grad_refuses_before_any_pass(structure, options, message):
    la, loader = fitted(structure), val()
    options = {"method": "val_grad", "val_loader": loader, **options}
    with pytest.raises(OptionError, match=message):
        la.optimize_prior_precision(**options)
    assert loader.passes == 0
    assert_chosen(la, 0.7)


def test_val_grad_needs_a_finite_loss():
    la = fitted()
    with pytest.raises(PriorError, match="finite loss"):
        la.optimize_prior_precision(
            method="val_grad", val_loader=val(), loss=lambda p, y: p.sum() * float("nan")
        )
    assert_chosen(la, 0.7)

    def undefined_where_sure(probabilities, labels):
        loss = F.nll_loss(probabilities.log(), labels)
        return torch.where(probabilities.amax() > 0.9, torch.nan, loss)

    la.optimize_prior_precision(method="val_grad", val_loader=val(), loss=undefined_where_sure)
    x, y = whole(val())
    assert undefined_where_sure(la(x), y).isfinite()


def test_val_grad_needs_a_gradient():
    la = fitted()
    with pytest.raises(OptionError, match=r"no gradient.*gridsearch"):
        la.optimize_prior_precision(
            method="val_grad",
            val_loader=val(),
            loss=lambda p, y: (p.argmax(1) != y).double().mean(),
        )
    assert_chosen(la, 0.7)
