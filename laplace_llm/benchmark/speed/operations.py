"""Our rows: what each one sets up and runs."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from laplace import Laplace
from torch import Tensor
from torch.nn import functional as F

import laplace_llm  # noqa: F401  # registers subset_of_weights="lora"
from laplace_llm.benchmark.speed.floors import forwards, sweep
from laplace_llm.benchmark.speed.presets import Problem
from laplace_llm.kernel import training_space
from laplace_llm.links import quasi_monte_carlo
from laplace_llm.tuning.leave_one_out import leave_one_out
from laplace_llm.tuning.val_grad import NODES_PER_DECADE, descend

VALIDATION_BATCHES = 2
# What tuning is given to choose from after its pass: about as many questions as in the README.
TUNING_QUESTIONS = 50
NN_SAMPLES = 10


@dataclass(frozen=True)
class Operation:
    """What a row runs once everything is set up.

    Attributes
    ----------
    run : Callable
        The operation.
    floor : Callable, optional
        The least work that could do the same.
    floor_name : str
        What that is.
    times : int, default=1
        The whole operation is so many times what `run` does; its seconds are extrapolated.
    """

    run: Callable[[], Any]
    floor: Callable[[], Any] | None = None
    floor_name: str = ""
    times: int = 1


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes
    ----------
    name : str
        Of the operation, for ``--rows``; peers' rows share it.
    title : str
        Of the operation, in the table.
    set_up : Callable
        Makes the operation; neither its time nor its memory counts.
    who : str
        Whose code runs.
    choices : int, optional
        Instead of the workload's.
    on_meta : bool
        Whether the accounting can run it: no number that it computes decides what it does.
    """

    name: str
    title: str
    set_up: Callable[[Problem], Operation]
    who: str = "laplace_llm"
    choices: int | None = None
    on_meta: bool = False


# The model alone ----------------------------------------------------------------------------------


def _forward(problem: Problem) -> Operation:
    return Operation(forwards(problem, 1)[0])


def _graph(problem: Problem) -> Operation:
    return Operation(lambda: problem.head(problem.batch))


def training_step(problem: Problem) -> Operation:
    """Forward, backward and AdamW on the LoRA parameters; every other row's memory reference."""
    head, batch = problem.head, problem.batch
    optimizer = torch.optim.AdamW(problem.parameters, lr=1e-5)

    def run() -> None:
        head.train()
        loss = F.cross_entropy(head(batch), batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return Operation(run)


# Fit ----------------------------------------------------------------------------------------------


def construct(problem: Problem, **options: Any) -> Any:
    """Make an unfitted posterior as a user does."""
    return Laplace(problem.head, "classification", subset_of_weights="lora", **options)


def fitted(problem: Problem) -> Any:
    """Return a posterior fitted to one batch; what it costs does not depend on the data."""
    la = construct(problem)
    la.fit(problem.loader(1))
    return la


def streamed(problem: Problem) -> Any:
    """Return the factors of one batch as `fit` has them before it decomposes them."""
    la, batch = construct(problem), problem.batch
    factors = la._empty_curvature()
    with la._borrowed():
        la._fit_batch(factors, batch, batch["labels"])
    return factors


def _fit(stochastic: bool) -> Callable[[Problem], Operation]:
    """Make the row of one batch of `fit`: what its loop does for each, without the rest of it."""

    def set_up(problem: Problem) -> Operation:
        la = construct(problem, backend_kwargs={"stochastic": stochastic})
        state, batch = la._empty_curvature(), problem.batch

        def run() -> None:
            with la._borrowed():
                la._fit_batch(state, batch, batch["labels"])

        backwards = 1 if stochastic else max(problem.workload.choices - 1, 1)
        return Operation(run, *sweep(problem, backwards))

    return set_up


def _decompose(problem: Problem) -> Operation:
    factors = streamed(problem)
    # Of a copy, as the eigenpairs take the factors' place; copying takes a hundredth of it.
    return Operation(lambda: copy.deepcopy(factors).decompose())


def _construct(problem: Problem) -> Operation:
    """All that a posterior holds: its factors, and then their eigenpairs."""
    factors = streamed(problem)

    def run() -> Any:
        la = construct(problem)
        la._set_curvature(copy.deepcopy(factors), merge=False)
        return la

    return Operation(run)


# Predict ------------------------------------------------------------------------------------------


def _predict(backwards: int | None = None, **options: Any) -> Callable[[Problem], Operation]:
    def set_up(problem: Problem) -> Operation:
        la, batch = fitted(problem), problem.batch
        floor = sweep(problem, problem.workload.choices if backwards is None else backwards)
        return Operation(lambda: la(batch, **options), *floor)

    return set_up


def _sampled(problem: Problem) -> Operation:
    la, batch = fitted(problem), problem.batch
    options = {"pred_type": "nn", "link_approx": "mc", "n_samples": NN_SAMPLES}
    return Operation(lambda: la(batch, **options), *forwards(problem, NN_SAMPLES))


# Tune ---------------------------------------------------------------------------------------------


def _gridsearch(problem: Problem) -> Operation:
    la, loader = fitted(problem), problem.loader(VALIDATION_BATCHES)

    def floor() -> None:
        for batch in loader:
            la(batch)

    def run() -> None:
        la.optimize_prior_precision(method="gridsearch", val_loader=loader, grid_size=100)

    return Operation(run, floor, f"predictive of {VALIDATION_BATCHES} batches")


def _val_grad(layerwise: bool) -> Callable[[Problem], Operation]:
    def set_up(problem: Problem) -> Operation:
        la = fitted(problem)
        grid = torch.logspace(-4, 4, 8 * NODES_PER_DECADE + 1)
        parts = [(la.moments_grid(batch, grid, layerwise), batch["labels"])
                 for batch in _tuning_loader(problem)]  # fmt: skip
        mean = torch.cat([moments.mean for moments, _ in parts])
        labels = torch.cat([labels for _, labels in parts])
        covariances = torch.cat([moments.covariance for moments, _ in parts], -3)
        if not layerwise:
            covariances = covariances[:, None]

        def objective(covariance: Tensor) -> Tensor:
            probabilities = quasi_monte_carlo(mean, covariance)
            return F.nll_loss(probabilities.clamp_min(1e-30).log(), labels)

        return Operation(lambda: descend(grid, covariances, objective, 100, 0.1))

    return set_up


def _loo(problem: Problem) -> Operation:
    la = fitted(problem)
    space = training_space(la, _tuning_loader(problem))
    interval = torch.logspace(-4, 4, 100)
    return Operation(lambda: leave_one_out(la, space, interval, "qmc"))


def _tuning_loader(problem: Problem) -> Any:
    return problem.loader(math.ceil(TUNING_QUESTIONS / problem.workload.batch))


def marglik(la: Any) -> Operation:
    """Make the row of 100 steps on the marginal likelihood, ours or a peer's."""

    def run() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            la.optimize_prior_precision(method="marglik", n_steps=100)

    return Operation(run)


ROWS = [
    Row("forward", "forward", _forward, "torch"),
    Row("graph", "forward, graph kept", _graph, "torch", on_meta=True),
    Row("step", "training step (AdamW on LoRA)", training_step, "torch", on_meta=True),
    Row("fit", "exact fit, per batch", _fit(stochastic=False), on_meta=True),
    Row("fit-mc", "MC fit, per batch", _fit(stochastic=True), on_meta=True),
    Row("probit", "predictive, probit", _predict(link_approx="probit"), on_meta=True),
    Row("qmc", "predictive, qmc (default)", _predict(), on_meta=True),
    Row("mc", "predictive, mc", _predict(link_approx="mc"), on_meta=True),
    Row("diagonal", "predictive, probit, diagonal_output",
        _predict(link_approx="probit", diagonal_output=True), on_meta=True),
    Row("nn", f"predictive, nn, {NN_SAMPLES} samples", _sampled, on_meta=True),
    Row("fit-2", "exact fit, 2 choices", _fit(stochastic=False), choices=2, on_meta=True),
    Row("qmc-2", "predictive, qmc, 2 choices", _predict(1), choices=2, on_meta=True),
    Row("grid", "grid search, 100 values", _gridsearch),
    Row("val-grad", "val_grad after its pass, 100 steps", _val_grad(layerwise=False)),
    Row("val-grad-layerwise", "val_grad after its pass, layerwise", _val_grad(layerwise=True)),
    Row("loo", "loo after its pass", _loo),
    Row("marglik", "marglik, 100 steps", lambda problem: marglik(fitted(problem))),
    Row("eigen", "eigendecomposition", _decompose, on_meta=True),
    Row("construct", "construct + decompose", _construct, on_meta=True),
]  # fmt: skip
