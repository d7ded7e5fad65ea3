"""The marginal likelihood at the linear model's own mode, and what the usual one can do."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from laplace_llm.function_space import FunctionSpace, Mode
from laplace_llm.links import quasi_monte_carlo
from laplace_llm.taps import Batch

if TYPE_CHECKING:
    from laplace_llm.prediction import LoraPredictive

# By how much the mean confidence on training examples may fall before a warning.
CONFIDENCE_LOSS = 0.2


def linear_mode_evidence(space: FunctionSpace, interval: Tensor) -> Tensor:
    """Return the prior precision of the grid with the highest evidence of the linear model.

    The evidence is taken at the linearised model's own mode (Antoran et al., *Adapting the
    Linearised Laplace Model Evidence for Modern Deep Learning*, ICML 2022), with the exact kernel
    of the ``lora_B`` weights and the model without its adapter as prior mean.

    Parameters
    ----------
    space : FunctionSpace
        The training examples.
    interval : Tensor
        (G,) prior precisions.
    """
    mode: Mode | None = None
    values = []
    for delta in interval.flip(0).tolist():
        value, mode = space.log_evidence(delta, mode)
        values.append(value)
    return interval.flip(0)[int(torch.stack(values).argmax())]


def warn_if_unsure(la: LoraPredictive, batches: list[Any]) -> bool:
    """Warn if the posterior takes the model's confidence on training examples away.

    Returns whether it warned.

    Parameters
    ----------
    la : LoraPredictive
        A fitted posterior for classification.
    batches : list
        Inputs of some training batches.
    """
    before, after = _confidence(la, batches)
    if before - after <= CONFIDENCE_LOSS:
        return False
    warnings.warn(
        f"The marginal likelihood chose the prior precision {la.prior_precision.mean():.3g}, under "
        f"which the mean confidence on training examples falls from {before:.2f} to {after:.2f}: "
        "probably far too small. Use method='loo', or method='gridsearch' with a val_loader.",
        UserWarning,
        stacklevel=6,
    )
    return True


def _confidence(la: LoraPredictive, batches: list[Batch]) -> tuple[float, float]:
    """Return the mean largest probability without and with the posterior."""
    trained, uncertain = [], []
    for batch in batches:
        mean, covariance = la._glm_predictive_distribution(batch, centred=True)
        trained.append(torch.softmax(mean, -1).amax(-1).detach())
        uncertain.append(quasi_monte_carlo(mean, covariance).amax(-1).detach())
    return float(torch.cat(trained).mean()), float(torch.cat(uncertain).mean())
