"""The peers' rows: laplace-torch on the same head, with curvlinops and with ASDL."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from laplace import Laplace
from laplace.curvature import AsdlGGN, CurvlinopsGGN
from torch.nn.attention import SDPBackend, sdpa_kernel

from laplace_llm.benchmark.speed.floors import forwards, sweep
from laplace_llm.benchmark.speed.operations import (
    NN_SAMPLES,
    VALIDATION_BATCHES,
    Operation,
    Row,
    marglik,
)
from laplace_llm.benchmark.speed.presets import Problem

GRID = 100


class Peer:
    """laplace-torch's Kronecker posterior over the parameters that require gradients.

    Parameters
    ----------
    problem : Problem
        Its head's only such parameters are LoRA's.
    backend : type
        The curvature backend.
    **backend_kwargs
        Of the backend.
    """

    def __init__(self, problem: Problem, backend: type, **backend_kwargs: Any) -> None:
        self.backend = backend
        self.la = Laplace(
            problem.head,
            "classification",
            subset_of_weights="all",
            hessian_structure="kron",
            backend=backend,
            backend_kwargs=backend_kwargs,
        )

    def hosting(self) -> AbstractContextManager[Any]:
        """Curvlinops differentiates forwards, which fused attention kernels do not implement."""
        return nullcontext() if self.backend is AsdlGGN else sdpa_kernel(SDPBackend.MATH)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[[], Any]:
        """Bind arguments to a function of the posterior, to be run as its backend needs it."""

        def run() -> Any:
            with self.hosting():
                return function(*args, **kwargs)

        return run

    def fit(self, problem: Problem) -> Peer:
        """Fit one batch."""
        with self.hosting():
            self.la.fit(problem.loader(1))
        return self


def rows(who: str, backend: type) -> list[Row]:
    """Return laplace-torch's rows with one backend: what it has of ours.

    The accounting runs ASDL's. Curvlinops tells parameters apart by their addresses, which tensors
    without values do not have.
    """
    on_meta = backend is AsdlGGN

    def fit(stochastic: bool) -> Callable[[Problem], Operation]:
        def set_up(problem: Problem) -> Operation:
            peer = Peer(problem, backend, stochastic=stochastic)
            la, batch = peer.la, problem.batch
            la._init_H()
            la.model.output_size = problem.workload.choices

            def one_batch() -> None:  # of the loop in ParametricLaplace.fit
                la.model.zero_grad()
                _, curvature = la._curv_closure(batch, batch["labels"], N=len(batch["labels"]))
                la.H += curvature

            backwards = 1 if stochastic else max(problem.workload.choices - 1, 1)
            return Operation(peer.call(one_batch), *sweep(problem, backwards))

        return set_up

    def predict(**options: Any) -> Callable[[Problem], Operation]:
        def set_up(problem: Problem) -> Operation:
            peer = Peer(problem, backend).fit(problem)
            floor = sweep(problem, problem.workload.choices)
            return Operation(peer.call(peer.la, problem.batch, **options), *floor)

        return set_up

    def sampled(problem: Problem) -> Operation:
        peer = Peer(problem, backend).fit(problem)
        options = {"pred_type": "nn", "link_approx": "mc", "n_samples": NN_SAMPLES}
        floor = forwards(problem, NN_SAMPLES)
        return Operation(peer.call(peer.la, problem.batch, **options), *floor)

    def gridsearch(problem: Problem) -> Operation:
        """Measure one value: all take the same, and 100 take hours."""
        peer, loader = Peer(problem, backend).fit(problem), problem.loader(VALIDATION_BATCHES)
        run = peer.call(
            peer.la.optimize_prior_precision,
            method="gridsearch",
            val_loader=loader,
            grid_size=1,
            link_approx="probit",
        )
        return Operation(run, times=GRID)

    def evidence(problem: Problem) -> Operation:
        return marglik(Peer(problem, backend).fit(problem).la)

    def decompose(problem: Problem) -> Operation:
        return Operation(Peer(problem, backend).fit(problem).la.H_facs.decompose)

    def construct(problem: Problem) -> Operation:
        state = Peer(problem, backend).fit(problem).la.state_dict()

        def run() -> Any:
            la = Peer(problem, backend).la
            la.load_state_dict(copy.deepcopy(state))
            return la

        return Operation(run)

    return [
        Row("fit", "exact fit, per batch", fit(stochastic=False), who, on_meta=on_meta),
        Row("fit-mc", "MC fit, per batch", fit(stochastic=True), who, on_meta=on_meta),
        Row("probit", "predictive, probit", predict(link_approx="probit"), who, on_meta=on_meta),
        Row("nn", f"predictive, nn, {NN_SAMPLES} samples", sampled, who, on_meta=on_meta),
        Row("grid", "grid search, 100 values", gridsearch, who),
        Row("marglik", "marglik, 100 steps", evidence, who),
        Row("eigen", "eigendecomposition", decompose, who, on_meta=on_meta),
        Row("construct", "construct + decompose", construct, who, on_meta=on_meta),
    ]


CURVLINOPS, ASDL = "laplace-torch, curvlinops", "laplace-torch, ASDL"
ROWS = [*rows(CURVLINOPS, CurvlinopsGGN), *rows(ASDL, AsdlGGN)]
