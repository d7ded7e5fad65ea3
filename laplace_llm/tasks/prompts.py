"""Prompts: texts with fields, and those of the Laplace-LoRA paper.

The paper's are from Yang et al., ICLR 2024 (arXiv 2308.13111), table of prompt templates, as the
authors' own code writes them (github.com/adamxyang/laplace-lora, run_gpt.py). Where the two differ
the code is followed, which made the published numbers: it has no full stop after "B" in WinoGrande
and none after BoolQ's passage, and it begins the choices of ARC and OpenBookQA with a capital and
ends them with one full stop. Two habits of the code are not prompts, and are left out: it cuts
prompts off after 300 tokens, and it reads BoolQ's answer after a closing EOS token.
"""

from __future__ import annotations

from dataclasses import dataclass
from string import Formatter

from laplace_llm.collate import LETTERS, Row
from laplace_llm.errors import DataError, OptionError

SELECT = "Select one of the choices that answers the following question: {question} Choices: "


@dataclass(frozen=True)
class Template:
    r"""A prompt that is a text with fields: ``Template("Review: {question}\nSentiment:")``.

    Attributes
    ----------
    text : str
        With the row's keys as fields, by the rules of `str.format`: ``{question}``,
        ``{choices[0]}``, ``{passage}``; a brace of the text itself is doubled.
    """

    text: str

    def __post_init__(self) -> None:
        try:
            fields = [field for _, field, _, _ in Formatter().parse(self.text)]
        except (TypeError, ValueError) as error:
            raise OptionError(
                f"Expected a prompt with fields like {{question}}, but got {self.text!r} ({error})."
            ) from error
        if any(field is not None and not field[:1].isidentifier() for field in fields):
            raise OptionError(
                f"Expected every field of a prompt to have a name, but got {self.text!r}. Double "
                "the braces of the text itself."
            )

    def __call__(self, row: Row) -> str:
        """Return the text with the row's values in it.

        Raises
        ------
        DataError
            If the row lacks a field.
        """
        try:
            return self.text.format_map(row)
        except (LookupError, AttributeError, ValueError) as error:
            raise DataError(
                f"Expected rows with all fields of the prompt {self.text!r}, but got one with "
                f"{sorted(row)} and {len(row.get('choices', ()))} choices ({error!r}). Complete "
                "the rows, or use another prompt."
            ) from None


WINOGRANDE_PROMPT = Template(SELECT + "A. {choices[0]}. B {choices[1]}. Answer:")
BOOLQ_PROMPT = Template(
    "Answer the question with only True or False: {question} Context: {passage}"
)


def select_prompt(row: Row) -> str:
    """Return the paper's prompt of ARC, OpenBookQA and MMLU, for any number of choices.

    Raises
    ------
    DataError
        If there are more choices than letters.
    """
    texts = [_sentence(choice) for choice in row["choices"]]
    if len(texts) > len(LETTERS):
        raise DataError(
            f"Expected at most {len(LETTERS)} choices for letters, but got {len(texts)}. "
            "Use label words or ChoiceScoringHead."
        )
    lettered = [f"{letter}. {text}" for letter, text in zip(LETTERS, texts, strict=False)]
    return SELECT.format_map(row) + " ".join([*lettered, "Answer:"])


def _sentence(text: str) -> str:
    """Begin with a capital, end with a full stop."""
    return text[:1].upper() + text[1:] + "." * (not text.endswith("."))
