"""Data that several processes share: each streams its shard, what they sum is exchanged here.

Nothing else knows `torch.distributed`. Three rules keep processes from waiting for each other in
vain. What one process does alone is done `Shard.in_step`: whoever fails says so where the others
wait for it, and all of them raise. All processes then do the same work on the same numbers. And a
process that fails in the midst of an exchange, or is interrupted, raises at once: its end ends the
job, as it does everywhere in `torch.distributed`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from torch import Tensor
from torch import distributed as dist

from laplace_llm.errors import DataError, OptionError, ShardError
from laplace_llm.splits import dealt, is_split, own_examples

logger = logging.getLogger(__name__)


class Shard:
    """One process's part of the data, and its way to the processes that have the other parts.

    Wrap a loader in it where each process iterates over examples of its own, by a splitting of
    yours. Loaders with a `DistributedSampler`, and those that ``accelerator.prepare`` returns, are
    recognised without (`as_shard`). Examples that these two repeat, so that all processes have
    equally many, are left out.

    Parameters
    ----------
    loader : Iterable
        This process's batches. It may be empty on some processes, but not on all.
    group : torch.distributed.ProcessGroup, optional
        The processes that share the data; default: all. Without `torch.distributed`, the data are
        the whole data.

    Raises
    ------
    OptionError
        If there are several processes without a process group, this one is not in the group, the
        loader was split for another group, or it is not known which examples are repeated.
    """

    rank, size = 0, 1

    def __init__(self, loader: Iterable[Any], group: dist.ProcessGroup | None = None) -> None:
        check_iterable(loader)
        self.loader, self.group = loader, group
        self._own: int | None = None
        self._seen = 0
        self._batches: Iterator[Any] | None = None
        self._told: Exception | None = None  # what all processes know of
        self._midway = False
        if not _initialised():
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise OptionError(
                    "Expected a process group, as this is one of several processes. Call "
                    "torch.distributed.init_process_group(), or make an accelerate.Accelerator()."
                )
            return
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise OptionError("Expected a process group that this process belongs to.")
        if self.size > 1:
            self._own = own_examples(loader, self.rank, self.size)

    # The data -----------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Any]:
        self._seen, self._batches = 0, iter(self.loader)
        try:
            yield from self._batches
        except Exception:
            # A dispatcher's other processes now wait for this one's next batch.
            self._midway = isinstance(self.loader, DataLoaderDispatcher)
            raise

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]  # a TypeError where it has none

    def fresh(self, size: int) -> int:
        """Return how many of the `size` examples of the last batch are no repeats; the first ones.

        Called once a batch, in the order of the batches.
        """
        if self.size > 1 and isinstance(self.loader, DataLoaderDispatcher):
            if not self.loader.end_of_dataloader or size == 0:
                return size
            return min(size, dealt(self.loader.remainder, size, self.rank, self.size))
        if self._own is None:
            return size
        left = max(self._own - self._seen, 0)
        self._seen += size
        return min(size, left)

    # Other processes ------------------------------------------------------------------------------

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Do something that may fail on one process: if it does, all of them raise.

        Raises
        ------
        ShardError
            If another process failed; the one that did raises its own error.
        """
        if self.size == 1:
            yield
            return
        try:
            yield
        except Exception as error:
            if not self._midway and error is not self._told:
                failure = f"{type(error).__name__}: {error}"
                if not isinstance(error, ShardError):
                    logger.error(
                        "Rank %d of %d failed, and waits for the others to come so far: %s",
                        self.rank, self.size, failure,
                    )  # fmt: skip
                self._catch_up(failed=True)
                self._meet(failure, None)
                self._told = error
            raise
        self._catch_up()
        self._meet(None, None)

    def exchange(self, value: Any) -> list[Any]:
        """Return every process's value (small, and picklable), in the order of the ranks."""
        return [value] if self.size == 1 else self._meet(None, value)

    def agreed(self, compute: Callable[[], Tensor]) -> Tensor:
        """Return the first process's result of what all compute: chance and rounding may differ."""
        if self.size == 1:
            return compute()
        with self.in_step():
            result = compute()
        return self.exchange(result.cpu())[0].to(result.device)

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over all processes, by one all-reduce a dtype.

        Parameters
        ----------
        tensors : Sequence[Tensor]
            Of the same number, shapes and dtypes on all processes; written to.
        """
        if self.size == 1:
            return
        with self.in_step():
            packed = [_packed(tensors, dtype) for dtype in dict.fromkeys(t.dtype for t in tensors)]
        self._midway = True
        for flat, members in packed:
            dist.all_reduce(flat, group=self.group)
            for part, member in zip(flat.split([m.numel() for m in members]), members, strict=True):
                if part.data_ptr() != member.data_ptr():
                    member.copy_(part.view_as(member))
        self._midway = False

    def gather(
        self, pieces: Sequence[tuple[Tensor, ...]], device: torch.device
    ) -> Iterator[tuple[Tensor, ...]]:
        """Yield the tuples of tensors of all processes, rank by rank, each on its arrival.

        Parameters
        ----------
        pieces : Sequence
            This process's, of any number and shapes. To be iterated to the end on all processes.
        device : torch.device
            Where tensors come to be.
        """
        if self.size == 1:
            yield from pieces
            return
        layouts = self.exchange([[(t.shape, t.dtype) for t in piece] for piece in pieces])
        group = dist.group.WORLD if self.group is None else self.group
        assert group is not None
        self._midway = True
        for rank, layout in enumerate(layouts):
            source = dist.get_global_rank(group, rank)
            for index, kinds in enumerate(layout):
                if rank == self.rank:
                    piece = tuple(t.detach().to(device).contiguous() for t in pieces[index])
                else:
                    piece = tuple(torch.empty(*kind, dtype=t, device=device) for kind, t in kinds)
                for tensor in piece:
                    dist.broadcast(tensor, source, group=group)
                yield piece
        self._midway = False

    def _meet(self, failure: str | None, value: Any) -> list[Any]:
        """Say how this process fares where all of them come by; return their values."""
        reports: list[Any] = [None] * self.size
        dist.all_gather_object(reports, (failure, value), group=self.group)
        for rank, (failed, _) in enumerate(reports):
            if failed is not None and failure is None:
                self._told = ShardError(
                    f"Expected all {self.size} processes to get through their shards, but rank "
                    f"{rank} failed (see its own traceback): {failed}"
                )
                raise self._told
        return [value for _, value in reports]

    def _catch_up(self, failed: bool = False) -> None:
        """Take part in what accelerate's loaders exchange while they are iterated over.

        A dispatcher does before every batch, the others before the first one.
        """
        dispatched = isinstance(self.loader, DataLoaderDispatcher)
        if self._batches is None and not failed:
            return
        if dispatched or (failed and isinstance(self.loader, DataLoaderShard)):
            batches = iter(self) if self._batches is None else self._batches
            with suppress(Exception):  # the first error is the one to be told
                for _ in batches:
                    if not dispatched:
                        break


class _Whole(Shard):
    """All of the data on this process, whether there are others or not: nothing is exchanged."""

    def __init__(self, loader: Iterable[Any]) -> None:
        check_iterable(loader)
        self.loader, self._own = loader, None


def check_iterable(loader: Any) -> None:
    """Raise DataError unless the loader can be iterated over."""
    if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        raise DataError(
            f"Expected a loader that yields batches, but got a {type(loader).__name__}. Pass a "
            "DataLoader, or a list of batches."
        )


def as_shard(loader: Iterable[Any]) -> Shard:
    """Return a loader as the shard that it is, or as the whole data.

    Shards are a `Shard`, a DataLoader with a `DistributedSampler` for several processes of an
    initialised process group, and what ``accelerator.prepare`` makes of a DataLoader where there
    are several processes. All else is the whole data.

    Raises
    ------
    OptionError, DataError
        As `Shard`.
    """
    if isinstance(loader, Shard):
        return loader
    return Shard(loader) if _initialised() and is_split(loader) else _Whole(loader)


def shared_by(loaders: Iterable[Iterable[Any]]) -> Shard:
    """Return the processes that share any of the loaders, as a shard without data."""
    shard = max(map(as_shard, loaders), key=lambda shard: shard.size)
    return Shard((), shard.group) if shard.size > 1 else _Whole(())


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


def _packed(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Return the tensors of a dtype as one vector; itself, where it is one."""
    members = [tensor for tensor in tensors if tensor.dtype == dtype]
    if len(members) == 1 and members[0].is_contiguous():
        return members[0].view(-1), members
    return torch.cat([tensor.flatten().to(members[0].device) for tensor in members]), members
