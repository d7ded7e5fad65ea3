"""Turn the facts of ``facts.tsv`` into multiple-choice questions, split by fact.

Every fact gives one question with four choices. A question's wrong choices are answers to other
questions of its relation, less those that ``facts.tsv`` says could also be right; some facts name
their wrong choices themselves. It writes ``general.train.jsonl`` and ``general.test.jsonl``.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SEED = 20
TEST_SHARE = 0.38
NUM_CHOICES = 4

# One question for each relation; {} is the subject, {a} the subject after "a" or "an".
TEMPLATES = {
    "animal_class": "What kind of animal is {a}?",
    "animal_group": "What is a group of {} called?",
    "animal_sound": "What is the sound of {a} called?",
    "body": "Which part of the body do people use to {}?",
    "capital": "What is the capital of {}?",
    "colour": "What colour is {}?",
    "continent": "On which continent is {}?",
    "creator": "Who wrote {}?",
    "currency": "What is the currency of {}?",
    "day_after": "Which day comes right after {}?",
    "element": "Which chemical element has the symbol {}?",
    "female_animal": "What is a female {} called?",
    "food": "What kind of food is {}?",
    "greek_god": "In Greek myths, who is the {}?",
    "how_many": "How many {}?",
    "instrument": "To which family of instruments does the {} belong?",
    "landmark": "In which country is {}?",
    "language": "What is the main language of {}?",
    "made_from": "What is {} usually made from?",
    "material": "What is {a} usually made of?",
    "measures": "What does {a} measure?",
    "month_after": "Which month comes right after {}?",
    "opposite": 'What is the opposite of the word "{}"?',
    "past_tense": 'What is the simple past tense of the verb "{}"?',
    "place": "Where do people go to {}?",
    "planet": "Which planet is the {} from the Sun?",
    "plural": 'What is the plural of the word "{}"?',
    "profession": "What do we call a person who {}?",
    "sides": "How many sides does {a} have?",
    "sport": "Which sport uses {}?",
    "state": "In which state of matter is {} at room temperature?",
    "state_capital": "What is the capital of the US state of {}?",
    "study": "What is the study of {} called?",
    "synonym": 'Which word means nearly the same as "{}"?',
    "tool": "What do people use to {}?",
    "unit": "What is the SI unit of {}?",
    "young": "What is a young {} called?",
}

# Choices that a relation has besides the answers of its own facts.
EXTRA_CHOICES = {"state": ["plasma"]}


@dataclass(frozen=True)
class Fact:
    """One row of ``facts.tsv``; ``wrong`` and ``avoid`` are lists set apart by ``|``."""

    relation: str
    subject: str
    answer: str
    wrong: str
    avoid: str


def read_facts(path: Path) -> list[Fact]:
    """Read the facts, in the order of the file."""
    with path.open(encoding="utf-8", newline="") as lines:
        rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE, restval="")
        return [Fact(**row) for row in rows]


def question_text(fact: Fact) -> str:
    """Put the fact's subject into its relation's template."""
    article = "an" if fact.subject[0].lower() in "aeiou" else "a"
    return TEMPLATES[fact.relation].format(fact.subject, a=f"{article} {fact.subject}")


def wrong_choices(fact: Fact, answers: Iterable[str], rng: random.Random) -> list[str]:
    """Draw the wrong choices of a fact from its relation's answers or from its own list."""
    candidates = set(fact.wrong.split("|") if fact.wrong else answers)
    pool = sorted(candidates - {fact.answer, *fact.avoid.split("|")})
    if len(pool) < NUM_CHOICES - 1:
        raise ValueError(f"{fact.relation}/{fact.subject}: too few wrong choices, {pool}")
    return rng.sample(pool, NUM_CHOICES - 1)


def make_rows(
    facts: list[Fact], answers: dict[str, list[str]], rng: random.Random
) -> list[dict[str, Any]]:
    """Make the rows of one split, each position being right equally often, in random order."""
    facts = rng.sample(facts, len(facts))
    positions = [i % NUM_CHOICES for i in range(len(facts))]
    rng.shuffle(positions)
    rows = []
    for fact, position in zip(facts, positions, strict=True):
        choices = wrong_choices(fact, answers[fact.relation], rng)
        choices.insert(position, fact.answer)
        name = f"{fact.relation}/{fact.subject}"
        row = {"question": question_text(fact), "choices": choices, "answer": position}
        rows.append(row | {"fact": name})
    return rows


def main() -> None:
    """Split the facts of each relation at random and write both splits."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to")
    out = parser.parse_args().out

    rng = random.Random(SEED)
    by_relation: dict[str, list[Fact]] = defaultdict(list)
    for fact in read_facts(HERE / "facts.tsv"):
        by_relation[fact.relation].append(fact)
    splits: dict[str, list[Fact]] = {"train": [], "test": []}
    for facts in by_relation.values():
        shuffled = rng.sample(facts, len(facts))
        num_test = round(TEST_SHARE * len(facts))
        splits["test"] += shuffled[:num_test]
        splits["train"] += shuffled[num_test:]

    answers = {
        relation: [fact.answer for fact in facts] + EXTRA_CHOICES.get(relation, [])
        for relation, facts in by_relation.items()
    }
    for split, facts in splits.items():
        rows = make_rows(facts, answers, rng)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (out / f"general.{split}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")
        print(f"{split}: {len(rows)} questions")


if __name__ == "__main__":
    main()
