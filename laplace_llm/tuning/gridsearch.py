"""Choosing the prior precision on validation data: a grid search that makes one pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, MutableMapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from laplace_llm._compat import computed_here, validate
from laplace_llm.data import check_any, check_labels, check_outputs, labelled, numbered
from laplace_llm.errors import OptionError, OutputError, PriorError
from laplace_llm.links import OF_DIFFERENCES
from laplace_llm.moments import Moments
from laplace_llm.shards import Shard, as_shard
from laplace_llm.taps import Batch, check_finite, check_logits

if TYPE_CHECKING:
    from laplace_llm.prediction import LoraPredictive


def gridsearch(
    la: LoraPredictive,
    loss: Any,
    interval: Tensor,
    val_loader: Any,
    pred_type: str,
    link_approx: str,
    n_samples: int = 100,
    progress_bar: bool = False,
) -> Tensor:
    """Return the scalar prior precision with the lowest validation loss.

    For the GLM predictive, one pass over the data gives the latent moments under all values of
    the grid. Losses mean what they mean in the parent (`laplace.utils.utils.validate`), except
    that a torchmetrics metric is reset before every value, and computed in this process alone.

    Of a shard (`laplace_llm.Shard`), the moments and labels of all processes are gathered, and all
    of them take the value that the first one finds.

    Parameters
    ----------
    la : LoraLaplace
        A fitted posterior; its prior precision is left as it was.
    loss : torchmetrics.Metric or Callable
        As in the parent.
    interval : Tensor
        (G,) prior precisions.
    val_loader : Iterable
        Labelled batches; a shard only for ``pred_type='glm'``.
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
    shard = as_shard(val_loader)
    if pred_type == "glm":
        centred = link_approx in OF_DIFFERENCES and la._predicts_classes(fitting=True)
        batches = _moments(la, interval, shard, centred, progress_bar)

        def at(index: int) -> list[tuple[Moments, Tensor]]:
            return [(moments.at(index), y) for moments, y in batches]

        return shard.agreed(
            lambda: _best(la, loss, interval, at, pred_type, link_approx, n_samples, False)
        )
    if shard.size > 1:
        raise OptionError(
            f"Expected pred_type='glm' for validation data that {shard.size} processes share, but "
            f"got {pred_type!r}. Give each process the whole validation data."
        )
    la._check_prediction(pred_type, link_approx)
    _check_labels(la, val_loader)

    def again(_: int) -> Iterator[Any]:
        return _reshaped(la, val_loader)

    return _best(la, loss, interval, again, pred_type, link_approx, n_samples, progress_bar)


def _best(
    la: LoraPredictive,
    loss: Any,
    interval: Tensor,
    data: Callable[[int], Any],
    pred_type: str,
    link_approx: str,
    n_samples: int,
    progress_bar: bool,
) -> Tensor:
    """Return the value of the grid with the lowest loss on its data."""
    before, results = la.prior_precision, []
    devices = [la._device] if la._device.type == "cuda" else []
    try:
        for index, value in enumerate(
            tqdm(interval, desc="[Grid search]", disable=not progress_bar)
        ):
            la.prior_precision = value
            if hasattr(loss, "reset"):
                loss.reset()
            # The same random numbers for every value, so that their order is not left to chance.
            with la._borrowed(), torch.random.fork_rng(devices), computed_here(loss):
                try:
                    result = validate(
                        la,
                        data(index),
                        loss if hasattr(loss, "reset") else _returning_tensor(loss),
                        pred_type=pred_type,
                        link_approx=link_approx,
                        n_samples=n_samples,
                        dict_key_y=la.dict_key_y,
                    )
                except OutputError:  # under so weak a prior the sampled weights overflow
                    result = math.inf
            results.append(result if math.isfinite(result) else math.inf)
    finally:
        la.prior_precision = before
    best = min(range(len(results)), key=results.__getitem__)
    if math.isinf(results[best]):
        raise PriorError(
            f"Expected a finite loss for at least one of {len(results)} prior precisions between "
            f"{float(interval[0]):g} and {float(interval[-1]):g}, but there is none. Check the "
            "labels, or use link_approx='mc'."
        )
    return interval[best]


def _returning_tensor(loss: Callable[..., Any]) -> Callable[..., Tensor]:
    """Let a loss return a number, as the parent's signature has it, and its code has not."""

    def scalar(*args: Tensor) -> Tensor:
        value = loss(*args)
        try:
            result = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise OptionError(f"Expected loss to return a number, but got {value!r}.") from error
        if result.numel() != 1:
            raise OptionError(
                f"Expected loss to return one number, but got shape {tuple(result.shape)}."
            )
        return result

    return scalar


def _moments(
    la: LoraPredictive, interval: Tensor, shard: Shard, centred: bool, progress_bar: bool
) -> list[tuple[Moments, Tensor]]:
    """Return the moments (G, B, C, C) and labels of every batch of all processes."""
    results, regression, n_outputs = [], la.likelihood == "regression", None
    with shard.in_step():
        for index, (x, y) in enumerate(_labelled(la, shard, progress_bar)):
            moments = la.moments_grid(x, interval, centred=centred)
            n_outputs = check_outputs(moments.mean.shape[1], n_outputs, index)
            results.append((*moments, check_labels(y, moments.mean, regression, index)))
    found = [(Moments(*parts), labels) for *parts, labels in shard.gather(results, la._device)]
    check_any(found)
    for moments, _ in found:
        n_outputs = check_outputs(moments.mean.shape[1], n_outputs)
    return found


def _check_labels(la: LoraPredictive, loader: Any) -> None:
    """Check the labels of a loader that is to be passed over again for every value."""
    n_outputs = None
    for index, (x, y) in enumerate(_labelled(la, loader, False)):
        with la._borrowed(), torch.no_grad():
            outputs = la.model(x)
        check_logits(outputs)
        try:
            check_finite(outputs)
        except OutputError as error:
            raise numbered(error, index) from error
        n_outputs = check_outputs(outputs.shape[1], n_outputs, index)
        check_labels(y, outputs, la.likelihood == "regression", index)


def _reshaped(la: LoraPredictive, loader: Any) -> Iterator[Any]:
    """Yield the batches as the parent's losses take them: targets (B,) of one output as (B, 1)."""
    for x, y in _labelled(la, loader, False):
        if la.likelihood == "regression" and y.ndim == 1:
            y = y[:, None]
        yield {**x, la.dict_key_y: y} if isinstance(x, MutableMapping) else (x, y)


def _labelled(
    la: LoraPredictive, loader: Any, progress_bar: bool
) -> Iterator[tuple[Batch, Tensor]]:
    return labelled(loader, la.dict_key_y, la._device, "[Grid search: one pass]", progress_bar)
