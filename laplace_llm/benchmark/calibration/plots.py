"""Reliability diagrams, risk-coverage curves, and cost against NLL; as PNG and SVG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from laplace_llm.benchmark.calibration.methods.laplace_lora import DEFAULT, DEFAULT_VALIDATED
from laplace_llm.benchmark.calibration.methods.point import MAP_NAME
from laplace_llm.benchmark.calibration.metrics import N_BINS, risk_coverage
from laplace_llm.benchmark.calibration.summary import Row, best, mean, standard_error

COLOURS = {
    "point": "0.35",
    "last layer": "tab:blue",
    "LoRA": "tab:green",
    "LoRA Laplace": "tab:red",
}


def draw(table: dict[str, Row], task: str, out: Path) -> list[str]:
    """Draw a task's plots and return the names of the PNG files."""
    if not table:
        return []
    chosen = leading(table)
    figures = {
        "reliability": reliability(chosen),
        "risk-coverage": curves(chosen),
        "cost": costs(table),
    }
    for name, figure in figures.items():
        figure.suptitle(task, fontsize=10)
        for ending in ("png", "svg"):
            # The same file for the same numbers: no date, no random names.
            metadata = {"Date": None} if ending == "svg" else {}
            figure.savefig(out / f"{task}.{name}.{ending}", dpi=150, metadata=metadata)
    return [f"{task}.{name}.png" for name in figures]


def leading(table: dict[str, Row]) -> list[Row]:
    """Return MAP, temperature scaling, this package's defaults, and the best of other groups."""
    names = [MAP_NAME, "temperature scaling"]
    for group in ("last layer", "LoRA"):
        row = best(table, lambda row, group=group: row.group == group)  # type: ignore[misc]
        names += [row.method] if row else []
    names += [DEFAULT, DEFAULT_VALIDATED]
    return [table[name] for name in names if name in table] or list(table.values())[:6]


def reliability(table: list[Row]) -> Figure:
    """Return accuracy against confidence in 15 bins, all seeds together, with the counts."""
    n = len(table)
    figure = Figure(figsize=(2.9 * n, 3.5), layout="constrained")
    axes: Any = figure.subplots(1, n, sharey=True, squeeze=False)[0]
    edges = torch.linspace(0, 1, N_BINS + 1, dtype=torch.double)
    for ax, row in zip(axes, table, strict=True):
        confidence = row.questions("confidence").flatten()
        correct = row.questions("correct").flatten()
        bins = torch.bucketize(confidence, edges[1:-1])
        ax.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--")
        for b in bins.unique().tolist():
            inside = bins == b
            height = float(correct[inside].mean())
            centre = float(edges[b] + edges[b + 1]) / 2
            ax.bar(centre, height, width=0.9 / N_BINS, color=COLOURS[row.group], alpha=0.75)
            ax.text(centre, height + 0.01, str(int(inside.sum())), ha="center", fontsize=5)
        ece, nll = mean(row.metric("ECE")), mean(row.metric("NLL"))
        ax.set_title(f"{row.method}\nNLL {nll:.3f}   ECE {ece:.3f}", fontsize=7)
        ax.set(xlabel="confidence", xlim=(0, 1), ylim=(0, 1.08))
    axes[0].set_ylabel("accuracy")
    return figure


def curves(table: list[Row]) -> Figure:
    """Return the error rate among answered questions against their share, averaged over seeds."""
    figure = Figure(figsize=(5, 3.8), layout="constrained")
    ax = figure.subplots()
    for index, row in enumerate(table):
        seeds = zip(row.questions("confidence"), row.questions("correct"), strict=True)
        found = [risk_coverage(*seed) for seed in seeds]
        risk = torch.stack([risk for _, risk in found]).mean(0)
        area = mean(row.metric("AURC"))
        style = "-" if row.group == "LoRA Laplace" else "--"
        label = f"{row.method} ({area:.3f})"
        ax.plot(found[0][0], risk, style, color=f"C{index}", linewidth=1.3, label=label)
    ax.set(xlabel="coverage", ylabel="error rate", xlim=(0, 1), ylim=(0, None))
    ax.legend(fontsize=6, title="method (AURC)", title_fontsize=6)
    return figure


def costs(table: dict[str, Row]) -> Figure:
    """Return test NLL against seconds: to fit, and then to answer 1,000 questions."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    ax = figure.subplots()
    for number, row in enumerate(table.values(), 1):
        # 1,000 questions at so many milliseconds each take as many seconds.
        seconds = mean([r.costs["fit_seconds"] + r.costs["predict_ms"] for r in row.runs])
        nll, error = mean(row.metric("NLL")), standard_error(row.metric("NLL"))
        colour = COLOURS[row.group]
        bar = None if error != error else error
        ax.errorbar(seconds, nll, yerr=bar, fmt="o", markersize=4, color=colour, linewidth=0.8)
        ax.annotate(
            str(number), (seconds, nll), fontsize=6, xytext=(3, 3), textcoords="offset points"
        )
        ax.plot([], [], "o", markersize=3, color=colour, label=f"{number}  {row.method}")
    ax.set(xscale="log", xlabel="seconds to fit and to answer 1,000 questions", ylabel="test NLL")
    ax.legend(fontsize=5, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
