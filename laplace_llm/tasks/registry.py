"""Tasks by name: what belongs together for a data set, and a registry that one can add to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from laplace_llm.collate import LETTERS, Row, letter_prompt
from laplace_llm.errors import DataError, OptionError
from laplace_llm.tasks.jsonl import read_jsonl

SPLIT = "{split}"


@dataclass(frozen=True)
class Task:
    """A data set, how its questions are asked, and what the answers are.

    Together they make a model's data and head::

        collate = MultipleChoiceCollator(tokenizer, task.prompt)
        head = MultipleChoiceHead.from_tokenizer(model, tokenizer, task.choices)
        loader = DataLoader(task.rows("train"), batch_size=8, collate_fn=collate)

    `ChoiceScoringHead`, which reads each choice's own tokens, takes the rows with a prompt that
    does not name the choices; so does its collator's default.

    Parameters
    ----------
    name : str
        Of the task.
    source : str, Path or Callable
        The path of a JSONL file for each split, with ``{split}`` in its place
        (``"mine.{split}.jsonl"``; see `read_jsonl`), or a function from the name of a split to its
        rows, such as `Hub`.
    prompt : Callable, default=letter_prompt
        Maps a row to the text that the answer follows; see `Template`.
    choices : tuple[str, ...], default=('A', 'B', 'C', 'D')
        What the classes are called: letters, of which a row may need fewer, or label words, which
        are then the choices of every row.

    Raises
    ------
    OptionError
        If there are fewer than two choices, or a path does not say where the split goes.
    """

    name: str
    source: str | Path | Callable[[str], Iterable[Row]]
    prompt: Callable[[Row], str] = letter_prompt
    choices: tuple[str, ...] = tuple(LETTERS[:4])

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise OptionError(f"Expected the name of a task to be a text, but got {self.name!r}.")
        if not callable(self.prompt):
            raise OptionError(
                f"Expected prompt to be a function from a row to a text, but got {self.prompt!r}. "
                "Use a Template."
            )
        if isinstance(self.choices, str) or len(self.choices) < 2:
            raise OptionError(
                f"Expected choices to be at least two letters or words, but got {self.choices!r}. "
                "Give a tuple of strings."
            )
        if not callable(self.source) and SPLIT not in str(self.source):
            raise OptionError(
                f"Expected {SPLIT} in the path of the rows, but got {str(self.source)!r}. Name "
                f"the files of a task like mine.{SPLIT}.jsonl, or read a single one with "
                "read_jsonl."
            )

    @property
    def lettered(self) -> bool:
        """Whether the choices are letters, and not label words."""
        return self.choices == tuple(LETTERS[: len(self.choices)])

    def _from_source(self, split: str) -> list[Row]:
        assert callable(self.source)
        rows = self.source(split)
        if not isinstance(rows, Iterable):
            raise DataError(
                f"Expected the source of task {self.name!r} to return rows, but for {split!r} it "
                f"returned {rows!r}."
            )
        return list(rows)

    def rows(self, split: str = "train") -> list[Row]:
        """Return the rows ``{"question", "choices", "answer"}`` of a split.

        Parameters
        ----------
        split : str, default='train'
            'train' or 'test', or what else the source has.

        Raises
        ------
        DataError
            If the source does not have them, or a row's choices are not the task's.
        """
        if callable(self.source):
            rows = self._from_source(split)
        else:
            rows = read_jsonl(str(self.source).replace(SPLIT, split))
        for index, row in enumerate(rows):
            if not isinstance(row, Mapping) or not row.get("choices") or "question" not in row:
                raise DataError(
                    f"Expected rows of task {self.name!r} with 'question' and 'choices', but row "
                    f"{index} of {split!r} is {row!r:.300}."
                )
            found = tuple(row["choices"])
            if len(found) > len(self.choices) or not (self.lettered or found == self.choices):
                expected = f"at most {len(self.choices)}" if self.lettered else self.choices
                raise DataError(
                    f"Expected the choices of task {self.name!r} to be {expected}, but row {index} "
                    f"of {split!r} has {found}. Change Task.choices, or leave such rows out."
                )
        return rows


_TASKS: dict[str, Task] = {}


def register_task(task: Task) -> Task:
    """Add a task; one of the same name is replaced.

    Raises
    ------
    OptionError
        If it is no `Task`.
    """
    if not isinstance(task, Task):
        raise OptionError(f"Expected a Task, but got {task!r}.")
    _TASKS[task.name] = task
    return task


def registered_tasks() -> dict[str, Task]:
    """Return all tasks by name."""
    return dict(_TASKS)


def load_task(name: str, data: str | Path | None = None) -> Task:
    """Return a registered task; its rows are read when they are asked for.

    Parameters
    ----------
    name : str
        One of `registered_tasks`.
    data : str or Path, optional
        Where its rows are instead of where they were registered to be: a folder that has
        ``NAME.train.jsonl`` and ``NAME.test.jsonl``, or a path like ``"mine.{split}.jsonl"``.

    Raises
    ------
    OptionError
        If there is no task of this name, or `data` is not such a folder or path.
    """
    if name not in _TASKS:
        raise OptionError(
            f"Expected a task of {sorted(_TASKS)}, but got {name!r}. Add one with register_task."
        )
    if data is None:
        return _TASKS[name]
    if not isinstance(data, (str, Path)):
        raise OptionError(f"Expected data to be a folder or a path, but got {data!r}.")
    if Path(data).is_dir():
        data = Path(data) / f"{name}.{SPLIT}.jsonl"
    elif SPLIT not in str(data):
        raise OptionError(
            f"Expected data to be a folder that has {name}.{SPLIT}.jsonl, or a path with {SPLIT} "
            f"in it, but got {str(data)!r}. Read a single file with read_jsonl."
        )
    return replace(_TASKS[name], source=data)
