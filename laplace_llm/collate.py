"""Collators: rows of text ``{"question", "choices", "answer"}`` -> batches for the heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchEncoding, PreTrainedTokenizerBase

from laplace_llm.errors import DataError, OptionError
from laplace_llm.options import check_count

Row = Mapping[str, Any]
Parts = tuple[list[int], list[list[int]]]  # a question's tokens, and each choice's
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def letter_prompt(row: Row) -> str:
    """Return the question, its choices behind letters, and "Answer:".

    Raises
    ------
    DataError
        If there are more choices than letters.
    """
    if len(row["choices"]) > len(LETTERS):
        raise DataError(
            f"Expected at most {len(LETTERS)} choices for letters, but got {len(row['choices'])}. "
            "Use label words or ChoiceScoringHead."
        )
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=False)]
    return "\n".join([f"Question: {row['question']}", *lines, "Answer:"])


def question_prompt(row: Row) -> str:
    """Return the question and "Answer:", without the choices."""
    return f"Question: {row['question']}\nAnswer:"


class _Collator:
    """What both collators check when they are made."""

    tokenizer: PreTrainedTokenizerBase
    prompt: Callable[[Row], str]
    n_choices: int | None

    def __post_init__(self) -> None:
        check_tokenizer(self.tokenizer)
        if not callable(self.prompt):
            raise OptionError(
                f"Expected prompt to be a function from a row to a text, but got {self.prompt!r}. "
                "Use laplace_llm.tasks.Template for a text with fields."
            )
        if self.n_choices is not None:
            check_count("n_choices", self.n_choices)


@dataclass
class MultipleChoiceCollator(_Collator):
    """Batches for `MultipleChoiceHead`: one prompt a question.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        Its ``padding_side`` is used; a tokenizer without a padding token is fine.
    prompt : Callable, default=letter_prompt
        Maps a row to the text that the answer's token follows.
    n_choices : int, optional
        C, the choices of the head. Needed where rows may have fewer: by default C is the most in a
        batch, and of one whose rows all have as many nothing is said.
    closing : bool, default=False
        Whether prompts end with the closing token (EOS) that some tokenizers write. An answer does
        not follow it in a causal model; the encoders of T5 and its relatives are trained with it.
    """

    tokenizer: PreTrainedTokenizerBase
    prompt: Callable[[Row], str] = letter_prompt
    n_choices: int | None = None
    closing: bool = False

    def __call__(self, rows: Sequence[Row]) -> BatchEncoding:
        """Return ``input_ids`` and ``attention_mask`` (B, T), and ``labels`` (B,) if all have one.

        Where rows have fewer than C choices there is ``choice_present`` (B, C) too, True on the
        choices of each row.

        Raises
        ------
        DataError
            If a row lacks its question or choices, has more than `n_choices`, or an answer is not
            an index into them.
        """
        labels = _labels(rows) | _present(rows, self.n_choices)
        sequences = [_ids(self.tokenizer, self.prompt(row), self.closing) for row in rows]
        ids, mask = _pad(self.tokenizer, sequences)
        return BatchEncoding({"input_ids": ids, "attention_mask": mask, **labels})


@dataclass
class ChoiceScoringCollator(_Collator):
    """Batches for `ChoiceScoringHead`: one sequence a question, or one a choice.

    Both give the same scores and gradients. Packed, the question is computed once instead of once
    for each choice, and is counted once by Kronecker factors. The head takes packed batches apart
    for models that cannot run them.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        Its ``padding_side`` is used; a tokenizer without a padding token is fine.
    prompt : Callable, default=question_prompt
        Maps a row to the text that " " + choice follows.
    packed : bool, default=True
        Whether a question and its choices share one sequence.
    n_choices : int, optional
        C, the most choices of any row; default: the most in a batch. All batches of a loader must
        have the same.
    """

    tokenizer: PreTrainedTokenizerBase
    prompt: Callable[[Row], str] = question_prompt
    packed: bool = True
    n_choices: int | None = None

    def __call__(self, rows: Sequence[Row]) -> BatchEncoding:
        """Return a batch, with ``labels`` (B,) if all rows have an answer.

        Packed, ``input_ids``, ``attention_mask``, ``choice_ids`` and ``position_ids`` (B, S): each
        question followed by its choices one after the other, with choice ids c = 0, ..., C - 1 on
        their tokens and -1 elsewhere. The positions of every choice continue the question's.

        Otherwise ``input_ids``, ``attention_mask`` and ``choice_mask`` (B, C, T).

        In both, where rows have fewer than C choices, ``choice_present`` (B, C), True on the
        choices of each row; the sequences of the others are all padding.

        Raises
        ------
        DataError
            If a row lacks its question or choices, has more than `n_choices`, or an answer is not
            an index into them.
        """
        labels = _labels(rows) | _present(rows, self.n_choices)
        parts = [self._parts(row) for row in rows]
        return BatchEncoding({**(self._pack if self.packed else self._separate)(parts), **labels})

    def _parts(self, row: Row) -> Parts:
        prompt = self.prompt(row)
        texts = [f" {str(choice).strip()}" for choice in row["choices"]]
        tails = [continuation(self.tokenizer, prompt, text) for text in texts]
        return _ids(self.tokenizer, prompt), tails

    def _separate(self, parts: Sequence[Parts]) -> dict[str, Tensor]:
        most = max(self.n_choices or 0, *(len(tails) for _, tails in parts))
        sequences, lengths = list[list[int]](), list[int]()
        for head, tails in parts:
            absent = most - len(tails)
            sequences += [head + tail for tail in tails] + [[]] * absent
            lengths += [len(tail) for tail in tails] + [0] * absent
        ids, mask = _pad(self.tokenizer, sequences)
        # Counted from the row's last real token, the choice is the last `length` of them.
        from_end = mask.flip(-1).cumsum(-1).flip(-1)
        chosen = mask.bool() & (from_end <= torch.tensor(lengths)[:, None])
        batch = {"input_ids": ids, "attention_mask": mask, "choice_mask": chosen}
        return {key: value.view(len(parts), -1, ids.shape[1]) for key, value in batch.items()}

    def _pack(self, parts: Sequence[Parts]) -> dict[str, Tensor]:
        sequences, choices, positions = [], [], []
        for head, tails in parts:
            n = len(head)
            sequences.append(head + [token for tail in tails for token in tail])
            choices.append([-1] * n + [c for c, tail in enumerate(tails) for _ in tail])
            positions.append([*range(n), *(n + i for tail in tails for i in range(len(tail)))])
        side = self.tokenizer.padding_side
        ids, mask = _pad(self.tokenizer, sequences)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "choice_ids": _pad_with(-1, choices, side),
            "position_ids": _pad_with(0, positions, side),
        }


def continuation(tokenizer: PreTrainedTokenizerBase, prompt: str, text: str) -> list[int]:
    """Return the tokens that `text` adds after `prompt`.

    Tokenised together, because some tokenizers write a word differently at the start of a text.

    Raises
    ------
    DataError
        If the text adds no token.
    """
    head, both = _ids(tokenizer, prompt), _ids(tokenizer, prompt + text)
    if both[: len(head)] == head:
        tail = both[len(head) :]
    else:
        tail = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not tail:
        raise DataError(f"Expected choices with at least one token, but {text!r} has none.")
    return tail


def target(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the tokens of a text that a decoder is to write, without special ones.

    Raises
    ------
    DataError
        If there are none.
    """
    ids = list(tokenizer(text_target=text, add_special_tokens=False)["input_ids"])
    if not ids:
        raise DataError(f"Expected choices with at least one token, but {text!r} has none.")
    return ids


def check_tokenizer(tokenizer: Any) -> None:
    """Raise OptionError unless it is a Hugging Face tokenizer, or one that is like it."""
    if not callable(tokenizer) or not hasattr(tokenizer, "padding_side"):
        raise OptionError(
            f"Expected tokenizer to be a Hugging Face tokenizer, but got a "
            f"{type(tokenizer).__name__}. Load one with AutoTokenizer.from_pretrained(...)."
        )


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, closing: bool = False) -> list[int]:
    """Tokenise with a leading special token (BOS), and without a closing one (EOS) unless told."""
    if not isinstance(text, str) or not text:
        raise DataError(f"Expected prompt to return a text, but got {text!r}.")
    ids = list(tokenizer(text)["input_ids"])
    if closing:
        return ids
    closers = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    return ids[:-1] if len(ids) > 1 and ids[-1] in closers else ids


def _pad(tokenizer: PreTrainedTokenizerBase, sequences: list[list[int]]) -> tuple[Tensor, Tensor]:
    pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    side = tokenizer.padding_side
    ones = [[1] * len(sequence) for sequence in sequences]
    return _pad_with(pad, sequences, side), _pad_with(0, ones, side)


def _pad_with(value: int, sequences: list[list[int]], side: str) -> Tensor:
    rows = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
    return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)


def _present(rows: Sequence[Row], n_choices: int | None) -> dict[str, Tensor]:
    counts = torch.tensor([len(row["choices"]) for row in rows])
    most = int(counts.max())
    if n_choices is not None and most > n_choices:
        raise DataError(
            f"Expected rows of at most n_choices={n_choices} choices, but row "
            f"{int(counts.argmax())} has {most}. Pass n_choices={most} or more."
        )
    present = torch.arange(n_choices or most) < counts[:, None]
    return {} if bool(present.all()) else {"choice_present": present}


def _labels(rows: Sequence[Row]) -> dict[str, Tensor]:
    if not rows:
        raise DataError("Expected at least one row, but got none.")
    if isinstance(rows, Mapping):
        raise DataError("Expected a list of rows, but got a single row. Put it into a list.")
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataError(f"Expected row {index} to be a mapping, but got {row!r}.")
        if row.get("question") is None or not row.get("choices"):
            raise DataError(
                f"Expected rows with 'question' and 'choices', but row {index} has "
                f"{sorted(map(str, row))}, of which one or both are missing or empty."
            )
        choices = row["choices"]
        if isinstance(choices, str) or any(choice is None for choice in choices):
            raise DataError(
                f"Expected the choices of row {index} to be a list of texts, but got {choices!r}."
            )
        answer = row.get("answer", 0)
        whole = isinstance(answer, Integral) and not isinstance(answer, bool)
        if not whole or not 0 <= int(answer) < len(row["choices"]):
            raise DataError(
                f"Expected the answer to be an index into {len(row['choices'])} choices, but row "
                f"{index} has {answer!r}."
            )
    if not all("answer" in row for row in rows):
        return {}
    return {"labels": torch.tensor([int(row["answer"]) for row in rows])}
