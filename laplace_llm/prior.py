"""Choosing the prior precision: its checks, and a grid search that makes one pass."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from numbers import Real
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from laplace_llm._compat import validate
from laplace_llm.data import check_labels, labelled, numbered
from laplace_llm.errors import DataError, OptionError, PriorError
from laplace_llm.moments import Moments
from laplace_llm.taps import Batch


class Tunable(Protocol):
    """A posterior whose prior precision `gridsearch` can choose."""

    prior_precision: Tensor
    likelihood: str
    dict_key_y: str
    n_outputs: int

    @property
    def _device(self) -> torch.device: ...

    def _borrowed(self) -> AbstractContextManager[None]: ...

    def moments_grid(self, batch: Batch, values: Tensor) -> Moments:
        """Return latent moments under G prior precisions."""


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
    if isinstance(value, bool) or not isinstance(value, (Real, Tensor)):
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
    la: Tunable,
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
    if not len(interval):
        raise OptionError("Expected grid_size >= 1, but the grid is empty.")
    batches = None
    if pred_type == "glm":
        batches = _moments(la, interval, val_loader, progress_bar)
    else:
        _check_labels(la, val_loader)
    before, results = la.prior_precision, []
    devices = [la._device] if la._device.type == "cuda" else []
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
            with la._borrowed(), torch.random.fork_rng(devices):
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
    la: Tunable, interval: Tensor, loader: Any, progress_bar: bool
) -> list[tuple[Moments, Tensor]]:
    """Return the moments (G, B, C, C) and labels of every batch."""
    results = []
    for index, (x, y) in enumerate(_labelled(la, loader, progress_bar)):
        moments = la.moments_grid(x, interval)
        results.append((moments, _checked(la, y, moments.mean, index)))
    return results


def _check_labels(la: Tunable, loader: Any) -> None:
    """Check the labels of a loader that is to be passed over again for every value."""
    for index, (_, y) in enumerate(_labelled(la, loader, False)):
        if y.ndim == 0:
            raise numbered(DataError(f"Expected a batch of labels, but got {y}."), index)
        _checked(la, y, y.new_zeros(len(y), la.n_outputs, dtype=torch.float32), index)


def _labelled(la: Tunable, loader: Any, progress_bar: bool) -> Iterator[tuple[Batch, Tensor]]:
    return labelled(loader, la.dict_key_y, la._device, "[Grid search: one pass]", progress_bar)


def _checked(la: Tunable, labels: Tensor, outputs: Tensor, index: int) -> Tensor:
    try:
        return check_labels(labels, outputs, la.likelihood == "regression")
    except DataError as error:
        raise numbered(error, index) from error
