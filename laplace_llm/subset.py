"""A subset of the training data: laplace-torch's draw, from any loader."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from laplace_llm._compat import SoDSampler
from laplace_llm.data import labelled, select


def subset_of_data(
    loader: Iterable[Any], size: int | None, seed: int, key: str
) -> tuple[Iterable[Any], int]:
    """Return batches of `size` examples, drawn without replacement, and how many are left out.

    Parameters
    ----------
    loader : Iterable
        See `labelled`. A `DataLoader` that reads all of a sized dataset is not read: the dataset
        is, at laplace-torch's indices. Of anything else all batches are read and held.
    size : int, optional
        Number of examples; default, and where there are no more: all.
    seed : int
        Of the draw.
    key : str
        The label's key in a mapping.

    Raises
    ------
    DataError
        As in `labelled`.
    """
    if size is None:
        return loader, 0
    if isinstance(loader, DataLoader) and _reads_all(loader):
        total = len(loader.dataset)  # type: ignore[arg-type]
        if size >= total:
            return loader, 0
        chosen = SoDSampler(total, size, seed).indices.tolist()
        subset = DataLoader(
            loader.dataset, loader.batch_size, sampler=chosen, collate_fn=loader.collate_fn
        )
        return subset, total - size
    batches = list(labelled(loader, key, torch.device("cpu"), "", False))
    ends = torch.tensor([len(y) for _, y in batches]).cumsum(0).tolist()
    if size >= ends[-1]:
        return batches, 0
    indices = SoDSampler(ends[-1], size, seed).indices.sort().values
    subsets = []
    for (x, y), end in zip(batches, ends, strict=True):
        own = indices[(indices >= end - len(y)) & (indices < end)] - (end - len(y))
        if len(own):
            subsets.append((select(x, own), y[own]))
    return subsets, ends[-1] - size


def _reads_all(loader: DataLoader) -> bool:
    return (
        isinstance(loader.sampler, (SequentialSampler, RandomSampler))
        and loader.batch_size is not None
        and len(loader.sampler) == len(loader.dataset)  # type: ignore[arg-type]
    )
