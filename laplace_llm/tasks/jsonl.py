"""Files of rows: one JSON object ``{"question", "choices", "answer"}`` a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from laplace_llm.collate import Row
from laplace_llm.errors import DataError

EXAMPLE = '{"question": "...", "choices": ["...", "..."], "answer": 0}'


def read_jsonl(path: str | Path) -> list[Row]:
    """Return the rows of a file; other keys of theirs are kept, blank lines are skipped.

    Rows without an answer are fine: `ChoiceScoringCollator` and `MultipleChoiceCollator` make
    batches without labels of them.

    Raises
    ------
    DataError
        If there is no such file, or a line is not a row; says which line.
    """
    if not isinstance(path, (str, Path)):
        raise DataError(f"Expected the path of a file of rows, but got a {type(path).__name__}.")
    path = Path(path)
    if not path.is_file():
        raise DataError(f"Expected a file of rows {EXAMPLE}, but there is no {str(path)!r}.")
    with path.open(encoding="utf-8") as file:
        lines = enumerate(file, start=1)
        return [_row(line, f"{path}, line {n}") for n, line in lines if line.strip()]


def _row(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"Expected a row {EXAMPLE} in {where}, but got {error}.") from None
    wrong = _problem(row)
    if wrong:
        raise DataError(f"Expected a row {EXAMPLE} in {where}, but {wrong}.")
    return row


def _problem(row: Any) -> str | None:
    """Return what makes something not a row, if anything."""
    if not isinstance(row, dict):
        return f"it is of type {type(row).__name__}"
    if not isinstance(row.get("question"), str):
        return f"its question is {row.get('question')!r}"
    choices, answer = row.get("choices"), row.get("answer", 0)
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        return f"its choices are {choices!r}"
    if len(choices) < 2:
        return f"it has {len(choices)} choices"
    if type(answer) is not int or not 0 <= answer < len(choices):
        return f"its answer {answer!r} is not an index into {len(choices)} choices"
    return None
