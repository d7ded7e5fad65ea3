"""Real model classes, with random weights: exact Jacobians, no trace of padding, a posterior."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
import torch
from laplace import Laplace
from models import (
    CAUSAL_ARCHITECTURES,
    CHOICE_TOKENS,
    CLASSIFIER_ARCHITECTURES,
    SEQ2SEQ_ARCHITECTURES,
    KeepingFloat64,
    Labelled,
    bruteforce_jacobians,
    choice_batch,
    letter_batch,
    letter_head,
    packed_batch,
    scoring_head,
    tiny,
)
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from laplace_llm import MultipleChoiceCollator, MultipleChoiceHead, SequenceClassificationHead, taps
from laplace_llm.adapters import find_lora_tensors
from laplace_llm.causal_heads import CausalHead
from laplace_llm.errors import DataError, OptionError, TapError
from laplace_llm.links import quasi_monte_carlo
from laplace_llm.packing import unpack
from laplace_llm.session import borrowed

# Experts are no linear layers, and cannot have a posterior yet.
MIXTURES = ("qwen3_moe", "mixtral")


class Case(NamedTuple):
    """A head on an architecture, what it is called with, and where it can be padded."""

    head: Callable[[], nn.Module]
    batch: Callable[..., Labelled]
    sides: tuple[str, ...] = ("right", "left")


# Using a model leaves it as it was, so that tests can share it.
@cache
def causal(name: str) -> nn.Module:
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    targets = attention if name in MIXTURES else "all-linear"
    return tiny(CAUSAL_ARCHITECTURES[name], targets=targets, rank=2)


@cache
def classifier(name: str) -> nn.Module:
    classes = None if name == "bert_choices" else 3
    model = tiny(CLASSIFIER_ARCHITECTURES[name], targets="all-linear", rank=2, classes=classes)
    return SequenceClassificationHead(model)


@cache
def seq2seq(name: str) -> nn.Module:
    return letter_head(tiny(SEQ2SEQ_ARCHITECTURES[name], targets="all-linear", rank=2))


def closed_batch(n: int, **kwargs: Any) -> dict[str, Tensor]:
    """Return `letter_batch` with the closing token 2 at the end of every row, and only there."""
    batch = letter_batch(n, **kwargs)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    ids[ids == 2] = 3
    last = (mask * torch.arange(1, mask.shape[1] + 1)).argmax(1)
    ids[torch.arange(n), last] = 2
    return batch


CASES = {
    **{
        f"{name}, letters": Case(lambda name=name: letter_head(causal(name)), letter_batch)
        for name in CAUSAL_ARCHITECTURES
    },
    # Encoders of absolute positions, which batches do not give, and readers of the first token.
    "bert": Case(partial(classifier, "bert"), letter_batch, ("right",)),
    "bert, multiple choice": Case(partial(classifier, "bert_choices"), choice_batch, ("right",)),
    "roberta": Case(partial(classifier, "roberta"), letter_batch, ("right",)),
    "llama, classifier": Case(partial(classifier, "llama"), letter_batch),
    # Its decoder reads what the encoder reads, one place later, and sees what is on the left.
    "t5, classifier": Case(partial(classifier, "t5"), closed_batch, ("right",)),
    "t5": Case(partial(seq2seq, "t5"), letter_batch),
    "flan-t5": Case(partial(seq2seq, "t5_1_1"), letter_batch),
    "bart": Case(partial(seq2seq, "bart"), letter_batch, ("right",)),
}
# Packed where the architecture allows it, else taken apart.
SCORED = {
    f"{name}, scored": Case(lambda name=name: scoring_head(causal(name)), packed_batch)
    for name in CAUSAL_ARCHITECTURES
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
each_case_and_scored = pytest.mark.parametrize(
    "case", [*CASES.values(), *SCORED.values()], ids=[*CASES.keys(), *SCORED.keys()]
)
each_seq2seq = pytest.mark.parametrize("name", SEQ2SEQ_ARCHITECTURES)


@pytest.fixture(autouse=True)
def _exact():
    with KeepingFloat64():
        yield


def separate(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return one sequence a choice for packed choices; other batches as they are."""
    if "choice_ids" not in batch:
        return batch
    return unpack(batch["input_ids"], batch["attention_mask"], batch["choice_ids"])


def posterior(head: nn.Module, structure: str = "kron") -> Any:
    return Laplace(head, "classification", subset_of_weights="lora", hessian_structure=structure)


def jacobians(head: nn.Module, batch: Labelled) -> Tensor:
    la = posterior(head)
    with la._borrowed():
        return la._streaming.jacobians(batch)[0]


@each_case_and_scored
def test_jacobians_equal_brute_force(case):
    head, batch = case.head(), case.batch(3)
    expected = bruteforce_jacobians(head, separate(batch), find_lora_tensors(head))
    actual = jacobians(head, batch)
    torch.testing.assert_close(actual, expected)
    reached = torch.stack([j.abs().amax() for j in expected.split(1, -1)])
    assert bool((reached > 0).float().mean() > 0.9)


@each_case_and_scored
def test_padding_changes_no_jacobian(case):
    head = case.head()
    expected = jacobians(head, case.batch(3))
    for side in case.sides:
        extra = {} if case.batch is packed_batch else {"extra": 2}
        torch.testing.assert_close(jacobians(head, case.batch(3, pad=side, **extra)), expected)


@pytest.mark.slow
@each_case
def test_the_posterior_is_one_over_these_jacobians(case):
    head, batch = case.head(), case.batch(3, seed=1)
    la = posterior(head)
    la.fit([case.batch(4), case.batch(2, seed=2)])
    mean, covariance = la._glm_predictive_distribution(batch)
    torch.testing.assert_close(mean, head(batch).detach())
    rows = bruteforce_jacobians(head, separate(batch), la.tensors)
    torch.testing.assert_close(covariance, la.posterior_precision.inv_square_form(rows))
    torch.testing.assert_close(la(batch), quasi_monte_carlo(mean, covariance))


@pytest.mark.parametrize("name", CAUSAL_ARCHITECTURES)
def test_letters_are_the_models_own_logits(name):
    head, batch = letter_head(causal(name)), letter_batch(3)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    last = batch["attention_mask"].sum(1) - 1
    logits = head.model(**inputs).logits[torch.arange(3), last]
    torch.testing.assert_close(head(batch), logits[:, CHOICE_TOKENS[:3]])


# Padding that a model does see --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "roberta", "t5"])
def test_a_classifier_that_reads_padding_is_refused(name):
    """Its gradient on padding is not zero, and would have been left out."""
    head, batch = classifier(name), closed_batch(3, pad="left")
    with pytest.raises(TapError, match=r"do not depend on padding.*'model\..*lora_.*Pad on the"):
        posterior(head).fit([batch])
    whole = closed_batch(3, pad=None)
    torch.testing.assert_close(
        jacobians(head, whole), bruteforce_jacobians(head, whole, find_lora_tensors(head))
    )


# Encoder-decoder models ---------------------------------------------------------------------------


@each_seq2seq
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_choice_is_the_first_token_that_the_decoder_writes(name, dtype):
    model, batch = tiny(SEQ2SEQ_ARCHITECTURES[name], dtype), letter_batch(3)
    base = model.get_base_model()
    if name == "bart":
        base.final_logits_bias += torch.linspace(-1, 1, base.final_logits_bias.numel())
    start = torch.full((3, 1), base.config.decoder_start_token_id)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    expected = model(**inputs, decoder_input_ids=start).logits[:, 0, CHOICE_TOKENS[:3]]
    logits = letter_head(model)(batch)
    assert logits.dtype == torch.promote_types(dtype, torch.float32)
    tolerance = {} if dtype == torch.float64 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(logits, expected.to(logits), **tolerance)


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.:UserWarning")
def test_an_adapter_on_the_decoders_vocabulary():
    head = letter_head(tiny(SEQ2SEQ_ARCHITECTURES["t5_1_1"], targets=("v", "lm_head")))
    assert head.choice_layer is None
    batch, tensors = letter_batch(3), posterior(head).tensors
    assert any(tensor.rows for tensor in tensors)
    torch.testing.assert_close(jacobians(head, batch), bruteforce_jacobians(head, batch, tensors))


def test_positions_of_encoder_and_decoder_are_told_apart():
    head, batch = seq2seq("t5"), letter_batch(3)
    tensors = find_lora_tensors(head)
    with borrowed(head, [tensor.weight for tensor in tensors]):
        run = taps.forward(head, tensors, batch)
    lengths = batch["attention_mask"].sum(1, keepdim=True)
    for index, tensor in enumerate(tensors):
        # Keys and values of the cross-attention read the encoder's states.
        cross = any(f"EncDecAttention.{layer}." in tensor.name for layer in "kv")
        if ".encoder." in tensor.name or cross:
            torch.testing.assert_close(run.token_counts(index), lengths)
        else:
            assert run.token_counts(index) == 1


@each_seq2seq
def test_the_parents_last_layer_is_that_of_the_choices(name):
    head = letter_head(tiny(SEQ2SEQ_ARCHITECTURES[name]))

    class Loader(list):
        dataset = range(6)

    la = Laplace(head, "classification", "last_layer", "kron")
    la.fit(Loader([letter_batch(6)]))
    parts = [p.flatten() for p in head.choice_layer.parameters()]
    torch.testing.assert_close(la.mean, torch.cat(parts))


def test_choices_are_scored_by_causal_models_only():
    with pytest.raises(OptionError, match=r"T5ForConditionalGeneration is an encoder-decoder"):
        scoring_head(tiny(SEQ2SEQ_ARCHITECTURES["t5"]))


def test_a_decoder_needs_a_start():
    model = tiny(SEQ2SEQ_ARCHITECTURES["t5"])
    model.get_base_model().config.decoder_start_token_id = None
    with pytest.raises(OptionError, match=r"start token, but T5ForConditionalGeneration has none"):
        letter_head(model)


def test_a_row_needs_a_token():
    batch = letter_batch(3)
    batch["attention_mask"][1] = 0
    with pytest.raises(DataError, match="at least one real token"):
        seq2seq("t5")(batch)


# ... and their tokens

PIECES = ("<pad>", "<unk>", "</s>", "▁", "▁A", "▁B", "A", "B", "▁red", "▁blue", "▁Answer", ":")


def sentencepieces() -> PreTrainedTokenizerFast:
    """Return a tokenizer like T5's: pieces that know of the space before, and a closing token."""
    backend = Tokenizer(Unigram([(piece, -float(i)) for i, piece in enumerate(PIECES)], unk_id=1))
    backend.pre_tokenizer = Metaspace(prepend_scheme="always")
    backend.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def test_choices_are_the_first_tokens_of_targets():
    model, tokenizer = tiny(SEQ2SEQ_ARCHITECTURES["t5"]), sentencepieces()
    head = MultipleChoiceHead.from_tokenizer(model, tokenizer, ["A", " B", "red", "blue "])
    assert head.choice_token_ids == [PIECES.index(p) for p in ("▁A", "▁B", "▁red", "▁blue")]
    assert head.choice_token_ids[0] == tokenizer(text_target="A")["input_ids"][0]


def test_prompts_of_an_encoder_may_keep_their_closing_token():
    tokenizer, row = sentencepieces(), {"question": "", "choices": ["A", "B"]}
    for closing in (False, True):
        batch = MultipleChoiceCollator(tokenizer, lambda _row: "Answer:", closing=closing)([row])
        ids = [PIECES.index("▁Answer"), PIECES.index(":"), *[2] * closing]
        assert batch["input_ids"].tolist() == [ids]
    head = MultipleChoiceHead.from_tokenizer(
        tiny(SEQ2SEQ_ARCHITECTURES["t5"]), tokenizer, ["A", "B"]
    )
    assert head(batch).shape == (1, 2)
    assert isinstance(head, CausalHead)
