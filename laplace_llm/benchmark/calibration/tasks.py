"""How the benchmark trains on a task: the recipe, and the questions of one seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import laplace_llm
from laplace_llm.collate import Row, letter_prompt, question_prompt
from laplace_llm.errors import DataError
from laplace_llm.tasks import Task, Template, load_task, read_jsonl, registered_tasks

QUESTIONS = Path(laplace_llm.__file__).parent.parent / "examples" / "data"
MMLU = ("mmlu-cs", "mmlu-engineering", "mmlu-health", "mmlu-law")


@dataclass(frozen=True)
class Recipe:
    """How to train and ask a model on a task.

    Attributes
    ----------
    name : str
        The task's: of its files, ``NAME.{train,test}.jsonl`` with rows ``{"question", "choices",
        "answer"}``, and in `laplace_llm.tasks`.
    head : {'words', 'letters', 'scored'}
        Label words (the same choices in every row), letters, or choices scored by the
        probability of their own tokens.
    prompt : str, optional
        Text of a `laplace_llm.tasks.Template`, which the answer follows. Default: a question
        without choices for scored ones, and else the task's own prompt, of whose code, as of a
        method's, results do not know whether it changed.
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

    @property
    def ask(self) -> Callable[[Row], str]:
        """The prompt as a function of a row."""
        if self.prompt is not None:
            return Template(self.prompt)
        if self.head != "scored" and self.name in registered_tasks():
            return load_task(self.name).prompt
        return letter_prompt if self.head == "letters" else question_prompt


def as_the_task(task: Task, **recipe: Any) -> Recipe:
    """Return a recipe that asks as the task itself does: with its prompt, letters or words."""
    prompt = task.prompt.text if isinstance(task.prompt, Template) else None
    return Recipe(task.name, "letters" if task.lettered else "words", prompt, **recipe)


_RECIPES: dict[str, Recipe] = {}


def register_recipe(recipe: Recipe) -> Recipe:
    """Add a recipe; one of the same name is replaced."""
    _RECIPES[recipe.name] = recipe
    return recipe


def registered_recipes() -> dict[str, Recipe]:
    """Return all recipes by name; tasks without one are asked as they are.

    MMLU has no training questions.
    """
    tasks = registered_tasks()
    others = {name: as_the_task(tasks[name]) for name in tasks if name not in (*_RECIPES, *MMLU)}
    return _RECIPES | others


register_recipe(as_the_task(load_task("trec"), epochs=8, lr=5e-4))
register_recipe(as_the_task(load_task("sst2"), epochs=6, lr=5e-4))
register_recipe(Recipe("arc-easy", epochs=2, lr=5e-4, normalization="mean"))
register_recipe(Recipe("openbookqa", epochs=6, ood=("arc-easy", "arc-challenge", *MMLU)))
register_recipe(Recipe("general"))
# Not measured yet.
register_recipe(Recipe("arc-challenge", epochs=2, lr=5e-4, normalization="mean"))
for _name in ("winogrande-s", "winogrande-m", "boolq"):
    register_recipe(as_the_task(load_task(_name), lr=5e-4))


# Why rows did not come: the Hub's client tries for half a minute, each time it is asked.
_absent: dict[tuple[str, str], str] = {}


def load_rows(name: str, split: Literal["train", "test"], data_dir: Path | None) -> list[Row]:
    """Return a task's questions: from the data folder, the project's own, or the task's source.

    Raises
    ------
    DataError
        If none of them has the task, with what was tried.
    """
    folders = [folder for folder in (data_dir, QUESTIONS) if folder is not None]
    for folder in folders:
        path = folder / f"{name}.{split}.jsonl"
        if path.exists():
            return read_jsonl(path)
    if name in registered_tasks():
        return _rows_of(load_task(name), split)
    tried = ", ".join(str(folder) for folder in folders)
    raise DataError(
        f"Expected a file {name}.{split}.jsonl in --data-dir or a registered task, but found "
        f"none in {tried}. Pass --data-dir, or choose other --tasks."
    )


def _rows_of(task: Task, split: str) -> list[Row]:
    key = (getattr(task.source, "dataset", task.name), split)
    try:
        if key in _absent:
            raise DataError(_absent[key])
        return task.rows(split)
    except DataError as error:
        why = _absent.setdefault(key, str(error))
        raise DataError(f"{why} Or put {task.name}.{split}.jsonl into --data-dir.") from error


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
    task: Recipe, seed: int, n_train: int, n_val: int, n_test: int, data_dir: Path | None
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
