"""From rows of text to batches."""

from functools import partial
from typing import Any

import pytest
import torch
from models import scoring_head, tiny_llama, tiny_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerFast

from laplace_llm import (
    LETTERS,
    ChoiceScoringCollator,
    MultipleChoiceCollator,
    MultipleChoiceHead,
    letter_prompt,
    question_prompt,
)
from laplace_llm.collate import continuation
from laplace_llm.errors import DataError

ROWS = [
    {"question": "what colour is the sky ?", "choices": ["red", "blue", "green"], "answer": 1},
    {"question": "what is white ?", "choices": ["the snow", "the sea", "grass"], "answer": 0},
    {"question": "what colour is grass ?", "choices": ["red", "blue and white", "green"]},
]
LABELLED = ROWS[:2]
COLLATORS = {
    "letters": MultipleChoiceCollator,
    "packed": ChoiceScoringCollator,
    "separate": partial(ChoiceScoringCollator, packed=False),
}
each_collator = pytest.mark.parametrize("collator", COLLATORS.values(), ids=COLLATORS.keys())
each_form = pytest.mark.parametrize("packed", [True, False])


def words(tokenizer: PreTrainedTokenizerFast, ids: Tensor, mask: Tensor) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(ids[mask.bool()].tolist()))


# Prompts ------------------------------------------------------------------------------------------


def test_letter_prompt():
    assert letter_prompt(ROWS[0]) == (
        "Question: what colour is the sky ?\nA. red\nB. blue\nC. green\nAnswer:"
    )


def test_question_prompt():
    assert question_prompt(ROWS[0]) == "Question: what colour is the sky ?\nAnswer:"


def test_letters_are_the_alphabet():
    assert "".join(sorted(LETTERS)) == LETTERS
    assert len(LETTERS) == 26


def test_a_prompt_of_ones_own():
    collate = MultipleChoiceCollator(tiny_tokenizer(), lambda row: row["question"] + " Answer :")
    batch = collate(LABELLED)
    assert words(collate.tokenizer, batch["input_ids"][1], batch["attention_mask"][1]) == (
        "what is white ? Answer :"
    )


# Letters ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_letters_hold_the_prompts(side):
    tokenizer = tiny_tokenizer(side)
    batch = MultipleChoiceCollator(tokenizer)(LABELLED)
    assert isinstance(batch, BatchEncoding)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["labels"].tolist() == [1, 0]
    texts = [words(tokenizer, *pair) for pair in zip(*_inputs(batch), strict=True)]
    assert texts == [
        "Question : what colour is the sky ? A . red B . blue C . green Answer :",
        "Question : what is white ? A . the snow B . the sea C . grass Answer :",
    ]


def _inputs(batch: BatchEncoding) -> tuple[Tensor, Tensor]:
    return batch["input_ids"], batch["attention_mask"]


@each_collator
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_on_the_tokenizers_side(collator, side):
    ids, mask = (x.flatten(0, -2) for x in _inputs(collator(tiny_tokenizer(side))(ROWS)))
    edge = 0 if side == "left" else -1
    assert (mask.sum(1) < mask.shape[1]).any()
    assert torch.equal(mask[:, edge] == 0, mask.sum(1) < mask.shape[1])
    assert mask[:, -1 - edge].all()
    assert (ids[mask == 0] == 0).all()
    assert (mask.diff(dim=1) != 0).sum(1).max() == 1


@each_collator
def test_without_a_padding_token_the_closing_one_pads(collator):
    tokenizer = tiny_tokenizer(pad=False)
    assert tokenizer.pad_token_id is None
    batch = collator(tokenizer)(ROWS)
    with_pad = collator(tiny_tokenizer())(ROWS)
    assert torch.equal(batch["attention_mask"], with_pad["attention_mask"])
    ids, mask = _inputs(batch)
    assert (ids[mask == 0] == tokenizer.eos_token_id).all()
    assert torch.equal(ids[mask == 1], with_pad["input_ids"][mask == 1])


@each_collator
def test_the_longest_row_has_no_padding(collator):
    assert collator(tiny_tokenizer())(ROWS)["attention_mask"].flatten(0, -2).all(1).any()


@pytest.mark.parametrize("bos", [False, True])
@each_collator
def test_a_closing_token_is_taken_off_and_an_opening_one_kept(collator, bos):
    closing, plain = tiny_tokenizer(bos=bos, eos=True), tiny_tokenizer(bos=bos)
    assert closing("red")["input_ids"][-1] == closing.eos_token_id
    batch, expected = collator(closing)(ROWS), collator(plain)(ROWS)
    for key in expected:
        assert torch.equal(batch[key], expected[key])
    first = batch["input_ids"].flatten(0, -2)[:, 0]
    assert bool((first == plain.bos_token_id).all()) == bos


def test_a_separator_is_taken_off_as_well():
    tokenizer = tiny_tokenizer(eos=True)
    tokenizer.eos_token = None
    tokenizer.sep_token = "</s>"
    expected = MultipleChoiceCollator(tiny_tokenizer())(LABELLED)
    batch = MultipleChoiceCollator(tokenizer)(LABELLED)
    assert torch.equal(batch["input_ids"], expected["input_ids"])


# Scored choices -----------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("special", [{}, {"bos": True, "eos": True}])
def test_the_mask_marks_exactly_the_choices(side, special):
    tokenizer = tiny_tokenizer(side, **special)
    batch = ChoiceScoringCollator(tokenizer, packed=False)(ROWS)
    ids, mask, chosen = batch["input_ids"], batch["attention_mask"], batch["choice_mask"]
    assert ids.shape == mask.shape == chosen.shape
    assert ids.shape[:2] == (3, 3)
    assert chosen.dtype == torch.bool
    opening = "<s> " if special else ""
    for i, row in enumerate(ROWS):
        for j, choice in enumerate(row["choices"]):
            assert words(tokenizer, ids[i, j], chosen[i, j]) == choice
            text = words(tokenizer, ids[i, j], mask[i, j])
            assert text == f"{opening}Question : {row['question']} Answer : {choice}"


@each_form
def test_space_around_a_choice_does_not_matter(packed):
    collate = ChoiceScoringCollator(tiny_tokenizer(), packed=packed)
    spaced = [{**row, "choices": [f" {c} " for c in row["choices"]]} for row in ROWS]
    for key, value in collate(ROWS).items():
        assert torch.equal(value, collate(spaced)[key])


def test_choices_may_be_numbers():
    rows, tokenizer = [{"question": "what ?", "choices": [1, 2]}], tiny_tokenizer()
    batch = ChoiceScoringCollator(tokenizer)(rows)
    assert batch["choice_ids"][0, -2:].tolist() == [0, 1]
    batch = ChoiceScoringCollator(tokenizer, packed=False)(rows)
    assert batch["choice_mask"].sum(-1).tolist() == [[1, 1]]


# Labels -------------------------------------------------------------------------------------------


def without(row: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k != key}


@each_collator
def test_rows_without_answers_give_no_labels(collator):
    collate = collator(tiny_tokenizer())
    assert "labels" not in collate([without(row, "answer") for row in ROWS])
    assert "labels" not in collate(ROWS)
    assert collate(LABELLED)["labels"].dtype == torch.long


@each_collator
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (without(ROWS[0], "question"), r"'question' and 'choices', but row 1 has \['answer'"),
        (without(ROWS[0], "choices"), r"row 1 has \['answer', 'question'\]"),
        ({**ROWS[0], "choices": []}, "row 1"),
        ({**ROWS[0], "answer": 3}, "index into 3 choices, but row 1 has 3"),
        ({**ROWS[0], "answer": -1}, "row 1 has -1"),
        ({**ROWS[0], "answer": "B"}, "row 1 has 'B'"),
        ({**ROWS[0], "answer": None}, "row 1 has None"),
        ({**ROWS[0], "answer": 1.0}, r"row 1 has 1\.0"),
    ],
)
def test_bad_rows_are_refused_by_number(collator, bad, message):
    with pytest.raises(DataError, match=message):
        collator(tiny_tokenizer())([ROWS[0], bad])


# Different numbers of choices ---------------------------------------------------------------------

RAGGED = [
    {"question": "what ?", "choices": ["red", "blue"], "answer": 1},
    ROWS[0],
    {"question": "what is white ?", "choices": ["the snow", "sea", "grass", "sky"], "answer": 3},
]


@each_collator
@pytest.mark.parametrize("n_choices", [None, 4, 6])
def test_the_batch_tells_which_choices_a_row_has(collator, n_choices):
    batch = collator(tiny_tokenizer(), n_choices=n_choices)(RAGGED)
    present = torch.arange(n_choices or 4) < torch.tensor([[2], [3], [4]])
    assert torch.equal(batch["choice_present"], present)
    assert batch["choice_present"].dtype == torch.bool
    assert batch["labels"].tolist() == [1, 1, 3]


@each_collator
@pytest.mark.parametrize(("n_choices", "told"), [(None, False), (3, False), (4, True)])
def test_where_all_rows_have_all_choices_there_is_nothing_to_tell(collator, n_choices, told):
    assert ("choice_present" in collator(tiny_tokenizer(), n_choices=n_choices)(LABELLED)) == told


@each_collator
def test_rows_of_too_many_choices_are_refused_by_number(collator):
    with pytest.raises(DataError, match=r"n_choices=3 choices, but row 2 has 4\. .*n_choices=4"):
        collator(tiny_tokenizer(), n_choices=3)(RAGGED)


@pytest.mark.parametrize("side", ["left", "right"])
def test_absent_choices_are_sequences_of_padding(side):
    collate = ChoiceScoringCollator(tiny_tokenizer(side), packed=False, n_choices=5)
    batch = collate(RAGGED)
    absent = ~batch["choice_present"]
    assert batch["input_ids"].shape[:2] == (3, 5)
    for key in ("input_ids", "attention_mask", "choice_mask"):
        assert not batch[key][absent].any()
        assert batch[key][~absent].any(-1).all()
    alone = ChoiceScoringCollator(tiny_tokenizer(side), packed=False)
    for index, row in enumerate(RAGGED):
        for choice, mask in enumerate(alone([row])["attention_mask"][0]):
            assert batch["attention_mask"][index, choice].sum() == mask.sum()


@pytest.mark.parametrize("side", ["left", "right"])
def test_packed_rows_hold_their_own_choices_only(side):
    tokenizer = tiny_tokenizer(side)
    batch = ChoiceScoringCollator(tokenizer, n_choices=5)(RAGGED)
    assert batch["choice_ids"].amax(1).tolist() == [1, 2, 3]
    for index, row in enumerate(RAGGED):
        real = batch["attention_mask"][index].bool()
        for key, value in ChoiceScoringCollator(tokenizer)([row]).items():
            if key != "labels":
                assert torch.equal(batch[key][index][real], value[0])


def test_an_empty_choice_is_refused():
    with pytest.raises(DataError, match="at least one token"):
        ChoiceScoringCollator(tiny_tokenizer())([{"question": "what ?", "choices": ["red", " "]}])


# Continuations ------------------------------------------------------------------------------------


def character_tokenizer(*merges: tuple[str, str]) -> PreTrainedTokenizerFast:
    """Return a BPE tokenizer over characters, spaces included, that makes the given merges."""
    symbols = [*" :ABCanswer", *(a + b for a, b in merges)]
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    backend = Tokenizer(BPE(vocabulary, list(merges)))
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def pieces(tokenizer: PreTrainedTokenizerFast, prompt: str, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(continuation(tokenizer, prompt, text))


def test_a_continuation_is_what_the_text_adds():
    assert pieces(character_tokenizer((" ", "A")), "answer:", " A") == [" A"]
    assert pieces(character_tokenizer((" ", "A")), "answer:", " B") == [" ", "B"]


def test_a_continuation_that_would_change_the_prompt_is_tokenised_alone():
    tokenizer = character_tokenizer((":", " "), (" ", "A"))
    assert tokenizer.tokenize("answer: A")[-2:] == [": ", "A"]
    assert pieces(tokenizer, "answer:", " A") == [" A"]


# Together with the heads --------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_feed_the_letter_head(side):
    tokenizer = tiny_tokenizer(side)
    head = MultipleChoiceHead.from_tokenizer(tiny_llama(), tokenizer, ["A", "B", "C"])
    alone = torch.cat([head(MultipleChoiceCollator(tokenizer)([row])) for row in ROWS])
    assert alone.shape == (3, 3)
    torch.testing.assert_close(head(MultipleChoiceCollator(tokenizer)(ROWS)), alone)


@each_form
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("special", [{}, {"bos": True, "eos": True}, {"pad": False}])
def test_scores_do_not_depend_on_the_rest_of_the_batch(packed, side, special):
    collate = ChoiceScoringCollator(tiny_tokenizer(side, **special), packed=packed)
    head = scoring_head()
    alone = torch.cat([head(collate([row])) for row in ROWS])
    torch.testing.assert_close(head(collate(ROWS)), alone)
    torch.testing.assert_close(head(collate(ROWS[::-1])), alone.flip(0))


@each_form
@pytest.mark.parametrize("normalization", ["sum", "mean"])
def test_permuting_the_choices_permutes_the_scores(packed, normalization):
    collate = ChoiceScoringCollator(tiny_tokenizer("left"), packed=packed)
    head = scoring_head(normalization=normalization)
    order = [2, 0, 1]
    permuted = [{**row, "choices": [row["choices"][i] for i in order]} for row in ROWS]
    permuted = [without(row, "answer") for row in permuted]
    torch.testing.assert_close(head(collate(permuted)), head(collate(ROWS))[:, order])


def test_scores_of_one_token_choices_are_part_of_a_distribution():
    words_of = [w for w in tiny_tokenizer().get_vocab() if w.isalpha()]
    row = {"question": "what ?", "choices": words_of}
    scores = scoring_head()(ChoiceScoringCollator(tiny_tokenizer())([row]))
    assert (scores < 0).all()
    assert scores.exp().sum() < 1
