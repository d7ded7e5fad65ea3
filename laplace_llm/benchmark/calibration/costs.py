"""Seconds and memory of a piece of work, and what it is spared by work done before."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass
class Cost:
    """What a piece of work took.

    Attributes
    ----------
    seconds : float
        Of wall-clock time.
    memory : int
        Most bytes in use at once, beside those in use when it began; 0 without a GPU.
    """

    seconds: float = 0.0
    memory: int = 0


@dataclass
class _Piece:
    """A piece of work under way: bytes in use when it began, and at most since then."""

    before: int
    peak: int


class Meter:
    """Measures nested pieces of work on one device.

    Memory is the GPU allocator's, which has one peak for the whole process; it is set back whenever
    a piece of work begins or ends, and noted for all pieces that are under way. A CPU's allocator
    keeps and hands out again what was freed, so that the process's size says little of a piece of
    work; ``benchmark speed`` measures it in processes of their own.

    Parameters
    ----------
    device : torch.device
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pieces: list[_Piece] = []

    @property
    def sees_memory(self) -> bool:
        """Whether memory is measured here."""
        return self.device.type == "cuda"

    @contextmanager
    def measure(self) -> Iterator[Cost]:
        """Measure the work in the block; the result is filled in at its end."""
        cost = Cost()
        self._note()
        start, before = self._time(), self._memory()
        piece = _Piece(before, before)
        self._pieces.append(piece)
        try:
            yield cost
        finally:
            self._note()
            cost.seconds = self._time() - start
            self._pieces.pop()
            cost.memory = max(piece.peak - piece.before, 0)

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Let no piece of work that is under way see the block's memory, nor what it leaves."""
        self._note()
        pieces, self._pieces, before = self._pieces, [], self._memory()
        try:
            yield
        finally:
            grown = self._memory() - before
            for piece in pieces:
                piece.before += grown
                piece.peak += grown
            self._reset()
            self._pieces = pieces

    def _note(self) -> None:
        peak = self._peak()
        for piece in self._pieces:
            piece.peak = max(piece.peak, peak)
        self._reset()

    def _time(self) -> float:
        if self.sees_memory:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _memory(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.sees_memory else 0

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) if self.sees_memory else 0

    def _reset(self) -> None:
        if self.sees_memory:
            torch.cuda.reset_peak_memory_stats(self.device)
