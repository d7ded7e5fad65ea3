"""What comes out of a loader: inputs and labels, checked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from laplace_llm.errors import DataError, LaplaceLLMError
from laplace_llm.session import ordinary
from laplace_llm.shards import as_shard
from laplace_llm.taps import Batch


def labelled(
    loader: Iterable[Any], key: str, device: torch.device, description: str, progress_bar: bool
) -> Iterator[tuple[Batch, Tensor]]:
    """Yield the inputs and labels of each batch, of a shard without the examples it repeats.

    Parameters
    ----------
    loader : Iterable
        Yields mappings with a label entry, or ``(X, y)`` pairs. It needs no length.
    key : str
        The label's key in a mapping.
    device : torch.device
        Where plain input tensors and labels go; mappings are left to the model.
    description : str
        Of the progress bar.
    progress_bar : bool
        Whether to show one; of several processes, the first one does.

    Raises
    ------
    DataError
        If the loader is empty (a shard may be), or a batch is neither kind or has no labels.
    """
    shard = as_shard(loader)
    hidden, empty = not progress_bar or shard.rank > 0, True
    for index, batch in enumerate(tqdm(shard, desc=description, disable=hidden)):
        empty = False
        try:
            x, y = _split(ordinary(batch), key)
            check_inputs(x, device)
            y = _as_labels(y, device)
        except DataError as error:
            raise numbered(error, index) from error
        fresh = shard.fresh(len(y))
        if fresh == 0:
            continue
        if fresh < len(y):
            x, y = next(slices(x, fresh)), y[:fresh]
        if isinstance(x, Tensor):
            x = x.to(device)
        yield x, y.to(device)
    if shard.size == 1:
        check_any(not empty)


def check_any(found: object) -> None:
    """Raise DataError unless any data were found, on this process or another."""
    if not found:
        raise DataError("Expected a loader with at least one batch, but it yielded none.")


def _split(batch: Any, key: str) -> tuple[Batch, Any]:
    """Return the inputs and labels of a batch of either kind."""
    if isinstance(batch, MutableMapping):
        if key not in batch:
            names = sorted(map(str, batch))
            raise DataError(
                f"Expected labels under {key!r} in every batch, but got the keys {names}. "
                "Add them in the collator, or name their key with dict_key_y=..."
            )
        return batch, batch[key]
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    raise DataError(
        f"Expected each batch to be a mapping or an (X, y) pair, but got a {type(batch).__name__}."
    )


def check_inputs(x: Any, device: torch.device) -> None:
    """Raise DataError unless `x` is what a model can be called with: not nothing, and in memory."""
    if not isinstance(x, (Tensor, MutableMapping)) or (isinstance(x, Tensor) and x.ndim == 0):
        came = f"the scalar {x}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise DataError(
            f"Expected inputs that are a tensor (B, ...) or a mapping, but got {came}. Collate "
            "lists and arrays into tensors."
        )
    entries = x if isinstance(x, MutableMapping) else {"inputs": x}
    tensors = {key: value for key, value in entries.items() if isinstance(value, Tensor)}
    absent = [key for key, tensor in tensors.items() if tensor.is_meta]
    if absent and device.type != "meta":
        raise DataError(f"Expected {absent[0]!r} with values for {device}, but got it on meta.")
    if not len(x) or any(tensor.ndim and not len(tensor) for tensor in tensors.values()):
        raise DataError(
            "Expected inputs of at least one example in every batch, but got an empty one."
        )


def _as_labels(y: Any, device: torch.device) -> Tensor:
    try:
        labels = torch.as_tensor(y)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"Expected labels that are numbers, but got {y!r:.80} ({error}). Collate them into a "
            "tensor."
        ) from error
    if labels.ndim == 0:
        raise DataError(f"Expected a label for each example of a batch, but got {y!r} alone.")
    if labels.is_meta and device.type != "meta":
        raise DataError(f"Expected labels with values for {device}, but got some on meta.")
    return labels


def numbered(error: LaplaceLLMError, index: int) -> LaplaceLLMError:
    """Return the same kind of error, naming the batch it happened in."""
    return type(error)(f"{error} (in batch {index} of the loader, counted from 0)")


def check_labels(
    labels: Tensor, logits: Tensor, regression: bool, index: int | None = None
) -> Tensor:
    """Return the labels on the logits' device, or say what is wrong with them.

    Parameters
    ----------
    labels : Tensor
        (B,) class indices, or (B, C) targets for regression; (B,) too where C = 1.
    logits : Tensor
        (B, C); -inf for a choice that its row does not have.
    regression : bool
        Which of the two is expected.
    index : int, optional
        The batch's number, for the error.

    Raises
    ------
    DataError
        If they are not what is expected.
    """
    if index is not None:
        try:
            return check_labels(labels, logits, regression)
        except DataError as error:
            raise numbered(error, index) from error
    labels = labels.to(logits.device)
    if regression:
        if logits.shape[1] == 1 and labels.shape == logits.shape[:1]:
            labels = labels[:, None]
        if labels.shape != logits.shape:
            raise DataError(
                f"Expected regression targets of the outputs' shape {tuple(logits.shape)}, but got "
                f"{tuple(labels.shape)}."
            )
        if labels.is_complex() or not bool(labels.isfinite().all()):
            raise DataError(
                "Expected finite regression targets, but got NaN, inf or complex numbers. Leave "
                "such examples out."
            )
        return labels.to(logits.dtype)
    whole = not labels.is_floating_point() and not labels.is_complex()
    if labels.shape != logits.shape[:1] or not whole:
        raise DataError(
            f"Expected one integer label for each of {len(logits)} examples, but got shape "
            f"{tuple(labels.shape)} of {labels.dtype}."
        )
    outside = (labels < 0) | (labels >= logits.shape[1])
    if bool(outside.any()):
        raise DataError(
            f"Expected labels from 0 to {logits.shape[1] - 1}, as the model has {logits.shape[1]} "
            f"outputs, but got {int(labels[outside][0])}."
        )
    labels = labels.long()
    absent = logits.gather(1, labels[:, None]) == -torch.inf
    if bool(absent.any()):
        row = int(absent.flatten().nonzero()[0])
        raise DataError(
            f"Expected labels of choices that their rows have, but row {row} has label "
            f"{int(labels[row])}, whose logit is -inf: it has no such choice."
        )
    return labels


def check_outputs(count: int, before: int | None, index: int | None = None) -> int:
    """Return the number C of a batch's outputs, or say that it is not that of earlier batches.

    Parameters
    ----------
    count : int
        The batch's.
    before : int, optional
        The earlier batches'; None if this is the first.
    index : int, optional
        The batch's number, for the error.

    Raises
    ------
    DataError
        If they differ.
    """
    if before is None or count == before:
        return count
    error = DataError(
        f"Expected the same number of outputs from every batch, but got {count} after {before}. "
        "Where questions have different numbers of choices, tell the collator the largest of a "
        f"row: n_choices={max(count, before)} or more."
    )
    raise error if index is None else numbered(error, index)


def slices(batch: Batch, rows: int) -> Iterator[Batch]:
    """Cut a batch into parts of at most `rows` examples; mappings stay mappings."""
    size = batch_size(batch)
    if size <= rows:
        yield batch
        return
    for start in range(0, size, rows):
        yield select(batch, slice(start, start + rows))


def select(batch: Batch, index: slice | Tensor) -> Batch:
    """Return some examples of a batch; mappings stay mappings, with what is not batched."""
    if isinstance(batch, Tensor):
        return batch[index]
    size = batch_size(batch)
    return {
        key: value[index] if _is_batched(value, size) else value for key, value in batch.items()
    }


def batch_size(batch: Batch) -> int:
    """Return the length of the first dimension that the batch's tensors share."""
    if isinstance(batch, MutableMapping):
        key = "input_ids" if "input_ids" in batch else next(iter(batch))
        return len(batch[key])
    return len(batch)


def _is_batched(value: Any, size: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == size
