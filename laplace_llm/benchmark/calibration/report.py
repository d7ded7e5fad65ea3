"""``report.md``: what the runs say, with the command and versions they came from."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from laplace_llm.benchmark.calibration import stored, tables
from laplace_llm.benchmark.calibration.bootstrap import paired_bootstrap
from laplace_llm.benchmark.calibration.methods.laplace_lora import DEFAULT, DEFAULT_VALIDATED
from laplace_llm.benchmark.calibration.methods.point import MAP_NAME
from laplace_llm.benchmark.calibration.results import OK, PROTOCOLS, Run
from laplace_llm.benchmark.calibration.summary import Row, best, mean, paired, rows

PACKAGES = ("laplace-llm", "laplace-torch", "torch", "transformers", "peft", "torchmetrics")
LEGEND = (
    "Mean ± standard error over seeds; the best of a column in bold. ° needs no validation "
    "questions. ECE has 15 bins, adaptive ECE 15 of equal size."
)
ALL_DATA = (
    ' The columns "all data" are of an adapter trained on the validation questions, too, and '
    "compare with each other only."
)
DIFFERENCES = (
    "NLL differences, paired by question and seed, with 95 % bootstrap intervals; **wins** and "
    "**loses** where the interval leaves out zero. The best last-layer method is the one with the "
    "lowest NLL on these test questions: chosen in hindsight, to its advantage. Seeds are drawn "
    "anew as well as questions, but few seeds make the intervals a little too short."
)
COSTS = (
    "Beside the trained adapter, averaged over seeds. Work that methods share is charged to each, "
    "as if it worked alone; the pass that Laplace posteriors share takes C backward passes, where "
    "the default link alone needs C - 1. Memory (of a GPU) is what it takes at most beyond what "
    "was in use before, in that pass that of all of them together."
)
COVERAGE = (
    "Split conformal sets, calibrated on the validation questions. † was tuned on the same "
    "questions, so that its coverage is not guaranteed."
)


def write_report(runs: list[Run], out: Path) -> str:
    """Write ``report.md`` and the plots; return where they are and the summary.

    Parameters
    ----------
    runs : list[Run]
    out : Path
        The folder.
    """
    tasks = list(dict.fromkeys(run.task for run in runs))
    plots: dict[str, list[str]] = {task: [] for task in tasks}
    if find_spec("matplotlib") is not None:
        from laplace_llm.benchmark.calibration.plots import draw

        plots = {task: draw(rows(runs, task), task, out) for task in tasks}
    short = "\n".join(line for task in tasks for line in in_short(runs, task))
    parts = ["# Calibration benchmark", *setup(runs)]
    if short:
        parts += ["## In short", short]
    if len(tasks) > 1:
        parts += ["## Overview", tables.overview_table({t: rows(runs, t) for t in tasks}), LEGEND]
    for task in tasks:
        parts += section(runs, task, plots[task])
    parts += not_run(runs)
    path = out / "report.md"
    stored.write_text(path, "\n\n".join(parts) + "\n")
    return f"{short}\n\nReport: {path}".strip()


def setup(runs: list[Run]) -> list[str]:
    """Return the commands, the sizes and the versions."""
    versions = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    settings = runs[0].settings
    made = (
        f"{settings['model']}, LoRA of rank {settings['rank']} on "
        f"{', '.join(settings['targets'])}; on {settings['device']}."
    )
    tasks: dict[str, list[str]] = {}
    for task in dict.fromkeys(run.task for run in runs):
        some = [run for run in runs if run.task == task]
        at, seeds = some[0].settings, sorted({run.seed for run in some})
        size = (
            f"{at['train'] - at['val']} training, {at['val']} validation and at most "
            f"{at['test']} test questions, seeds {', '.join(map(str, seeds))}."
        )
        tasks.setdefault(size, []).append(task)
    sizes = [f"{', '.join(names)}: {size}" for size, names in tasks.items()]
    commands = "\n".join(dict.fromkeys(run.command for run in runs if run.command))
    return [f"```bash\n{commands}\n```", " ".join([made, *sizes]), "; ".join(versions) + "."]


def in_short(runs: list[Run], task: str) -> list[str]:
    """Return how Laplace-LoRA's defaults do against the best method of like means."""
    lines = []
    for protocol in PROTOCOLS:
        table = rows(runs, task, protocol)
        where = task if protocol == PROTOCOLS[0] else f"{task}, trained on all data"
        for ours in (table[name] for name in (DEFAULT, DEFAULT_VALIDATED) if name in table):
            other = best(table, partial(_is_rival, ours))
            if other is not None:
                lines.append(f"- {where}: {_sentence(table, ours, other)}")
    return lines


def _is_rival(ours: Row, row: Row) -> bool:
    """Whether a method is of the same adapter and not ours, and needs no more data than ours."""
    return row.single_model and row.group != ours.group and (ours.tuned or not row.tuned)


def _sentence(table: dict[str, Row], row: Row, other: Row) -> str:
    halves = paired(row, other)
    if halves is None:
        return f"{row.method} and {other.method} have no seed in common."
    found = paired_bootstrap(*halves)
    words = {
        "lower": f"**{row.method} wins against {other.method}**",
        "higher": f"**{row.method} loses against {other.method}**",
        "tie": f"{row.method} ties with {other.method}",
    }[found.verdict]
    means = "" if row.tuned else " without validation questions"
    text = (
        f"{words}, the best of the other methods on the same adapter{means}: NLL "
        f"{float(halves[0].mean()):.3f} against {float(halves[1].mean()):.3f} (95 % interval of "
        f"the difference {found.low:+.3f} to {found.high:+.3f})."
    )
    return f"{text} {_targets(row, table[MAP_NAME])}" if MAP_NAME in table else text


def _targets(row: Row, map_row: Row) -> str:
    """Return ECE and accuracy beside MAP's, and whether they are as they should be."""
    ece, map_ece = mean(row.metric("ECE")), mean(map_row.metric("ECE"))
    accuracy, map_accuracy = mean(row.metric("accuracy")), mean(map_row.metric("accuracy"))
    limit = map_ece / 3 if map_ece > 0.1 else map_ece
    verdicts = [
        (f"ECE {ece:.3f}, MAP's {map_ece:.3f}", ece <= limit),
        (f"accuracy {accuracy:.3f}, MAP's {map_accuracy:.3f}", accuracy >= map_accuracy - 0.005),
    ]
    return (
        "; ".join(f"{text}: **target {'met' if met else 'missed'}**" for text, met in verdicts)
        + "."
    )


def section(runs: list[Run], task: str, plots: Iterable[str]) -> list[str]:
    """Return a task's tables and plots."""
    table = rows(runs, task)
    if not table:
        return [f"## {task}", "No run went well."]
    everything = rows(runs, task, PROTOCOLS[1])
    legend = LEGEND + (ALL_DATA if everything else "")
    parts = [f"## {task}", tables.metric_table(table, everything), legend]
    last_layer = best(table, lambda row: row.group == "last layer")
    against = [row for row in (table.get(MAP_NAME), last_layer) if row is not None]
    if against and len(table) > 1:
        parts += ["### Differences", tables.difference_table(table, against), DIFFERENCES]
    parts += [f"![{Path(name).stem}]({name})" for name in plots]
    parts += ["### Costs", tables.cost_table(table), COSTS, _training(table)]
    if coverage := tables.coverage_table(table):
        parts += ["### Coverage", coverage, COVERAGE]
    else:
        why = {run.coverage_reason for row in table.values() for run in row.runs}
        parts += ["### Coverage", f"No conformal sets: {'; '.join(sorted(why))}"]
    first = next(iter(table.values())).runs[0]
    for test in first.tests:
        if test != task:
            common = {m: row for m, row in table.items() if all(test in r.tests for r in row.runs)}
            parts += [f"### Out of distribution: {test}", tables.ood_table(common, test)]
    if first.absent:
        parts.append("\n".join(f"- {name} is absent: {why}" for name, why in first.absent.items()))
    return parts


def _training(table: dict[str, Row]) -> str:
    seconds = mean([run.costs["train_seconds"] for row in table.values() for run in row.runs])
    return f"Training the adapter took {seconds:.0f} s, which is not in the table."


def not_run(runs: list[Run]) -> list[str]:
    """Return which methods have no numbers, and why."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for run in runs:
        if run.status != OK:
            where = f"{run.task}, seed {run.seed}, {run.protocol}"
            reasons.setdefault((run.method, run.status, run.reason), []).append(where)
    if not reasons:
        return []
    lines = []
    for (method, status, reason), places in reasons.items():
        tasks = "; ".join(dict.fromkeys(place.split(", seed")[0] for place in places))
        lines.append([method, f"**{status}**" if status == "failed" else status, reason, tasks])
    table = "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |"
        for line in [["method", "status", "why", "tasks"], ["---"] * 4, *lines]
    )
    return ["## Without numbers", table]
