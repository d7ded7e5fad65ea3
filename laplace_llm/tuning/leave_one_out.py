"""Choosing the prior precision without validation data: leave-one-out in function space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from laplace_llm.errors import OptionError, PriorError
from laplace_llm.function_space import FunctionSpace, Mode
from laplace_llm.moments import Moments

if TYPE_CHECKING:
    from laplace_llm.prediction import LoraPredictive

# A finer grid would resolve nothing that N leave-one-out losses can tell apart.
GRID_SIZE = 33
# The features have seen the labels, so that too few of the left-out answers are wrong: of so many
# training labels, any class is taken to be as likely. In common data sets about 3 % of the labels
# are wrong (Northcutt et al., NeurIPS 2021).
LABEL_SMOOTHING = 0.03
# For the same reason a training example tells less than one that was held out.
TRAINING_WEIGHT = 0.5


def leave_one_out(
    la: LoraPredictive,
    space: FunctionSpace,
    interval: Tensor,
    link_approx: str,
    n_samples: int = 100,
    validation: Sequence[tuple[Moments, Tensor]] = (),
) -> Tensor:
    """Return the prior precision with the lowest leave-one-out loss on the training examples.

    The model was trained to fit its own examples, so its loss on them tells nothing, nor does a
    Gaussian around it. What each example looks like *from the others* is asked of the linearised
    model instead (`held_out`). Its features have seen the labels all the same, so that too few of
    its answers are wrong; label smoothing makes up for that (`smoothed_nll`). For regression the
    loss is the Gaussian negative log likelihood. Where there are validation examples, their own
    losses are added, at twice the weight of one that was left out.

    Parameters
    ----------
    la : LoraPredictive
        Gives the link, and the noise for regression.
    space : FunctionSpace
        The training examples; of many, the first ones (`laplace_llm.kernel.MAX_OUTPUTS`).
    interval : Tensor
        (G,) prior precisions, ascending.
    link_approx, n_samples
        See `LoraPredictive.__call__`.
    validation : Sequence, optional
        Moments under the values of `interval`, and labels, of batches that were held out.

    Raises
    ------
    OptionError
        If the grid is empty.
    PriorError
        If no value has a finite loss.
    """
    if not len(interval):
        raise OptionError("Expected grid_size >= 1, but the grid is empty.")
    moments = held_out(space, interval)
    moments = Moments(*(part.to(la._device, la._dtype) for part in moments))
    losses = []
    devices = [la._device] if la._device.type == "cuda" else []
    for index in range(len(interval)):
        with torch.random.fork_rng(devices):  # the same random numbers for every value
            loss = TRAINING_WEIGHT * _loss(
                la, moments.at(index), space.labels, link_approx, n_samples, LABEL_SMOOTHING
            )
            for held, labels in validation:
                loss = loss + _loss(la, held.at(index), labels, link_approx, n_samples, 0.0)
        losses.append(loss)
    scores = torch.stack(losses).nan_to_num(torch.inf, posinf=torch.inf)
    if not bool(scores.isfinite().any()):
        raise PriorError(
            f"Expected a finite leave-one-out loss for at least one of {len(interval)} prior "
            f"precisions between {float(interval[0]):g} and {float(interval[-1]):g}, but there is "
            "none. Check the training labels, or use method='gridsearch'."
        )
    return interval[int(scores.argmin())]


def _loss(
    la: LoraPredictive,
    moments: Moments,
    labels: Tensor,
    link_approx: str,
    n_samples: int,
    smoothing: float,
) -> Tensor:
    """Return the loss of examples, summed."""
    result = la(moments, link_approx=link_approx, n_samples=n_samples, fitting=True)
    labels = labels.to(la._device)
    if isinstance(result, Tensor):
        return len(labels) * smoothed_nll(result, labels, smoothing)
    variance = moments.covariance.diagonal(dim1=-2, dim2=-1) + la.sigma_noise.square()
    loss = F.gaussian_nll_loss(moments.mean, labels.to(moments.mean), variance)
    return len(labels) * loss


def thinned(interval: Tensor) -> Tensor:
    """Return about `GRID_SIZE` values of a grid, from its first on."""
    return interval[:: max(len(interval) // GRID_SIZE, 1)]


def held_out(space: FunctionSpace, interval: Tensor) -> Moments:
    """Return what the linearised model says of each example from the others.

    Two things decide whether it can be trusted on tasks that were learnt and on tasks that were
    not. Its prior mean is the model without its adapter, not the linearisation at ``lora_B = 0``,
    which has seen the labels. And its mean does not depend on the prior precision under trial:
    the deployed mean is the trained model whatever the prior, so the linear model, too, is taken
    where it fits its examples as closely as the trained model does.

    Parameters
    ----------
    space : FunctionSpace
        The training examples.
    interval : Tensor
        (G,) prior precisions, ascending.

    Returns
    -------
    moments : Moments
        Mean (N, C) and covariances (G, N, C, C).
    """
    mode, delta = _as_fitted_as_trained(space, interval)
    mean = space.leave_one_out(mode, delta).mean
    return Moments(mean, space.basis @ space.cavities(mode, interval) @ space.basis.T)


def _as_fitted_as_trained(space: FunctionSpace, interval: Tensor) -> tuple[Mode, float]:
    """Return the mode under the largest prior precision at which it fits as the model does."""
    target = space.log_likelihood(space.trained)
    mode: Mode | None = None
    for delta in interval.flip(0).tolist():  # from the prior mean's side, each from the last
        mode = space.mode(delta, mode)
        if bool(space.log_likelihood(mode.latent) >= target):
            break
    assert mode is not None
    return mode, delta


def smoothed_nll(
    probabilities: Tensor, labels: Tensor, smoothing: float = LABEL_SMOOTHING
) -> Tensor:
    """Return the mean NLL where a part of the labels is drawn at random.

    Parameters
    ----------
    probabilities : Tensor
        (N, C).
    labels : Tensor
        (N,).
    smoothing : float
        That part.
    """
    logs = probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
    return F.cross_entropy(logs, labels, label_smoothing=smoothing)
