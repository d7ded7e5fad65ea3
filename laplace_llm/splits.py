"""How torch and accelerate split a loader among processes, and which examples they repeat.

Both make all parts equally long by repeating examples at their ends, unless told to drop some.
"""

from __future__ import annotations

from typing import Any

from accelerate import PartialState
from accelerate.data_loader import (
    BatchSamplerShard,
    DataLoaderDispatcher,
    DataLoaderShard,
    IterableDatasetShard,
)
from torch.utils.data import BatchSampler, IterableDataset
from torch.utils.data.distributed import DistributedSampler

from laplace_llm.errors import OptionError


def is_split(loader: Any) -> bool:
    """Return whether a loader is known to yield one process's part of the data."""
    if isinstance(loader, (DataLoaderShard, DataLoaderDispatcher)):
        return PartialState().num_processes > 1
    sampler = _distributed_sampler(loader)
    return sampler is not None and sampler.num_replicas > 1


def _distributed_sampler(loader: Any) -> DistributedSampler | None:
    for outer in (getattr(loader, name, None) for name in ("batch_sampler", "sampler")):
        for sampler in (outer, getattr(outer, "sampler", None)):
            if isinstance(sampler, DistributedSampler):
                return sampler
    return None


def own_examples(loader: Any, rank: int, size: int) -> int | None:
    """Return how many examples of a rank's loader are no repeats; they come first.

    Parameters
    ----------
    loader : Iterable
        A rank's part of the data.
    rank, size : int
        Which of how many processes this is.

    Returns
    -------
    examples : int or None
        None where there are no repeats, or, for a dispatcher, where it says so with the last batch.

    Raises
    ------
    OptionError
        If the loader was split for other processes, or there are repeats that are not known.
    """
    if isinstance(loader, DataLoaderDispatcher):
        return None
    batches = getattr(loader, "batch_sampler", None)
    if batches is None:
        batches = getattr(loader, "sampler", None)
    dataset, sampler = getattr(loader, "dataset", None), _distributed_sampler(loader)
    if isinstance(batches, BatchSamplerShard):
        _check_place(batches.process_index, batches.num_processes, rank, size)
        if batches.drop_last or not batches.even_batches:
            return None
        if type(batches.batch_sampler) is BatchSampler:
            turn = batches.batch_size // (size if batches.split_batches else 1)
            return dealt(len(batches.batch_sampler.sampler), turn, rank, size)  # type: ignore[arg-type]
    elif isinstance(dataset, IterableDatasetShard):
        _check_place(dataset.process_index, dataset.num_processes, rank, size)
        if dataset.drop_last:
            return None
        if hasattr(dataset.dataset, "__len__"):
            turn = dataset.batch_size // (size if dataset.split_batches else 1)
            return dealt(len(dataset.dataset), turn, rank, size)
    elif isinstance(loader, DataLoaderShard):
        if isinstance(dataset, IterableDataset):
            return None  # a Hugging Face data set, which was split into its own shards
    elif sampler is not None:
        _check_place(sampler.rank, sampler.num_replicas, rank, size)
        total = len(sampler.dataset)  # type: ignore[arg-type]
        if sampler.drop_last or total % size == 0:
            return None
        plain = type(sampler).__iter__ is DistributedSampler.__iter__
        if plain and type(batches) is BatchSampler and batches.sampler is sampler:
            return dealt(total, 1, rank, size)
    else:
        return None
    raise OptionError(
        "Expected a loader whose repeated examples are known, but it is not known how its sampler "
        f"({type(batches).__name__}) evens out the shards. Have it repeat none (drop_last=True, or "
        "even_batches=False in accelerate.DataLoaderConfiguration), or split the data yourself and "
        "wrap your batches: laplace_llm.Shard(batches)."
    )


def dealt(total: int, turn: int, rank: int, size: int) -> int:
    """Return how many of `total` examples a rank gets, if `turn` at a time are dealt in turns."""
    rounds, rest = divmod(total, turn * size)
    return rounds * turn + min(max(rest - rank * turn, 0), turn)


def _check_place(rank: int, size: int, group_rank: int, group_size: int) -> None:
    if (rank, size) != (group_rank, group_size):
        raise OptionError(
            f"Expected a loader that is split for rank {group_rank} of {group_size}, but got one "
            f"for rank {rank} of {size}. Name the processes that share the data: "
            "laplace_llm.Shard(loader, group)."
        )
