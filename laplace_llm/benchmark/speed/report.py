"""The markdown tables and ``speed.json``."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

OURS = "laplace_llm"
PACKAGES = ("laplace-llm", "laplace-torch", "curvlinops-for-pytorch", "torch", "transformers",
            "peft")  # fmt: skip
Result = dict[str, Any]

TIMED = (
    "operation", "who", "seconds", "floor", "x floor", "times ours", "peak memory",
    "x training step's peak",
)  # fmt: skip
COUNTED = (
    "operation", "who", "peak", "beyond the model", "kept by the result", "largest allocation",
    "x training step's peak",
)  # fmt: skip


def compare(results: Sequence[Result]) -> None:
    """Add to each row how it compares with ours and with the training step, in place."""
    ours = {r["name"]: r for r in results if r["who"] == OURS and "seconds" in r}
    step = next((memory(r) for r in results if r["name"] == "step" and "peak_bytes" in r), None)
    for result in results:
        if result["who"] not in (OURS, "torch") and "seconds" in result and result["name"] in ours:
            # Beside their own floors where there are any: rows ran minutes apart.
            both = (result, ours[result["name"]])
            key = "floor_ratio" if all("floor_ratio" in r for r in both) else "seconds"
            result["times_ours"] = both[0][key] / both[1][key]
        # What a posterior takes beyond the model is no matter of training.
        if step and "peak_bytes" in result and result["name"] not in ("step", "construct"):
            result["step_ratio"] = memory(result) / step


def memory(result: Result) -> int:
    """Return a row's peak without what Python and its libraries take in every process."""
    return int(result["peak_bytes"] - result.get("libraries_bytes", 0))


def timed_table(results: Sequence[Result]) -> str:
    """Return the table of seconds and measured peaks."""
    rows = []
    for result in results:
        if "error" in result:
            rows.append([result["title"], result["who"], result["error"], *[""] * 5])
            continue
        seconds = _seconds(result["seconds"])
        if result["extrapolated_times"] > 1:
            seconds = f"{seconds} ({result['extrapolated_times']} x one value)"
        if result["repeats"] < result["asked_repeats"]:
            seconds = f"{seconds} ({result['repeats']} repeats)"
        floor = ""
        if result.get("floor"):
            floor = f"{result['floor']}: {_seconds(result['floor_seconds'])}"
        peak = _bytes(memory(result))
        if result["name"] == "construct":
            peak = _change(result["peak_bytes"] - result["before_bytes"])
        rows.append(
            [
                result["title"],
                result["who"],
                seconds,
                floor,
                _ratio(result.get("floor_ratio")),
                _ratio(result.get("times_ours")),
                peak,
                _ratio(result.get("step_ratio")),
            ]
        )
    return markdown(TIMED, rows)


def counted_table(results: Sequence[Result]) -> str:
    """Return the table of bytes counted on the meta device."""
    rows = []
    for result in results:
        if "error" in result:
            rows.append([result["title"], result["who"], result["error"], *[""] * 4])
            continue
        base = "before_bytes" if result["name"] == "construct" else "model_bytes"
        rows.append(
            [
                result["title"],
                result["who"],
                _bytes(result["peak_bytes"]),
                _change(result["peak_bytes"] - result[base]),
                _change(result["kept_bytes"]),
                _bytes(result["largest_bytes"]),
                _ratio(result.get("step_ratio")),
            ]
        )
    return markdown(COUNTED, rows)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a markdown table whose columns line up."""
    lines = [list(header), *map(list, rows)]
    lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    align = [str.ljust if i < 2 else str.rjust for i in range(len(header))]
    rule = ["-" * w if i < 2 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    text = [
        [pad(cell, width) for pad, cell, width in zip(align, line, widths, strict=True)]
        for line in lines
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in [text[0], rule, *text[1:]])


def circumstances(device: str, threads: int, arguments: Sequence[str]) -> dict[str, Any]:
    """Return what the numbers depend on besides the code."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "device": device_name(device),
        "threads": threads,
        "versions": versions | {"python": platform.python_version()},
        "command": shlex.join(["python", "-m", "laplace_llm.benchmark", "speed", *arguments]),
    }


def device_name(device: str) -> str:
    """Return the processor's or the accelerator's name."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    if device == "meta":
        return "meta (bytes are counted, nothing is computed)"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def notes(facts: dict[str, Any], workload: dict[str, Any]) -> str:
    """Return what stands below a table."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    what = workload["model"] or f"random weights of {workload['preset']}'s shape"
    lines = [
        f"{what}, LoRA r={workload['rank']} on {', '.join(workload['targets'])}, batch "
        f"{workload['batch']} x {workload['tokens']} tokens, {workload['choices']} choices",
        f"{facts['device']}, {facts['threads']} thread(s); {versions}",
    ]
    if workload["device"] == "meta":
        lines += [
            "Bytes of tensors alive at once, counted operation by operation; what a kernel frees "
            "before it returns is not seen, and attention keeps what the fused kernel keeps. "
            "Construct's peak includes the factors it copies; beyond the model it does not."
        ]
    else:
        lines += [
            "Medians; x floor is the median over pairs that ran in turns, times ours the ratio of "
            "two such where there are both. Memory on a CPU is the "
            "row's process's resident peak without what importing took; construct's is beyond "
            "what was there before.",
        ]
    return "\n".join([*lines, facts["command"]])


def write_json(path: Path, facts: dict[str, Any], workload: dict[str, Any],
               results: Sequence[Result]) -> None:  # fmt: skip
    """Write everything, raw times included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {**facts, "workload": workload, "rows": list(results)}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value < 100 else f"{value:,.0f} s"


def _bytes(value: float) -> str:
    return f"{value / 1e9:.2f} GB" if abs(value) >= 1e9 else f"{value / 1e6:,.1f} MB"


def _change(value: float) -> str:
    return f"{'+' if value >= 0 else ''}{_bytes(value)}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 10 else f"{value:,.0f}"
