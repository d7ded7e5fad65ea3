"""Choosing the prior precision without validation data: leave-one-out in function space."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from laplace_llm.errors import PriorError
from laplace_llm.function_space import FunctionSpace, Mode
from laplace_llm.moments import Moments

if TYPE_CHECKING:
    from laplace_llm.prediction import LoraPredictive

# A finer grid would resolve nothing that N leave-one-out losses can tell apart.
GRID_SIZE = 33
# The features have seen the labels, so that too few of the left-out answers are wrong: for so many
# of the training labels, any class is taken to be as likely. Chosen from 0.01 to 0.05 on seven
# cells of README's tasks; about as many labels of common data sets are wrong (Northcutt et al.,
# NeurIPS 2021).
LABEL_SMOOTHING = 0.03


def leave_one_out(
    la: LoraPredictive,
    space: FunctionSpace,
    interval: Tensor,
    link_approx: str,
    n_samples: int = 100,
) -> Tensor:
    """Return the prior precision with the lowest leave-one-out loss on the training examples.

    The model was trained to fit its own examples, so its loss on them tells nothing, nor does a
    Gaussian around it. What each example looks like *from the others* is asked of the linearised
    model instead (`held_out`). Its features have seen the labels all the same, so that too few of
    its answers are wrong; label smoothing makes up for that (`smoothed_nll`). For regression the
    loss is the Gaussian negative log likelihood.

    Parameters
    ----------
    la : LoraPredictive
        Gives the link, and the noise for regression.
    space : FunctionSpace
        The training examples; of many, the first ones (`laplace_llm.kernel.MAX_OUTPUTS`).
    interval : Tensor
        (G,) prior precisions, ascending; more than 33 are thinned out.
    link_approx, n_samples
        See `LoraPredictive.__call__`.

    Raises
    ------
    PriorError
        If no value has a finite loss.
    """
    interval = thinned(interval)
    moments = held_out(space, interval)
    losses = []
    devices = [la._device] if la._device.type == "cuda" else []
    for index in range(len(interval)):
        mean, covariance = (part.to(la._device, la._dtype) for part in moments.at(index))
        with torch.random.fork_rng(devices):  # the same random numbers for every value
            result = la(
                Moments(mean, covariance),
                link_approx=link_approx,
                n_samples=n_samples,
                fitting=True,
            )
        if isinstance(result, Tensor):
            losses.append(smoothed_nll(result, space.labels, space.present))
        else:
            variance = covariance.diagonal(dim1=-2, dim2=-1) + la.sigma_noise.square()
            losses.append(F.gaussian_nll_loss(mean, space.labels.to(mean), variance))
    scores = torch.stack(losses).nan_to_num(torch.inf, posinf=torch.inf)
    if not bool(scores.isfinite().any()):
        raise PriorError(
            f"Expected a finite leave-one-out loss for at least one of {len(interval)} prior "
            f"precisions between {float(interval[0]):g} and {float(interval[-1]):g}, but there is "
            "none. Check the training labels, or use method='gridsearch'."
        )
    return interval[int(scores.argmin())]


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
    return Moments(mean, space.output_covariances(space.cavities(mode, interval)))


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


def smoothed_nll(probabilities: Tensor, labels: Tensor, present: Tensor | None = None) -> Tensor:
    """Return the mean NLL where every class is as likely for `LABEL_SMOOTHING` of the labels.

    Parameters
    ----------
    probabilities : Tensor
        (N, C).
    labels : Tensor
        (N,).
    present : Tensor, optional
        (N, C), which classes each example has; default: all.
    """
    present = torch.ones_like(probabilities) if present is None else present.to(probabilities)
    likely = F.one_hot(labels, present.shape[1]).to(present)
    targets = likely.lerp(present / present.sum(1, keepdim=True), LABEL_SMOOTHING)
    logs = probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
    return F.cross_entropy(logs, targets)
