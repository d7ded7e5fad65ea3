"""Markdown tables: mean and standard error, the best in bold, paired differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from laplace_llm.benchmark.calibration.bootstrap import Difference, paired_bootstrap
from laplace_llm.benchmark.calibration.method import GROUPS
from laplace_llm.benchmark.calibration.metrics import METRICS, SCORES, ood_auroc
from laplace_llm.benchmark.calibration.summary import Row, mean, paired, standard_error

Column = dict[str, Sequence[float]]  # the seeds' values by method


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table whose first column is text and whose others are numbers."""
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *lines])


def cells(column: Mapping[str, Sequence[float]], form: str, higher: bool) -> dict[str, str]:
    """Return ``mean ± standard error`` by method, those that print like the best in bold.

    The best is one of those with the most seeds.
    """
    means = {name: mean(values) for name, values in column.items()}
    most = max(map(len, column.values()), default=0)
    known = [v for name, v in means.items() if math.isfinite(v) and len(column[name]) == most]
    top = (max if higher else min)(known, default=math.nan)
    texts = {}
    for name, value in means.items():
        if not math.isfinite(value):
            texts[name] = ""
            continue
        error = standard_error(column[name])
        text = f"{value:{form}}" + (f" ± {error:{form}}" if math.isfinite(error) else "")
        best = len(column[name]) == most and f"{value:{form}}" == f"{top:{form}}"
        texts[name] = f"**{text}**" if best else text
    return texts


def metric_table(table: dict[str, Row], all_data: dict[str, Row]) -> str:
    """Return a task's table of metrics, with the NLL of the methods trained on all questions."""
    columns = {
        name: cells({m: row.metric(name) for m, row in table.items()}, form, higher)
        for name, (form, higher) in METRICS.items()
    }
    if all_data:
        for name in ("NLL", "ECE"):
            form, higher = METRICS[name]
            values = {m: row.metric(name) for m, row in all_data.items()}
            columns[f"{name}, all data"] = cells(values, form, higher)
    most = max((len(row.runs) for row in table.values()), default=0)
    lines = []
    for name, row in table.items():
        few = "" if len(row.runs) == most else f" ({len(row.runs)} of {most} seeds)"
        mark = "" if row.tuned else " °"
        lines.append([f"{name}{mark}{few}", *(column.get(name, "") for column in columns.values())])
    return markdown(["method", *columns], lines)


def overview_table(by_task: Mapping[str, dict[str, Row]]) -> str:
    """Return NLL and ECE of every method on every task."""
    columns = {}
    for task, table in by_task.items():
        for name in ("NLL", "ECE"):
            values = {m: row.metric(name) for m, row in table.items()}
            columns[f"{task}, {name}"] = cells(values, *METRICS[name])
    every = {m: row for table in by_task.values() for m, row in table.items()}
    for task, table in by_task.items():
        most = max((len(row.runs) for row in table.values()), default=0)
        for m, row in table.items():
            if len(row.runs) < most:
                columns[f"{task}, NLL"][m] += f" ({len(row.runs)} of {most} seeds)"
    lines = [
        [m if row.tuned else f"{m} °", *(column.get(m, "") for column in columns.values())]
        for m, row in sorted(every.items(), key=lambda item: GROUPS.index(item[1].group))
    ]
    return markdown(["method", *columns], lines)


def difference_table(table: dict[str, Row], against: Sequence[Row]) -> str:
    """Return NLL differences to other rows; wins and losses are bold alike."""
    lines = []
    for row in table.values():
        texts = [difference(row, other) for other in against]
        if any(texts):
            lines.append([row.method, *texts])
    return markdown(["method", *(f"against {other.method}" for other in against)], lines)


def difference(row: Row, other: Row) -> str:
    """Return a difference with its interval and verdict; empty against itself."""
    if row.method == other.method:
        return ""
    halves = paired(row, other)
    return "" if halves is None else verdict(paired_bootstrap(*halves))


def verdict(found: Difference) -> str:
    """Return a difference in words: bold unless it may be chance."""
    interval = f"[{found.low:+.3f}, {found.high:+.3f}]"
    word = {"lower": "wins", "higher": "loses", "tie": "tie"}[found.verdict]
    text = f"{found.mean:+.3f} {word}"
    return f"{text} {interval}" if word == "tie" else f"**{text}** {interval}"


def cost_table(table: dict[str, Row]) -> str:
    """Return what every method costs beside the trained adapter."""
    header = (
        "method", "fit, s", "prediction, ms a question", "peak memory, MB", "numbers kept",
        "passes a question", "chosen",
    )  # fmt: skip
    lines = []
    for name, row in table.items():
        costs = {
            key: mean([run.costs[key] for run in row.runs if run.costs[key] is not None])
            for key in row.runs[0].costs
        }
        peak = costs["peak_bytes"]
        memory = f"{peak / 1e6:.0f}" if peak >= 5e5 else "" if math.isnan(peak) else "< 1"
        lines.append(
            [
                name,
                f"{costs['fit_seconds']:.1f}",
                f"{costs['predict_ms']:.1f}",
                memory,
                f"{costs['extra_parameters']:,.0f}",
                f"{costs['forward_passes']:g}",
                "; ".join(dict.fromkeys(run.note for run in row.runs if run.note)),
            ]
        )
    return markdown(header, lines)


def coverage_table(table: dict[str, Row]) -> str:
    """Return coverage and size of conformal sets; empty if no run has them."""
    covered = {name: row for name, row in table.items() if any(run.coverage for run in row.runs)}
    if not covered:
        return ""
    first = next(run.coverage for row in covered.values() for run in row.runs if run.coverage)
    columns = [(kind, key) for kind, numbers in first.items() for key in numbers]
    lines = []
    for name, row in covered.items():
        runs = [run.coverage for run in row.runs if run.coverage]
        values = {c: [run[c[0]][c[1]] for run in runs] for c in columns}
        texts = [cells({name: v}, ".3f", True)[name].strip("*") for v in values.values()]
        lines.append([name if not row.tuned else f"{name} †", *texts])
    return markdown(["method", *(f"{kind}, {key}" for kind, key in columns)], lines)


def ood_table(table: dict[str, Row], test: str) -> str:
    """Return the metrics on an out-of-distribution set, and how well it is told apart."""
    names = ("accuracy", "NLL", "ECE")
    columns = {
        name: cells({m: row.metric(name, test) for m, row in table.items()}, *METRICS[name])
        for name in names
    }
    for score in SCORES:
        values = {m: aurocs(row, test, score) for m, row in table.items()}
        columns[f"AUROC, {score}"] = cells(values, ".3f", True)
    lines = [[m, *(column[m] for column in columns.values())] for m in table]
    return markdown(["method", *columns], lines)


def aurocs(row: Row, test: str, score: str) -> list[float]:
    """Return every seed's AUROC of telling a set from the task's own; none without the score."""
    key = {"max-probability": "confidence"}.get(score, score.replace(" ", "_"))
    own = row.runs[0].task
    if any(key not in run.tests[name]["questions"] for run in row.runs for name in (own, test)):
        return []
    pairs = zip(row.questions(key), row.questions(key, test), strict=True)
    return [ood_auroc(inside, outside, falling=key == "confidence") for inside, outside in pairs]
