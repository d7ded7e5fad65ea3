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
    interval = thinned(interval)
    batches = [
        (Moments(*(part.to(la._device, la._dtype) for part in moments)), space.labels)
        for moments in cavities(space, interval)
    ]
    return best_on_moments(la, loss, interval, batches, link_approx, n_samples)


def thinned(interval: Tensor) -> Tensor:
    """Return about `GRID_SIZE` values of a grid, from its first on."""
    return interval[:: max(len(interval) // GRID_SIZE, 1)]


def cavities(space: FunctionSpace, interval: Tensor) -> tuple[Moments, Moments]:
    """Return what the linear model says of each example from the others, around both means.

    Parameters
    ----------
    space : FunctionSpace
        The training examples.
    interval : Tensor
        (G,) prior precisions, ascending.

    Returns
    -------
    shrunk, fitted : Moments
        Mean (G, N, C) and covariance (G, N, C, C), around the mode under the same prior
        precision, and around the mode that fits as closely as the trained model.
    """
    modes: list[Mode] = []
    for delta in interval.flip(0).tolist():  # from the prior mean's side, each from the last
        modes.insert(0, space.mode(delta, modes[0] if modes else None))
    index = _as_fitted_as_trained(space, modes)
    anchor = space.leave_one_out(modes[index], float(interval[index]))
    shrunk, fitted = [], []
    for delta, mode in zip(interval.tolist(), modes, strict=True):
        shrunk.append(space.leave_one_out(mode, delta))
        fitted.append(space.leave_one_out(modes[index], delta)._replace(mean=anchor.mean))
    return _stack(shrunk), _stack(fitted)


def _as_fitted_as_trained(space: FunctionSpace, modes: list[Mode]) -> int:
    """Return the index of the largest prior precision whose mode fits as well as the model."""
    target = space.log_likelihood(space.trained)
    fits = [bool(space.log_likelihood(mode.latent) >= target) for mode in modes]
    return max((index for index, fit in enumerate(fits) if fit), default=0)


def _stack(moments: list[Moments]) -> Moments:
    means, covariances = zip(*moments, strict=True)
    return Moments(torch.stack(means), torch.stack(covariances))
