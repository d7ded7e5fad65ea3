"""Data sets of the Hugging Face Hub, read into rows ``{"question", "choices", "answer"}``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from laplace_llm.collate import Row
from laplace_llm.errors import DataError

TREC = ("abbreviation", "entity", "description", "person", "location", "number")
SST2 = ("negative", "positive")
BOOLQ = ("False", "True")


@dataclass(frozen=True)
class Hub:
    """A data set of the Hub as the source of a task's rows.

    Parameters
    ----------
    dataset : str
        Its name on the Hub.
    configs : tuple[str | None, ...]
        Whose rows are taken together.
    read : Callable
        Maps a row of theirs to one of ours.
    test : str, default='test'
        The split to test on; another one where theirs has no labels.
    """

    dataset: str
    configs: tuple[str | None, ...]
    read: Callable[[Mapping[str, Any]], Row]
    test: str = "test"

    def __call__(self, split: str) -> list[Row]:
        """Return the rows of a split.

        Raises
        ------
        DataError
            If `datasets` is not installed, the Hub does not give the data, or a row of theirs is
            not of the form that `read` expects.
        """
        rows: list[Row] = []
        for theirs in self._load(self.test if split == "test" else split):
            try:
                rows.append(self.read(theirs))
            except (LookupError, TypeError, ValueError) as error:
                raise DataError(
                    f"Expected labelled rows of {self.dataset!r} in the form that their reader "
                    f"{self.read.__name__} knows, but row {len(rows)} of {split!r} is "
                    f"{theirs!s:.300} ({error!r}). Choose another split, or write a reader."
                ) from error
        return rows

    def _load(self, split: str) -> list[Mapping[str, Any]]:
        try:
            load_dataset = import_module("datasets").load_dataset
        except ImportError:
            raise DataError(
                f"Expected the package datasets, which loads {self.dataset!r} from the Hub, but it "
                "is not installed. Run pip install datasets, or read the rows from a file."
            ) from None
        try:
            parts = [load_dataset(self.dataset, config, split=split) for config in self.configs]
            return [row for part in parts for row in part]
        except Exception as error:  # of many kinds: no network, no such data set, no permission
            raise DataError(
                f"Expected {self.dataset!r} from the Hub, but it did not come "
                f"({type(error).__name__}: {error}). Try again with network access, or read the "
                "rows from a file."
            ) from error


# Readers ------------------------------------------------------------------------------------------


def multiple_choice(row: Mapping[str, Any]) -> Row:
    """Read a row of ARC, OpenBookQA or MMLU; ARC's choices are labelled by letters or digits."""
    question = row.get("question") or row["question_stem"]
    choices = row["choices"]
    if isinstance(choices, Mapping):
        answer = list(choices["label"]).index(row["answerKey"])
        return {"question": question, "choices": list(choices["text"]), "answer": answer}
    return {"question": question, "choices": list(choices), "answer": int(row["answer"])}


def winogrande(row: Mapping[str, Any]) -> Row:
    """Read a row of WinoGrande: a sentence with a blank "_", and what may fill it."""
    answer = ("1", "2").index(row["answer"])
    choices = [row["option1"], row["option2"]]
    return {"question": row["sentence"], "choices": choices, "answer": answer}


def boolq(row: Mapping[str, Any]) -> Row:
    """Read a row of BoolQ; the passage that answers the question goes with it."""
    answer = BOOLQ.index(str(row["answer"]))
    rest = {"choices": list(BOOLQ), "answer": answer, "passage": row["passage"]}
    return {"question": row["question"], **rest}


def sentiment(row: Mapping[str, Any]) -> Row:
    """Read a row of SST-2."""
    return {"question": row["sentence"], "choices": list(SST2), "answer": int(row["label"])}


def question_type(row: Mapping[str, Any]) -> Row:
    """Read a row of TREC."""
    answer = int(row["coarse_label"])
    return {"question": row["text"], "choices": list(TREC), "answer": answer}
