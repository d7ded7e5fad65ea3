"""One row in a process of its own, so that its peak memory is its own: ``python -m ...row``.

Reads a request in JSON from the command line and writes its result to the file named there.
"""

from __future__ import annotations

import json
import sys
import traceback
from contextlib import ExitStack, suppress
from pathlib import Path
from statistics import median
from typing import Any

import torch

from laplace_llm.benchmark.speed import measure, operations, peers
from laplace_llm.benchmark.speed.accounting import FusedAttention, LiveBytes, account
from laplace_llm.benchmark.speed.operations import Row
from laplace_llm.benchmark.speed.presets import Problem, Workload

_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def find_row(name: str, who: str) -> Row:
    """Return the row of an operation by one of the contestants."""
    return next(
        row for row in [*operations.ROWS, *peers.ROWS] if (row.name, row.who) == (name, who)
    )


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Run a request's row; an error is a result too."""
    libraries = measure.resident_bytes()  # what importing alone takes
    workload = Workload(**request["workload"])
    try:
        row = find_row(request["name"], request["who"])
        if workload.device == "meta":
            return accounted(row, workload)
        torch.set_num_threads(request["threads"])
        result = measured(row, workload, request["repeats"], request["budget"])
    except Exception as error:
        return {"error": describe(error), "traceback": traceback.format_exc()}
    if not workload.device.startswith("cuda"):
        result["libraries_bytes"] = libraries
    return result


def measured(row: Row, workload: Workload, repeats: int, budget: float) -> dict[str, Any]:
    """Measure the row's memory and time."""
    problem = Problem(workload)
    operation = row.set_up(problem)
    peak = measure.peak_memory(operation.run, problem.device)
    if peak.seconds > budget:  # the run that memory was measured on has to do
        raw = measure.Timing([peak.seconds], [])
    else:
        raw = measure.timings(operation.run, operation.floor, problem.device, repeats, budget)
    result: dict[str, Any] = {
        "seconds": operation.times * median(raw.seconds),
        "raw_seconds": raw.seconds,
        "raw_floor_seconds": raw.floor,
        "first_seconds": peak.seconds,
        "repeats": len(raw.seconds),
        "extrapolated_times": operation.times,
        "before_bytes": peak.before,
        "peak_bytes": peak.peak,
    }
    if raw.floor:
        ratios = [seconds / floor for seconds, floor in zip(raw.seconds, raw.floor, strict=True)]
        result |= {
            "floor": operation.floor_name,
            "floor_seconds": median(raw.floor),
            "floor_ratio": operation.times * median(ratios),
        }
    return result


def accounted(row: Row, workload: Workload) -> dict[str, Any]:
    """Count the row's bytes on the meta device."""
    live = LiveBytes()
    with ExitStack() as stack:
        stack.enter_context(live)
        stack.enter_context(FusedAttention())
        problem = Problem(workload)
        model = live.current
        operation = row.set_up(problem)
        needs = account(operation.run, live)
    return {
        "model_bytes": model,
        "before_bytes": needs.before,
        "peak_bytes": needs.peak,
        "kept_bytes": needs.kept,
        "largest_bytes": needs.largest,
    }


def describe(error: BaseException) -> str:
    """Return an error in a few words for the table."""
    message = " ".join(str(error).split())
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(text in message.lower() for text in _NO_MEMORY)
    ):
        return "out of memory"
    return f"{type(error).__name__}: {message}"[:200]


def main(arguments: list[str]) -> None:
    """Run the request given in JSON and write the result to the file given after it."""
    # Where the system runs out of memory, it is this process that goes.
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    request, path = arguments
    Path(path).write_text(json.dumps(run(json.loads(request))), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
