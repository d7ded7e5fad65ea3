"""Tasks of the Hugging Face Hub, in this benchmark's form of rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from laplace_llm.errors import DataError

Row = dict[str, Any]
TREC = ("abbreviation", "entity", "description", "person", "location", "number")


@dataclass(frozen=True)
class Source:
    """Data sets of the Hub that make up a task.

    Attributes
    ----------
    dataset : str
        Its name on the Hub.
    configs : tuple[str | None, ...]
        Whose rows are taken together.
    read : Callable
        Maps a row of theirs to one of ours.
    test : str
        The split to test on.
    """

    dataset: str
    configs: tuple[str | None, ...]
    read: Callable[[Mapping[str, Any]], Row]
    test: str = "test"


def multiple_choice(row: Mapping[str, Any]) -> Row:
    """Read a row of ARC, OpenBookQA or MMLU."""
    question = row.get("question") or row["question_stem"]
    choices = row["choices"]
    if isinstance(choices, Mapping):
        answer = list(choices["label"]).index(row["answerKey"])
        return {"question": question, "choices": list(choices["text"]), "answer": answer}
    return {"question": question, "choices": list(choices), "answer": int(row["answer"])}


def sentiment(row: Mapping[str, Any]) -> Row:
    """Read a row of SST-2."""
    choices = ["negative", "positive"]
    return {"question": row["sentence"], "choices": choices, "answer": int(row["label"])}


def question_type(row: Mapping[str, Any]) -> Row:
    """Read a row of TREC."""
    answer = int(row["coarse_label"])
    return {"question": row["text"], "choices": list(TREC), "answer": answer}


def _mmlu(*subjects: str) -> Source:
    return Source("cais/mmlu", subjects, multiple_choice)


HUB: dict[str, Source] = {
    "trec": Source("CogComp/trec", (None,), question_type),
    # Its test split has no labels.
    "sst2": Source("stanfordnlp/sst2", (None,), sentiment, test="validation"),
    "arc-easy": Source("allenai/ai2_arc", ("ARC-Easy",), multiple_choice),
    "arc-challenge": Source("allenai/ai2_arc", ("ARC-Challenge",), multiple_choice),
    "openbookqa": Source("allenai/openbookqa", ("main",), multiple_choice),
    # The groups of subjects of Yang et al., ICLR 2024, appendix.
    "mmlu-cs": _mmlu(
        "college_computer_science", "computer_security", "high_school_computer_science",
        "machine_learning",
    ),
    "mmlu-engineering": _mmlu("electrical_engineering"),
    "mmlu-law": _mmlu("international_law", "jurisprudence", "professional_law"),
    "mmlu-health": _mmlu(
        "anatomy", "clinical_knowledge", "college_medicine", "human_aging", "nutrition",
        "professional_medicine", "virology",
    ),
}  # fmt: skip


# Why a data set did not come: the Hub's client tries for half a minute, each time it is asked.
_absent: dict[str, str] = {}


def rows_from_hub(
    name: str, split: str, load_dataset: Callable[..., Any] | None = None
) -> list[Row]:
    """Return a task's rows from the Hub.

    Parameters
    ----------
    name : str
        One of `HUB`.
    split : {'train', 'test'}
    load_dataset : Callable, optional
        In place of that of `datasets`.

    Raises
    ------
    DataError
        If `datasets` is not installed, or the Hub does not give the data.
    """
    if load_dataset is None:
        try:
            load_dataset = import_module("datasets").load_dataset
        except ImportError:
            raise DataError(
                f"Expected {name!r} in --data-dir, or pip install datasets to have it from the Hub."
            ) from None
    source = HUB[name]
    wanted = source.test if split == "test" else split
    try:
        if source.dataset in _absent:
            raise ConnectionError(_absent[source.dataset])
        parts = [load_dataset(source.dataset, config, split=wanted) for config in source.configs]
    except Exception as error:  # of many kinds: no network, no such data set, no permission
        why = _absent.setdefault(source.dataset, f"{type(error).__name__}: {error}")
        raise DataError(
            f"Expected {source.dataset!r} from the Hub, but it did not come ({why}). Put "
            f"{name}.{split}.jsonl into --data-dir."
        ) from error
    return [source.read(row) for part in parts for row in part]
