"""Every private or version-dependent symbol of `laplace-torch` that this package touches."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from laplace.baselaplace import (
    BaseLaplace,
    DiagLaplace,
    FullLaplace,
    KronLaplace,
    ParametricLaplace,
)
from laplace.curvature.asdl import AsdlInterface
from laplace.curvature.curvature import CurvatureInterface, EFInterface, GGNInterface
from laplace.laplace import Laplace as parent_factory
from laplace.utils.matrix import Kron
from laplace.utils.metrics import RunningNLLMetric
from laplace.utils.subnetmask import SubnetMask
from laplace.utils.utils import SoDSampler, validate
from torch import Tensor
from torchmetrics import MeanSquaredError, Metric

from laplace_llm.errors import OptionError

try:
    from laplace.baselaplace import ELLA, BaseFunctionalLaplace, VaLLA
    from laplace.utils.functional_utils import _model_fingerprint as model_fingerprint
except ImportError:

    class BaseFunctionalLaplace:  # type: ignore[no-redef]
        """What laplace-torch before 0.3 does not have."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            raise OptionError(
                "Expected laplace-torch >= 0.3, which has ELLA and VaLLA, but an earlier one is "
                "installed. Run pip install 'laplace-torch>=0.3', or use hessian_structure='gp'."
            )

    def model_fingerprint(model: Any) -> dict[str, Any]:
        """Return what the two below recognise a model by."""
        raise NotImplementedError

    class ELLA(BaseFunctionalLaplace):  # type: ignore[no-redef]
        """What laplace-torch before 0.3 does not have."""

    class VaLLA(BaseFunctionalLaplace):  # type: ignore[no-redef]
        """What laplace-torch before 0.3 does not have."""


__all__ = [
    "ELLA",
    "AsdlInterface",
    "BaseFunctionalLaplace",
    "BaseLaplace",
    "CurvatureInterface",
    "DiagLaplace",
    "EFInterface",
    "FullLaplace",
    "GGNInterface",
    "Kron",
    "KronLaplace",
    "ParametricLaplace",
    "SoDSampler",
    "SubnetMask",
    "VaLLA",
    "computed_here",
    "default_loss",
    "model_fingerprint",
    "parent_factory",
    "parent_marglik",
    "validate",
]


def default_loss(la: Any) -> Any:
    """Return the metric that the parent's grid search uses by default."""
    if la.likelihood == "regression":
        return MeanSquaredError(num_outputs=la.n_outputs).to(la._device)
    return RunningNLLMetric().to(la._device)


@contextmanager
def computed_here(loss: Any) -> Iterator[None]:
    """Have a metric score what it was given in this process, and not wait for other processes."""
    metrics = loss.modules() if isinstance(loss, Metric) else ()
    before = [(m, m.distributed_available_fn) for m in metrics if isinstance(m, Metric)]
    try:
        for metric, _ in before:
            metric.distributed_available_fn = _alone
        yield
    finally:
        for metric, available in before:
            metric.distributed_available_fn = available


def _alone() -> bool:
    return False


def parent_marglik(
    la: Any,
    pred_type: str,
    n_steps: int,
    lr: float,
    init_prior_prec: float | Tensor,
    prior_structure: str,
    val_loader: Any,
    progress_bar: bool,
) -> None:
    """Maximise the marginal likelihood as the parent does, without its reminder of `probit`.

    Also under `torch.no_grad`, where the parent cannot.
    """
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.filterwarnings("ignore", message="By default `link_approx` is `probit`")
        ParametricLaplace.optimize_prior_precision(
            la,
            pred_type,
            "marglik",
            n_steps,
            lr,
            init_prior_prec,
            prior_structure,
            val_loader,
            progress_bar=progress_bar,
        )
