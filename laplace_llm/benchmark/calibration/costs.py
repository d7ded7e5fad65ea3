"""Seconds and memory of a piece of work, and what it is spared by work done before."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Cost:
    """What a piece of work took.

    Attributes
    ----------
    seconds : float
        Of wall-clock time.
    memory : int
        Most bytes in use at once, beside those in use when it began; 0 where that is unknown
        (without a GPU it takes Linux).
    """

    seconds: float = 0.0
    memory: int = 0


class Meter:
    """Measures nested pieces of work on one device.

    Memory has one peak for the whole process, which is set back whenever a piece of work begins
    or ends; what it was is noted for all pieces that are under way.

    Parameters
    ----------
    device : torch.device
        A GPU's memory is the allocator's, a CPU's the resident memory of the process.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._peaks: list[int] = []

    @property
    def sees_memory(self) -> bool:
        """Whether memory is measured here."""
        return self.device.type == "cuda" or _CLEAR.exists()

    @contextmanager
    def measure(self) -> Iterator[Cost]:
        """Measure the work in the block; the result is filled in at its end."""
        cost = Cost()
        self._note()
        start, before = self._time(), self._memory()
        self._peaks.append(before)
        try:
            yield cost
        finally:
            self._note()
            cost.seconds = self._time() - start
            cost.memory = max(self._peaks.pop() - before, 0)

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Let no piece of work that is under way see the memory of the block."""
        self._note()
        peaks, self._peaks = self._peaks, []
        try:
            yield
        finally:
            self._reset()
            self._peaks = peaks

    def _note(self) -> None:
        peak = self._peak()
        self._peaks = [max(other, peak) for other in self._peaks]
        self._reset()

    def _time(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _memory(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return _from_status("VmRSS")

    def _peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return _from_status("VmHWM")

    def _reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif _CLEAR.exists():
            with suppress(OSError):  # not allowed here: the peak is then the whole process's
                _CLEAR.write_text("5")


def _from_status(key: str) -> int:
    """Return an entry of Linux's account of this process, in bytes."""
    if not _STATUS.exists():
        return 0
    found = re.search(rf"{key}:\s+(\d+) kB", _STATUS.read_text())
    return 1024 * int(found[1]) if found else 0
