"""The tasks: where their questions come from, how they are asked, and the recipe of training."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import laplace_llm
from laplace_llm.benchmark.calibration.hub import HUB, rows_from_hub
from laplace_llm.errors import DataError

Row = dict[str, Any]
QUESTIONS = Path(laplace_llm.__file__).parent.parent / "examples" / "data"


@dataclass(frozen=True)
class Task:
    """A task: its head, its prompt and its recipe.

    Attributes
    ----------
    name : str
        Also of its files, ``NAME.{train,test}.jsonl`` with rows ``{"question", "choices",
        "answer"}``, and of its entry in `hub.HUB`.
    head : {'words', 'letters', 'scored'}
        Label words (the same choices in every row), letters, or choices scored by the
        probability of their own tokens.
    prompt : str, optional
        Text with ``{question}``, which the answer follows; default: the package's own prompts.
    epochs, lr
        Of AdamW.
    normalization : {'sum', 'mean'}
        Of scored choices.
    ood : tuple[str, ...]
        Other tasks whose test questions are out of distribution for this one. Only questions with
        as many choices are kept.
    """

    name: str
    head: Literal["words", "letters", "scored"] = "scored"
    prompt: str | None = None
    epochs: int = 5
    lr: float = 1e-3
    normalization: Literal["sum", "mean"] = "sum"
    ood: tuple[str, ...] = ()


_TASKS: dict[str, Task] = {}


def register_task(task: Task) -> Task:
    """Add a task; one of the same name is replaced."""
    _TASKS[task.name] = task
    return task


def registered_tasks() -> dict[str, Task]:
    """Return all tasks by name."""
    return dict(_TASKS)


MMLU = ("mmlu-cs", "mmlu-engineering", "mmlu-health", "mmlu-law")
register_task(Task("trec", "words", "Question: {question}\nThe answer is a", 8, 5e-4))
register_task(Task("sst2", "words", "Review: {question}\nSentiment:", 6, 5e-4))
register_task(Task("arc-easy", epochs=2, lr=5e-4, normalization="mean"))
register_task(Task("openbookqa", epochs=6, ood=("arc-easy", "arc-challenge", *MMLU)))
register_task(Task("general"))


def load_rows(name: str, split: Literal["train", "test"], data_dir: Path | None) -> list[Row]:
    """Return a task's questions: from the data folder, the project's own, or the Hub.

    Raises
    ------
    DataError
        If none of them has the task, with what was tried.
    """
    folders = [folder for folder in (data_dir, QUESTIONS) if folder is not None]
    for folder in folders:
        path = folder / f"{name}.{split}.jsonl"
        if path.exists():
            with path.open(encoding="utf-8") as file:
                return [json.loads(line) for line in file if line.strip()]
    if name in HUB:
        return rows_from_hub(name, split)
    tried = ", ".join(str(folder) for folder in folders)
    raise DataError(
        f"Expected a file {name}.{split}.jsonl in --data-dir or a data set of the Hub, but found "
        f"none in {tried}. Pass --data-dir, or choose other --tasks."
    )


@dataclass
class Questions:
    """A task's rows for one seed.

    Attributes
    ----------
    train, val, test : list
        `val` is held out of the `n_train` rows of the command line.
    ood : dict[str, list]
        Test rows of other tasks.
    absent : dict[str, str]
        Out-of-distribution sets that there are no rows of, and why.
    """

    train: list[Row]
    val: list[Row]
    test: list[Row]
    ood: dict[str, list[Row]]
    absent: dict[str, str]


def questions(
    task: Task, seed: int, n_train: int, n_val: int, n_test: int, data_dir: Path | None
) -> Questions:
    """Return the rows of one seed: another draw of training rows, always the same test rows.

    Raises
    ------
    DataError
        If there are too few rows, or the rows do not suit the head.
    """
    train, test = load_rows(task.name, "train", data_dir), load_rows(task.name, "test", data_dir)
    width = len(train[0]["choices"])
    train, test = _of_width(train, width), _of_width(test, width)
    if not 0 < n_val < n_train:
        raise DataError(f"Expected 0 < --val < --train, but got {n_val} and {n_train}.")
    if len(train) < n_train or not test:
        raise DataError(
            f"Expected at least {n_train} training and 1 test questions of {task.name!r}, but "
            f"got {len(train)} and {len(test)}. Choose a smaller --train."
        )
    if task.head == "words" and any(row["choices"] != train[0]["choices"] for row in train + test):
        raise DataError(
            f"Expected the same choices in every row of {task.name!r}, whose head is 'words'. "
            "Use the head 'scored'."
        )
    random.Random(seed).shuffle(train)
    ood, absent = {}, {}
    for name in task.ood:
        try:
            rows = _of_width(load_rows(name, "test", data_dir), width)
            ood[name] = _drawn(rows, n_test)
        except (DataError, ImportError) as error:
            absent[name] = str(error)
    drawn = train[:n_train]
    return Questions(drawn[n_val:], drawn[:n_val], _drawn(test, n_test), ood, absent)


def label_words(rows: Sequence[Row]) -> list[str]:
    """Return the choices that all rows share."""
    return list(rows[0]["choices"])


def _drawn(rows: list[Row], n: int) -> list[Row]:
    rows = list(rows)
    random.Random(0).shuffle(rows)
    return rows[:n]


def _of_width(rows: list[Row], width: int) -> list[Row]:
    return [row for row in rows if len(row["choices"]) == width]
