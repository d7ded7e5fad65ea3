"""Choosing the prior precision: its checks, and a grid search that makes one pass."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from laplace_llm._compat import validate
from laplace_llm.data import labelled
from laplace_llm.errors import OptionError, PriorError
from laplace_llm.predictive import Moments

if TYPE_CHECKING:
    from laplace_llm.laplace import LoraLaplace


def check_precision(value: Any, lengths: list[int]) -> None:
    """Raise PriorError unless `value` is a positive number or a tensor of an allowed length.

    Parameters
    ----------
    value : float or Tensor
        The prior precision.
    lengths : list[int]
        Allowed numbers of values.
    """
    expected = f"Expected a positive prior precision with {' or '.join(map(str, lengths))} value(s)"
    if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
        raise PriorError(f"{expected}, but got a {type(value).__name__}. Pass a float or a tensor.")
    tensor = torch.as_tensor(value)
    if tensor.ndim > 1 or tensor.numel() not in lengths:
        raise PriorError(
            f"{expected}, but got shape {tuple(tensor.shape)}. One value is shared by all weights; "
            f"{lengths[-1]} values follow the order of la.tensors or of their weights."
        )
    detached = tensor.detach()
    if not bool(((detached > 0) & detached.isfinite()).all()):
        raise PriorError(f"{expected}, but got {detached.flatten()[:5].tolist()}.")


def gridsearch(
    la: LoraLaplace,
    loss: Any,
    interval: Tensor,
    val_loader: Any,
    pred_type: str = "glm",
    link_approx: str = "probit",
    n_samples: int = 100,
    progress_bar: bool = False,
) -> Tensor:
    """Return the scalar prior precision with the lowest validation loss.

    For the GLM predictive, one pass over the data gives the latent moments under all values of
    the grid. Losses mean what they mean in the parent (`laplace.utils.utils.validate`), except
    that a torchmetrics metric is reset before every value.

    Parameters
    ----------
    la : LoraLaplace
        A fitted posterior; its prior precision is left as it was.
    loss : torchmetrics.Metric or Callable
        As in the parent.
    interval : Tensor
        (G,) prior precisions.
    val_loader : Iterable
        Labelled batches.
    pred_type, link_approx, n_samples, progress_bar
        As in the parent.

    Raises
    ------
    PriorError
        If no value has a finite loss.
    DataError
        If the loader is empty or has no labels.
    """
    if not callable(loss):
        raise OptionError(f"Expected loss to be a metric or a function, but got {loss!r}.")
    batches = _moments(la, interval, val_loader, progress_bar) if pred_type == "glm" else None
    before, results = la.prior_precision, []
    try:
        for index, value in enumerate(
            tqdm(interval, desc="[Grid search]", disable=not progress_bar)
        ):
            la.prior_precision = value
            if hasattr(loss, "reset"):
                loss.reset()
            data = val_loader
            if batches is not None:
                data = [(moments.at(index), y) for moments, y in batches]
            # The same random numbers for every value, so that their order is not left to chance.
            with la._borrowed(), torch.random.fork_rng():
                result = validate(
                    la,
                    data,
                    loss,
                    pred_type=pred_type,
                    link_approx=link_approx,
                    n_samples=n_samples,
                    dict_key_y=la.dict_key_y,
                )
            results.append(result if math.isfinite(result) else math.inf)
    finally:
        la.prior_precision = before
    best = min(range(len(results)), key=results.__getitem__)
    if math.isinf(results[best]):
        raise PriorError(
            f"Expected a finite validation loss for at least one of {len(results)} prior "
            f"precisions between {float(interval[0]):g} and {float(interval[-1]):g}, but there is "
            "none. Check the validation labels, or use link_approx='mc'."
        )
    return interval[best]


def _moments(
    la: LoraLaplace, interval: Tensor, loader: Any, progress_bar: bool
) -> list[tuple[Moments, Tensor]]:
    """Return the moments (G, B, C, C) and labels of every batch."""
    description = "[Grid search: one pass]"
    batches = labelled(loader, la.dict_key_y, la._device, description, progress_bar)
    return [(la.moments_grid(x, interval), y) for x, y in batches]
