"""Runs put together over seeds, as the report and the plots need them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from laplace_llm.benchmark.calibration.method import GROUPS
from laplace_llm.benchmark.calibration.results import OK, PROTOCOLS, Run


@dataclass
class Row:
    """A method on a task under a protocol: its runs that went well, a seed each."""

    method: str
    group: str
    tuned: bool
    single_model: bool
    runs: list[Run] = field(default_factory=list)

    def values(self, read: Callable[[Run], float]) -> list[float]:
        """Return a number of every run."""
        return [read(run) for run in self.runs]

    def metric(self, name: str, test: str | None = None) -> list[float]:
        """Return a metric of every run, on the task's own test set or another."""
        return [run.tests[test or run.task]["metrics"][name] for run in self.runs]

    def questions(self, key: str, test: str | None = None) -> Tensor:
        """Return (S, N) numbers of every question."""
        return torch.tensor(
            [run.tests[test or run.task]["questions"][key] for run in self.runs]
        ).double()


def rows(runs: Iterable[Run], task: str, protocol: str = PROTOCOLS[0]) -> dict[str, Row]:
    """Return the rows of a task's table by method, in the order of the groups."""
    table: dict[str, Row] = {}
    for run in runs:
        if (run.task, run.protocol, run.status) == (task, protocol, OK):
            row = Row(run.method, run.group, run.tuned, run.single_model)
            table.setdefault(run.method, row).runs.append(run)
    for row in table.values():
        row.runs.sort(key=lambda run: run.seed)
    ordered = sorted(table.values(), key=lambda row: GROUPS.index(row.group))
    return {row.method: row for row in ordered}


def mean(values: Sequence[float]) -> float:
    """Return the mean; nan of none."""
    return sum(values) / len(values) if values else math.nan


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean; nan of fewer than two."""
    if len(values) < 2:
        return math.nan
    return float(torch.tensor(values).double().std() / math.sqrt(len(values)))


def best(table: dict[str, Row], accept: Callable[[Row], bool] = lambda row: True) -> Row | None:
    """Return the row with the lowest mean NLL of those with as many seeds as any."""
    most = max((len(row.runs) for row in table.values()), default=0)
    fit = [row for row in table.values() if accept(row) and len(row.runs) == most]
    return min(fit, key=lambda row: mean(row.metric("NLL")), default=None)


def paired(first: Row, second: Row) -> tuple[Tensor, Tensor] | None:
    """Return the NLL (S, N) of two rows on the seeds that both have; None without any."""
    seeds = {run.seed for run in first.runs} & {run.seed for run in second.runs}
    if not seeds:
        return None
    halves = []
    for row in (first, second):
        runs = [run for run in row.runs if run.seed in seeds]
        halves.append(Row(row.method, row.group, row.tuned, row.single_model, runs))
    return halves[0].questions("nll"), halves[1].questions("nll")
