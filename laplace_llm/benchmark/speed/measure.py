"""Peak memory of one call, then seconds of a call and of its floor in turns."""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

Call = Callable[[], Any]


class Timing(NamedTuple):
    """Seconds of every repeat; `floor` is empty where there is no floor."""

    seconds: list[float]
    floor: list[float]


class Peak(NamedTuple):
    """Bytes in use before a call and at its peak, and how long it took."""

    before: int
    peak: int
    seconds: float


def peak_memory(call: Call, device: torch.device) -> Peak:
    """Run the call once and return the memory it needed.

    On CUDA what torch has allocated; otherwise this process's resident memory, whose high-water
    mark is reset first where the system allows it.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        _return_free_memory()
        _return_at_once(_EXACT)
        _reset_high_water_mark()
        before = resident_bytes()
    start = time.perf_counter()
    result = call()  # held until the peak is read: it is part of what the call needs
    seconds = _now(device) - start
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else high_water_mark()
    del result
    if device.type != "cuda":
        _return_at_once(_LARGEST)
    return Peak(before, peak, seconds)


def timings(
    call: Call, floor: Call | None, device: torch.device, repeats: int, budget: float
) -> Timing:
    """Time a call and its floor in turns, so that both see the same machine.

    Parameters
    ----------
    call, floor : Callable
        Without arguments; `call` has been run before (`peak_memory`).
    device : torch.device
        Waited for before a clock is read.
    repeats : int
        At most so many of each, at least one.
    budget : float
        No repeat begins that would end after so many seconds, judged by the ones before.
    """
    if floor is not None:
        floor()
    seconds: list[float] = []
    floors: list[float] = []
    start = time.perf_counter()
    for index in range(repeats):
        if index and (time.perf_counter() - start) * (index + 1) / index > budget:
            break
        pair = [(call, seconds)] if floor is None else [(call, seconds), (floor, floors)]
        for run, times in pair if index % 2 == 0 else pair[::-1]:
            began = _now(device)
            run()
            times.append(_now(device) - began)
    return Timing(seconds, floors)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# Resident memory ----------------------------------------------------------------------------------


def resident_bytes() -> int:
    """Return this process's resident memory, or what is known of its peak."""
    return _status("VmRSS") or _maximum()


def high_water_mark() -> int:
    """Return the largest resident memory since the last reset, or since the start."""
    return _status("VmHWM") or _maximum()


def _status(key: str) -> int | None:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    return None


def _maximum() -> int:
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _reset_high_water_mark() -> None:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


# Bytes from which the C library gives freed memory back to the system at once. By itself it raises
# the limit as it goes, and peaks then depend on what it has kept.
_EXACT, _LARGEST = 128 * 2**10, 32 * 2**20


def _return_at_once(limit: int) -> None:
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(-3, limit)  # M_MMAP_THRESHOLD


def _return_free_memory() -> None:
    """Give the system back what set-up has freed, which would count as the call's otherwise."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
