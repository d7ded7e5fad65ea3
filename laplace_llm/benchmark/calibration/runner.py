"""Carries out the plan: one problem after the other, a line of results for every run."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from laplace_llm.benchmark.calibration.costs import Cost
from laplace_llm.benchmark.calibration.evaluation import evaluate
from laplace_llm.benchmark.calibration.method import Method, missing
from laplace_llm.benchmark.calibration.plan import Options, fingerprint, keys
from laplace_llm.benchmark.calibration.problem import Problem
from laplace_llm.benchmark.calibration.results import FAILED, PROTOCOLS, Key, Results, Run
from laplace_llm.benchmark.calibration.tasks import Questions, Recipe, questions
from laplace_llm.benchmark.calibration.training import Adapter, MakeOptimizer, OnStep, Trainer
from laplace_llm.benchmark.models import load_model


@dataclass
class Runner:
    """Runs what is planned and not done.

    Parameters
    ----------
    options : Options
    tasks : list[Recipe]
    methods : dict[str, type[Method]]
    """

    options: Options
    tasks: list[Recipe]
    methods: dict[str, type[Method]]

    def __post_init__(self) -> None:
        self.results = Results(self.options.out / "results.jsonl")
        self._model: tuple[nn.Module, Any] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of every task."""
        return {task.name: self.options.settings(task) for task in self.tasks}

    def plan(self) -> list[tuple[Recipe, int, str, list[Key]]]:
        """Return the problems, each a task, a seed and a protocol, and the runs of each."""
        return [
            (task, seed, protocol, keys(task, seed, protocol, self.methods))
            for task in self.tasks
            for seed in self.options.seeds
            for protocol in self.options.protocols
        ]

    def planned_runs(self) -> list[Run]:
        """Return the results of the plan, and no others that are in the file."""
        runs = self.results.read(self.settings)
        return [runs[key] for *_, some in self.plan() for key in some if key in runs]

    def run(self) -> None:
        """Run the plan; what is done already is passed over at once."""
        done, plan = self.results.done(self.settings), self.plan()
        total = sum(len(runs) for *_, runs in plan)
        left = [[key for key in runs if key not in done] for *_, runs in plan]
        with tqdm(total=total, initial=total - sum(map(len, left)), unit="run", smoothing=0) as bar:
            for (task, seed, protocol, _), pending in zip(plan, left, strict=True):
                if pending:
                    self._problem(task, seed, protocol, pending, bar)

    def _problem(
        self, task: Recipe, seed: int, protocol: str, pending: list[Key], bar: Any
    ) -> None:
        bar.set_postfix_str(f"{task.name}, seed {seed}, {protocol}: adapter")
        try:
            rows = self._questions(task, seed, protocol)
            problem, tests = self._prepare(task, seed, rows, pending)
        except Exception as error:  # no data, or no model: so are all of its rows
            trace = traceback.format_exc()
            for key in pending:
                run = self._blank(key)
                run.status, run.traceback = FAILED, trace
                run.reason = f"{type(error).__name__}: {error}"
                self.results.append(run)
                bar.update()
            return
        for key in pending:
            bar.set_postfix_str(f"{task.name}, seed {seed}, {protocol}: {key.method}")
            run = self._blank(key)
            run.absent = rows.absent
            evaluate(
                run,
                self.methods[key.method],
                problem,
                tests,
                self.options.save_predictions,
            )
            self.results.append(run)
            bar.update()
        problem.shared.clear()
        del problem
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _blank(self, key: Key) -> Run:
        method, settings = self.methods[key.method], self.settings[key.task]
        run = Run(*key, method.group, method.tuned, method.single_model, settings)
        run.command = self.options.command
        return run

    def _questions(self, task: Recipe, seed: int, protocol: str) -> Questions:
        o = self.options
        rows = questions(task, seed, o.train, o.val, o.test, o.data_dir)
        if protocol != PROTOCOLS[0]:
            rows.train, rows.val = rows.train + rows.val, []
        return rows

    def _prepare(
        self, task: Recipe, seed: int, rows: Questions, pending: list[Key]
    ) -> tuple[Problem, dict[str, list[Any]]]:
        options = self.options
        if self._model is None:
            self._model = load_model(options.model)
            self._model[0].requires_grad_(False)
        model, tokenizer = self._model
        trainer = Trainer(
            model, tokenizer, task, rows.train, options.rank, options.targets, options.device
        )
        chosen = options.settings(task)
        # The validation questions have a part in what is kept, too: their features.
        made_of = fingerprint(
            *(chosen[key] for key in ("model", "recipe", "rank", "targets", "device")),
            rows.train,
            rows.val,
        )
        folder = options.out / "cache" / f"{task.name}-{seed}-{made_of}"
        adapter = trainer.cached(folder / "adapter.safetensors", seed)
        problem = Problem(
            task=task.name,
            seed=seed,
            head=adapter.head,
            n_classes=len(rows.train[0]["choices"]),
            train=trainer.batches(rows.train),
            val=trainer.batches(rows.val) if rows.val else [],
            train_adapter=lambda **_: adapter.head,
            checkpoints=adapter.checkpoints,
            planned=frozenset(
                key.method for key in pending if not list(missing(self.methods[key.method]))
            ),
            folder=folder,
            train_seconds=adapter.seconds,
        )
        problem.train_adapter = _training(trainer, problem, folder)
        tests = {task.name: trainer.batches(rows.test)}
        tests |= {name: trainer.batches(part) for name, part in rows.ood.items()}
        return problem, tests


def _training(trainer: Trainer, problem: Problem, folder: Path) -> Callable[..., nn.Module]:
    """Return `Problem.train_adapter`; what a seed and a dropout decide is kept on disk."""

    def train_adapter(
        *,
        seed: int,
        dropout: float = 0.0,
        optimizer: MakeOptimizer | None = None,
        on_step: OnStep | None = None,
    ) -> nn.Module:
        if optimizer is not None or on_step is not None:
            return trainer.train(seed, dropout, optimizer, on_step).head
        path = folder / f"adapter-{seed}-{dropout:g}.safetensors"
        adapter: Adapter = trainer.cached(path, seed, dropout)
        if not adapter.trained:  # in an earlier run, at this cost
            problem.charge(Cost(adapter.seconds))
        return adapter.head

    return train_adapter
