"""Choosing the prior precision without validation data: leave-one-out in function space."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from laplace_llm.function_space import FunctionSpace, Mode
from laplace_llm.moments import Moments
from laplace_llm.tuning.gridsearch import best_on_moments, check_grid

if TYPE_CHECKING:
    from laplace_llm.prediction import LoraPredictive

# A finer grid would resolve nothing that N leave-one-out losses can tell apart.
GRID_SIZE = 33


def leave_one_out(
    la: LoraPredictive,
    space: FunctionSpace,
    loss: Any,
    interval: Tensor,
    link_approx: str,
    n_samples: int = 100,
) -> Tensor:
    """Return the prior precision with the lowest leave-one-out loss on the training examples.

    The model was trained to fit its own examples, so its loss on them tells nothing, nor does a
    Gaussian around it. What each example looks like *from the others* is asked of the linearised
    model instead, whose leave-one-out predictions are a closed form. Two of its properties decide
    whether the answer can be trusted on tasks that were learnt and on tasks that were not:

    - its prior mean is the model without its adapter, not the linearisation at ``lora_B = 0``
      (which has seen the labels);
    - the deployed mean is neither the linear model's mode under the same prior precision, which
      is shrunk, nor independent of the labels, but trained to a given loss. The loss is therefore
      averaged over two means: that mode, and the mode under the prior precision at which the
      linear model fits its examples as closely as the trained model does.

    Parameters
    ----------
    la : LoraPredictive
        Gives the link and the labels' meaning.
    space : FunctionSpace
        The training examples.
    loss, interval, link_approx, n_samples
        See `gridsearch`; an interval of more than 33 values is thinned out.

    Raises
    ------
    PriorError
        If no value has a finite loss.
    """
    check_grid(loss, interval)
    interval = interval[:: max(len(interval) // GRID_SIZE, 1)]
    modes: list[Mode] = []
    for delta in interval.flip(0).tolist():  # from the prior mean's side, each from the last
        modes.insert(0, space.mode(delta, modes[0] if modes else None))
    fitted = _as_fitted_as_trained(space, modes)
    shrunk, trained = [], []
    anchor = space.leave_one_out(modes[fitted], float(interval[fitted]))
    for delta, mode in zip(interval.tolist(), modes, strict=True):
        shrunk.append(space.leave_one_out(mode, delta))
        covariance = space.leave_one_out(modes[fitted], delta).covariance
        trained.append(Moments(anchor.mean, covariance))
    batches = [(_over_grid(la, moments), space.labels) for moments in (shrunk, trained)]
    return best_on_moments(la, loss, interval, batches, link_approx, n_samples)


def _as_fitted_as_trained(space: FunctionSpace, modes: list[Mode]) -> int:
    """Return the index of the largest prior precision whose mode fits as well as the model."""
    target = space.log_likelihood(space.trained)
    fits = [bool(space.log_likelihood(mode.latent) >= target) for mode in modes]
    return max((index for index, fit in enumerate(fits) if fit), default=0)


def _over_grid(la: LoraPredictive, moments: list[Moments]) -> Moments:
    return Moments(
        torch.stack([m.mean for m in moments]).to(la._device, la._dtype),
        torch.stack([m.covariance for m in moments]).to(la._device, la._dtype),
    )
