"""One thread at a time on a model, and on every other model that has a weight in common with it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from threading import RLock
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary


class Numbered(NamedTuple):
    """A re-entrant lock, and its place in the order that all threads take locks in."""

    number: int
    lock: Any


class Locks:
    """The locks of all models in use, which are kept neither by nor on the models.

    Two heads over one PeftModel, two adapters of one base, or a module and what it is a part of
    are the same to the threads that borrow them: each would find the other's flags, modes, hooks
    and sampled weights. So a lock belongs to weights, and a model has the locks of its weights:
    one, unless models that were used apart become parts of one.
    """

    def __init__(self) -> None:
        self._guard = RLock()
        self._numbers = count()
        self._of_weight = WeakIdKeyDictionary()
        self._of_model: WeakKeyDictionary[nn.Module, tuple[Numbered, ...]] = WeakKeyDictionary()

    def of(self, model: nn.Module) -> tuple[Numbered, ...]:
        """Return the locks of a model, in the order to take them."""
        with self._guard:
            if model not in self._of_model:
                self._of_model[model] = self._found(model)
            return self._of_model[model]

    def _found(self, model: nn.Module) -> tuple[Numbered, ...]:
        """Return the locks of a model's weights, and give one to those without."""
        # As they are registered, whatever a wrapper such as FSDP makes of them.
        weights = [weight for _, weight in nn.Module.named_parameters(model)]
        known = {self._of_weight[weight] for weight in weights if weight in self._of_weight}
        found = sorted(known, key=lambda lock: lock.number) or [
            Numbered(next(self._numbers), RLock())
        ]
        for weight in weights:
            if weight not in self._of_weight:
                self._of_weight[weight] = found[0]
        return tuple(found)


_locks = Locks()
# Of what is the whole process's: which attention kernels there are, whether code runs compiled.
PROCESS = Numbered(-1, RLock())


def _forget() -> None:
    """Start anew in a forked process: the threads that held locks are not in it."""
    global _locks, PROCESS
    _locks, PROCESS = Locks(), Numbered(-1, RLock())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@contextmanager
def alone_with(model: nn.Module) -> Iterator[None]:
    """Keep other threads' calls off a model; a thread may enter again."""
    with _held(_locks.of(model)):
        yield


@contextmanager
def alone_in_process() -> Iterator[None]:
    """Keep other threads from what changes a switch of the whole process."""
    with PROCESS.lock:
        yield


@contextmanager
def _held(locks: tuple[Numbered, ...]) -> Iterator[None]:
    # By `with` on the lock itself, as an interrupt cannot fall between that and its release.
    if not locks:
        yield
        return
    with locks[0].lock, _held(locks[1:]):
        yield
