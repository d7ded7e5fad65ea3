"""``python -m laplace_llm.benchmark calibration``: uncertainty methods on one's model and task."""

from __future__ import annotations

import argparse
import shlex
import warnings
from pathlib import Path
from typing import Any

import torch

from laplace_llm.benchmark.calibration import methods as _methods  # noqa: F401  # registers them
from laplace_llm.benchmark.calibration.plan import (
    Options,
    load_plugin,
    select_methods,
    select_tasks,
)
from laplace_llm.benchmark.calibration.results import Results, Run
from laplace_llm.benchmark.calibration.tasks import load_rows, registered_recipes
from laplace_llm.benchmark.models import SMOLLM2
from laplace_llm.errors import LaplaceLLMError

COMMAND = "python -m laplace_llm.benchmark calibration"
FULL: dict[str, Any] = {"train": 150, "val": 50, "test": 500, "seeds": [0, 1, 2]}
QUICK: dict[str, Any] = {"train": 60, "val": 20, "test": 60, "seeds": [0]}
# What libraries say of each other, in the middle of the progress bar.
NOISE = (
    ".is_gradient_checkpointing. is deprecated",
    "Using a non-full backward hook",
    ".torch.jit.script. is deprecated",
)
TASKS = ("trec", "sst2", "arc-easy", "openbookqa")


def main(arguments: list[str]) -> None:
    """Run the benchmark and write its report."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    with warnings.catch_warnings():
        for message in NOISE:
            warnings.filterwarnings("ignore", message=message)
        _main(parser, args, arguments)


def _main(parser: argparse.ArgumentParser, args: argparse.Namespace, arguments: list[str]) -> None:
    try:
        for path in args.plugin:
            load_plugin(path)
        if args.list:
            _list()
            return
        path = args.out / "results.jsonl"
        if args.report_only:
            runs = list(Results(path).read().values())
        else:
            runs = _run(args, shlex.join([*shlex.split(COMMAND), *arguments]))
    except LaplaceLLMError as error:
        parser.error(str(error))
    if not runs:
        parser.error(f"Expected runs in {path}, but there are none.")
    from laplace_llm.benchmark.calibration.report import write_report

    print(write_report(runs, args.out))


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="small subsets of one or two tasks, one seed")
    add("--tasks", nargs="+", metavar="TASK", help=f"default: {' '.join(TASKS)}, or general")
    add("--methods", nargs="+", default=[], metavar="NAME", help="parts of names, or globs")
    add("--seeds", nargs="+", type=int, help=f"default: {FULL['seeds']}; quick: {QUICK['seeds']}")
    add("--model", default=SMOLLM2, help="a folder or Hub name; default: %(default)s")
    add("--data-dir", type=Path, help="has TASK.{train,test}.jsonl; without it, the Hub")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name in ("train", "val", "test"):
        about = {
            "train": "training questions, those of --val among them",
            "val": "held out for the methods that tune on them",
            "test": "test questions, at most",
        }[name]
        add(f"--{name}", type=int, help=f"{about}; default: {FULL[name]}; quick: {QUICK[name]}")
    add("--rank", type=int, default=8, help="of LoRA; default: %(default)s")
    add("--targets", nargs="+", default=["q_proj", "v_proj"], help="the layers LoRA adapts")
    add("--out", type=Path, default=Path("outputs/calibration"), help="default: %(default)s")
    add("--plugin", type=Path, action="append", default=[], help="a Python file of your methods")
    add("--no-all-data", action="store_true", help="leave out the runs trained on all questions")
    add("--save-predictions", action="store_true", help="keep every question's probabilities")
    add("--report-only", action="store_true", help="write the report of what there is")
    add("--list", action="store_true", help="list the methods and tasks")
    return parser


def _run(args: argparse.Namespace, command: str) -> list[Run]:
    from laplace_llm.benchmark.calibration.runner import Runner

    defaults = QUICK if args.quick else FULL
    chosen = {
        name: default if getattr(args, name) is None else getattr(args, name)
        for name, default in defaults.items()
    }
    options = Options(
        tasks=tuple(args.tasks or _default_tasks(args.quick, args.data_dir)),
        methods=tuple(args.methods),
        seeds=tuple(chosen["seeds"]),
        model=args.model,
        data_dir=args.data_dir,
        device=args.device,
        train=chosen["train"],
        val=chosen["val"],
        test=chosen["test"],
        rank=args.rank,
        targets=tuple(args.targets),
        out=args.out,
        all_data=not (args.no_all_data or args.quick),
        quick=args.quick,
        save_predictions=args.save_predictions,
        command=command,
    )
    methods = select_methods(options.methods, options.quick)
    runner = Runner(options, select_tasks(options.tasks), methods)
    runner.run()
    return runner.planned_runs()


def _default_tasks(quick: bool, data_dir: Path | None) -> list[str]:
    """Return the tasks that there are questions of; the project's own if none."""
    found = []
    for name in TASKS[:2] if quick else TASKS:
        try:
            load_rows(name, "test", data_dir)
            found.append(name)
        except LaplaceLLMError:
            continue
    return found or ["general"]


def _list() -> None:
    from laplace_llm.benchmark.calibration.method import missing, registered

    for name, method in registered().items():
        lacking = ", ".join(f'"{pip}"' for _, pip in missing(method))
        print(f"{method.group:13} {name}{f'  (pip install {lacking})' if lacking else ''}")
    print("tasks:", " ".join(registered_recipes()))
