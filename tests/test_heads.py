"""Heads map batches to (B, C) logits that the whole model would also give."""

from collections import UserDict
from collections.abc import Callable

import pytest
import torch
from laplace import Laplace
from models import (
    CHOICE_TOKENS,
    LLAMA_SHAPE,
    VOCABULARY,
    by_size,
    choice_batch,
    letter_batch,
    letter_head,
    pair_batch,
    ragged_choices,
    ragged_letters,
    scoring_head,
    tiny_bert_choices,
    tiny_bert_classifier,
    tiny_gpt2,
    tiny_llama,
    tiny_mlp,
    tiny_opt,
    tiny_tokenizer,
)
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BatchEncoding, LlamaConfig, LlamaForSequenceClassification

from laplace_llm import ChoiceScoringHead, MultipleChoiceHead, SequenceClassificationHead
from laplace_llm.adapters import find_lora_tensors
from laplace_llm.errors import DataError, OptionError, OutputError, UnsupportedLayerError

CAUSAL = {"llama": tiny_llama, "gpt2": tiny_gpt2, "opt": tiny_opt}
TOKENS = list(CHOICE_TOKENS[:3])
each_causal = pytest.mark.parametrize("build", CAUSAL.values(), ids=CAUSAL.keys())
each_side = pytest.mark.parametrize("pad", ["right", "left", None])


def rows_of(batch: dict[str, Tensor]) -> list[Tensor]:
    """Return the token sequences without padding, of (B, T) or (B, C, T) inputs."""
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    return [i[m] for i, m in zip(ids.flatten(0, -2), mask.flatten(0, -2), strict=True)]


def full_logits(model: nn.Module, row: Tensor) -> Tensor:
    """Return the model's own logits (T, V) of one sequence without padding."""
    with torch.no_grad():
        return model(input_ids=row[None]).logits[0]


# MultipleChoiceHead -------------------------------------------------------------------------------


@each_causal
@each_side
def test_letters_equal_the_full_models_logits_at_the_last_token(build, pad):
    model, batch = build(), letter_batch(5, pad=pad)
    expected = torch.stack([full_logits(model, row)[-1, TOKENS] for row in rows_of(batch)])
    torch.testing.assert_close(letter_head(model)(batch), expected)


@each_causal
@pytest.mark.parametrize("pad", ["right", "left"])
def test_padding_changes_no_letter(build, pad):
    head = letter_head(build())
    batch, padded = letter_batch(5, pad=pad), letter_batch(5, pad=pad, extra=3)
    torch.testing.assert_close(head(padded), head(batch))
    padded["input_ids"][padded["attention_mask"] == 0] = 7
    torch.testing.assert_close(head(padded), head(batch))


@each_causal
def test_padding_side_changes_no_letter(build):
    head = letter_head(build())
    torch.testing.assert_close(
        head(letter_batch(5, pad="left")), head(letter_batch(5, pad="right"))
    )


@each_causal
def test_without_a_mask_all_tokens_are_real(build):
    model, batch = build(), letter_batch(4, pad=None)
    masked = letter_head(model)(batch)
    torch.testing.assert_close(letter_head(model)({"input_ids": batch["input_ids"]}), masked)


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_opt])
def test_absolute_positions_matter_to_these_models(build):
    """Else the tests of padding would prove nothing about position ids."""
    model, row = build(), letter_batch(1, pad=None)["input_ids"]
    causal = model.get_base_model()
    mask, shifted = torch.ones_like(row), torch.arange(row.shape[1])[None] + 3
    with torch.no_grad():
        usual = causal(input_ids=row, attention_mask=mask).logits
        moved = causal(input_ids=row, attention_mask=mask, position_ids=shifted).logits
    assert (usual - moved).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_letters_come_in_float32_or_better(dtype):
    logits = letter_head(dtype=dtype)(letter_batch(3))
    assert logits.dtype == torch.promote_types(dtype, torch.float32)


def test_low_precision_enters_only_through_the_backbone():
    model, batch = tiny_llama(dtype=torch.bfloat16), letter_batch(4)
    head = letter_head(model)
    assert head.choice_layer.weight.dtype == torch.float32
    hidden = model.get_base_model().model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    )[0]
    last = hidden[torch.arange(4), batch["attention_mask"].sum(1) - 1].float()
    rows = model.get_base_model().lm_head.weight[TOKENS].float()
    torch.testing.assert_close(head(batch), last @ rows.T)


def test_only_the_choices_rows_are_computed():
    model = tiny_llama()
    head, shapes = letter_head(model), []
    hook = lambda module, args, output: shapes.append(tuple(output.shape))  # noqa: E731
    model.get_base_model().lm_head.register_forward_hook(hook)
    head.choice_layer.register_forward_hook(hook)
    head(letter_batch(5))
    assert shapes == [(5, 3)]


def test_the_bias_of_lm_head_is_kept():
    model = tiny_llama()
    causal = model.get_base_model()
    causal.lm_head = nn.Linear(16, VOCABULARY, bias=True).double()
    batch = letter_batch(2)
    expected = torch.stack([full_logits(model, row)[-1, TOKENS] for row in rows_of(batch)])
    torch.testing.assert_close(letter_head(model)(batch), expected)


@pytest.mark.parametrize(
    ("config", "change"),
    [
        ("logits_scaling", lambda z: z / 3.0),
        ("logit_scale", lambda z: z * 3.0),
        ("final_logit_softcapping", lambda z: 3.0 * torch.tanh(z / 3.0)),
    ],
)
def test_what_follows_lm_head_is_applied(config, change):
    model, batch = tiny_llama(), letter_batch(3)
    plain = letter_head(model)(batch)
    setattr(model.get_base_model().config, config, 3.0)
    torch.testing.assert_close(letter_head(model)(batch), change(plain))


def lm_head_lora() -> PeftModel:
    return tiny_llama(targets=("v_proj", "lm_head"))


def lm_head_trained() -> PeftModel:
    return tiny_llama(modules_to_save=["lm_head"])


@pytest.mark.parametrize("build", [lm_head_lora, lm_head_trained])
def test_lm_head_with_an_adapter_or_copy_is_called_as_it_is(build):
    model, batch = build(), letter_batch(5)
    head = letter_head(model)
    assert head.choice_layer is None
    expected = torch.stack([full_logits(model, row)[-1, TOKENS] for row in rows_of(batch)])
    torch.testing.assert_close(head(batch), expected)


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_lm_head_lora_fits_and_predicts(structure):
    head = letter_head(lm_head_lora())
    la = Laplace(head, "classification", subset_of_weights="lora", hessian_structure=structure)
    la.fit([letter_batch(5)])
    la.optimize_prior_precision(method="marglik", n_steps=3)
    probabilities = la(letter_batch(4, seed=1))
    torch.testing.assert_close(probabilities.sum(1), torch.ones(4, dtype=torch.float64))
    assert any("lm_head" in tensor.name for tensor in la.tensors)


def test_gradient_reaches_every_lora_tensor_and_nothing_else():
    head = letter_head()
    head(letter_batch(4)).square().sum().backward()
    with_gradient = {name for name, p in head.named_parameters() if p.grad is not None}
    assert with_gradient == {tensor.name for tensor in find_lora_tensors(head)}
    assert all(bool(t.weight.grad.abs().sum() > 0) for t in find_lora_tensors(head))


# ... from a tokenizer


def test_choices_are_tokens_after_a_space():
    tokenizer = tiny_tokenizer()
    head = MultipleChoiceHead.from_tokenizer(tiny_llama(), tokenizer, ["red", "blue", "green"])
    expected = tokenizer.convert_tokens_to_ids(["red", "blue", "green"])
    assert head.choice_token_ids == expected
    default = MultipleChoiceHead.from_tokenizer(tiny_llama(), tokenizer)
    assert default.choice_token_ids == tokenizer.convert_tokens_to_ids(["A", "B", "C", "D"])


def test_space_around_a_choice_does_not_matter():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    plain = MultipleChoiceHead.from_tokenizer(model, tokenizer, ["red", "blue"])
    spaced = MultipleChoiceHead.from_tokenizer(model, tokenizer, [" red", "blue "])
    assert plain.choice_token_ids == spaced.choice_token_ids


def test_choices_with_the_same_first_token_clash():
    with pytest.raises(OptionError, match=r"different tokens, but \['red sky', 'red sea'\]"):
        MultipleChoiceHead.from_tokenizer(tiny_llama(), tiny_tokenizer(), ["red sky", "red sea"])


@pytest.mark.parametrize("ids", [[], [3, 3], [3, VOCABULARY], [-1, 3]])
def test_token_ids_are_checked(ids):
    with pytest.raises(OptionError, match=f"between 0 and {VOCABULARY - 1}"):
        MultipleChoiceHead(tiny_llama(), ids)


@pytest.mark.parametrize("build", [tiny_bert_classifier, tiny_mlp])
@pytest.mark.parametrize("head", [lambda m: MultipleChoiceHead(m, TOKENS), ChoiceScoringHead])
def test_causal_heads_need_a_causal_model(build, head):
    with pytest.raises(OptionError, match=r"causal language model, but got (Bert|MLP)"):
        head(build())


# ... and the parent's last-layer classes


@pytest.mark.filterwarnings("ignore:By default .link_approx. is:UserWarning")
@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_parents_last_layer_works_on_the_head(structure):
    head, batch = letter_head(dtype=torch.float32), letter_batch(6)

    class Loader(list):
        dataset = range(6)

    la = Laplace(head, "classification", "last_layer", structure)
    la.fit(Loader([batch]))
    la.optimize_prior_precision(method="marglik", n_steps=3)
    probabilities = la(letter_batch(4, seed=1))
    torch.testing.assert_close(probabilities.sum(1), torch.ones(4))
    torch.testing.assert_close(la.mean, head.choice_layer.weight.flatten())
    assert not head.choice_layer.weight.requires_grad


def test_the_choice_layer_is_frozen_and_no_part_of_the_adapter():
    head = letter_head()
    assert not head.choice_layer.weight.requires_grad
    trainable = [name for name, p in head.named_parameters() if p.requires_grad]
    assert trainable == [tensor.name for tensor in find_lora_tensors(head)]


# What batches may look like -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [dict, BatchEncoding, UserDict])
@pytest.mark.parametrize(
    ("head", "make"),
    [
        (letter_head, letter_batch),
        (scoring_head, choice_batch),
        (lambda: SequenceClassificationHead(tiny_bert_classifier()), letter_batch),
    ],
    ids=["letters", "scored", "classifier"],
)
def test_any_mapping_is_accepted_and_extra_entries_are_ignored(kind, head, make):
    head, batch = head(), make(3)
    bare = {key: value for key, value in batch.items() if key != "labels"}
    batch["labels"] = torch.full_like(batch["labels"], -100)
    batch.update(unknown=torch.ones(2, 2), text=["a", "b", "c"])
    torch.testing.assert_close(head(kind(batch)), head(bare))


@pytest.mark.parametrize("missing", ["input_ids", "attention_mask", "choice_mask"])
def test_scoring_names_a_missing_entry(missing):
    batch = choice_batch(2)
    del batch[missing]
    if missing == "attention_mask":
        assert scoring_head()(batch).shape == (2, 3)
        return
    with pytest.raises(DataError, match=missing):
        scoring_head()(batch)


def test_letters_refuse_a_row_without_tokens():
    batch = letter_batch(3)
    batch["attention_mask"][1] = 0
    with pytest.raises(DataError, match="at least one real token"):
        letter_head()(batch)


def test_letters_refuse_scored_batches():
    with pytest.raises(DataError, match=r"input_ids.*\(B, T\).*\(2, 3, 8\)"):
        letter_head()(choice_batch(2))


def test_scoring_refuses_letter_batches():
    with pytest.raises(DataError, match=r"input_ids.*\(B, C, T\).*\(2, 8\)"):
        scoring_head()(letter_batch(2))


# ChoiceScoringHead --------------------------------------------------------------------------------


def brute_force_scores(model: nn.Module, batch: dict[str, Tensor], mean: bool) -> Tensor:
    """Score each choice in its own forward pass, token by token."""
    n, c, _ = batch["input_ids"].shape
    chosen = batch["choice_mask"].flatten(0, 1)[batch["attention_mask"].flatten(0, 1).bool()]
    rows = rows_of(batch)
    flags = chosen.split([len(row) for row in rows])
    scores = []
    for row, flag in zip(rows, flags, strict=True):
        log_probs = torch.log_softmax(full_logits(model, row), -1)
        parts = [log_probs[t - 1, row[t]] for t in range(len(row)) if flag[t]]
        scores.append(sum(parts) / (len(parts) if mean else 1))
    return torch.stack(scores).view(n, c)


@each_causal
@each_side
@pytest.mark.parametrize("normalization", ["sum", "mean"])
def test_scores_equal_brute_force_log_probabilities(build, pad, normalization):
    model, batch = build(), choice_batch(3, pad=pad)
    expected = brute_force_scores(model, batch, normalization == "mean")
    torch.testing.assert_close(scoring_head(model, normalization)(batch), expected)


@each_causal
@pytest.mark.parametrize("pad", ["right", "left"])
def test_padding_changes_no_score(build, pad):
    head = scoring_head(build())
    expected = head(choice_batch(3, pad="right"))
    padded = choice_batch(3, pad=pad, extra=4)
    padded["input_ids"][padded["attention_mask"] == 0] = 7
    torch.testing.assert_close(head(padded), expected)


def test_marks_on_padding_do_not_count():
    head, batch = scoring_head(), choice_batch(3, pad="right")
    expected = head(batch)
    batch["choice_mask"] |= batch["attention_mask"] == 0
    torch.testing.assert_close(head(batch), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_scores_come_in_float32_or_better(dtype):
    scores = scoring_head(dtype=dtype)(choice_batch(2))
    assert scores.dtype == torch.promote_types(dtype, torch.float32)


def test_scores_use_the_vocabulary_at_choice_tokens_only():
    model = tiny_llama()
    head, batch, shapes = scoring_head(model), choice_batch(3), []
    model.get_base_model().lm_head.register_forward_hook(
        lambda module, args, output: shapes.append(tuple(output.shape))
    )
    head(batch)
    assert shapes == [(int(batch["choice_mask"].sum()), VOCABULARY)]


def test_gradient_of_scores_reaches_every_lora_tensor():
    head = scoring_head()
    head(choice_batch(2)).square().sum().backward()
    assert all(bool(t.weight.grad.abs().sum() > 0) for t in find_lora_tensors(head))


def first_token_marked(batch: dict[str, Tensor]) -> None:
    batch["choice_mask"][1, 0, 0] = True


def nothing_marked(batch: dict[str, Tensor]) -> None:
    batch["choice_mask"][1, 2] = False


@pytest.mark.parametrize("spoil", [first_token_marked, nothing_marked])
def test_choices_that_cannot_be_scored_are_refused(spoil: Callable):
    batch = choice_batch(2)
    spoil(batch)
    with pytest.raises(DataError, match="choice_mask or choice_ids is empty or begins at the"):
        scoring_head()(batch)


def test_unknown_normalization_is_refused():
    with pytest.raises(OptionError, match="'sum' or 'mean', but got 'median'"):
        scoring_head(normalization="median")


def test_scoring_refuses_an_adapter_on_lm_head():
    with pytest.raises(UnsupportedLayerError, match="lm_head"):
        scoring_head(lm_head_lora())


def test_scoring_accepts_a_trained_lm_head():
    model, batch = lm_head_trained(), choice_batch(2)
    torch.testing.assert_close(
        scoring_head(model)(batch), brute_force_scores(model, batch, mean=False)
    )


# Choices that a row does not have -----------------------------------------------------------------


def with_attention(build: Callable, attention: str) -> PeftModel:
    model = build()
    model.get_base_model().set_attn_implementation(attention)
    return model


def test_absent_letters_have_minus_infinity():
    model, batch = letter_head(classes=4), ragged_letters(5)
    present = batch["choice_present"]
    whole = model({k: v for k, v in batch.items() if k != "choice_present"})
    assert torch.equal(model(batch), whole.masked_fill(~present, -torch.inf))
    assert torch.equal(model({**batch, "choice_present": present.long()}), model(batch))


@each_causal
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("normalization", ["sum", "mean"])
def test_absent_choices_change_no_score_and_no_gradient(build, attention, normalization):
    # Eager attention takes a softmax in float32, in which float64's mask of nothing is NaN: of
    # padding on the left, and of a sequence of padding.
    pad = "right" if attention == "eager" else "left"
    close = {"rtol": 1e-5, "atol": 1e-5} if attention == "eager" else {}
    head = scoring_head(with_attention(build, attention), normalization)
    batch = ragged_choices(5, pad=pad)
    weights = [tensor.weight for tensor in find_lora_tensors(head)]
    scores, present = head(batch), batch["choice_present"]
    assert torch.equal(scores == -torch.inf, ~present)
    alone = [head(row) for row in by_size(batch)]
    torch.testing.assert_close(scores[present], torch.cat([row[0] for row in alone]), **close)
    losses = [F.cross_entropy(row, y[None]) for row, y in zip(alone, batch["labels"], strict=True)]
    expected = torch.autograd.grad(sum(losses), weights)
    loss = F.cross_entropy(scores, batch["labels"], reduction="sum")
    torch.testing.assert_close(torch.autograd.grad(loss, weights), expected, **close)


def test_what_an_absent_choice_holds_does_not_count():
    batch = choice_batch(5, 4, pad="left")
    batch["choice_present"] = ragged_choices(5)["choice_present"]
    for entries in (batch, {k: v for k, v in batch.items() if k != "labels"}):
        head = scoring_head()
        torch.testing.assert_close(head(entries), head(ragged_choices(5)))
        assert torch.equal(
            head.prepare(entries)["attention_mask"], ragged_choices(5)["attention_mask"]
        )


BAD_PRESENT = {
    "a choice too few": (lambda p: p[:, 1:], r"choice_present.*\(5, 4\).*\(5, 3\).*n_choices=4"),
    "a row too few": (lambda p: p[1:], r"choice_present.*\(5, 4\).*\(4, 4\)"),
    "one axis": (lambda p: p[:, 0], r"\(B, C\) tensor, but got \(5,\)"),
    "no tensor": (lambda p: p.tolist(), "tensor, but got list"),
    "a row without choices": (lambda p: p & False, "every row to have a choice"),
}


@pytest.mark.parametrize(("change", "message"), BAD_PRESENT.values(), ids=BAD_PRESENT)
@pytest.mark.parametrize(
    ("head", "make"),
    [
        (lambda: letter_head(classes=4), ragged_letters),
        (scoring_head, ragged_choices),
        (lambda: SequenceClassificationHead(tiny_bert_choices()), ragged_choices),
    ],
    ids=["letters", "scored", "classifier"],
)
def test_choices_must_be_told_in_the_right_shape(head, make, change, message):
    batch = make(5)
    with pytest.raises(DataError, match=message):
        head()({**batch, "choice_present": change(batch["choice_present"])})


def test_a_present_choice_without_tokens_is_refused():
    batch = ragged_choices(3)
    batch["choice_present"] = torch.ones(3, 4, dtype=torch.bool)
    with pytest.raises(DataError, match="choice_mask or choice_ids is empty"):
        scoring_head()(batch)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_multiple_choice_models_leave_absent_choices_out(attention):
    model, batch = with_attention(tiny_bert_choices, attention), ragged_choices(5)
    head, present = SequenceClassificationHead(model), batch["choice_present"]
    logits = head(batch)
    assert torch.equal(logits == -torch.inf, ~present)
    alone = torch.cat([head(row)[0] for row in by_size(batch)])
    torch.testing.assert_close(logits[present], alone)
    loss = F.cross_entropy(logits, batch["labels"])
    weights = [tensor.weight for tensor in find_lora_tensors(head)]
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, weights))


# SequenceClassificationHead -----------------------------------------------------------------------


def test_classifier_head_returns_the_models_logits():
    model, batch = tiny_bert_classifier(), letter_batch(4)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    torch.testing.assert_close(SequenceClassificationHead(model)(batch), model(**inputs).logits)


def test_multiple_choice_models_are_classifiers_too():
    model, batch = tiny_bert_choices(), choice_batch(3)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    logits = SequenceClassificationHead(model)(batch)
    assert logits.shape == (3, 3)
    torch.testing.assert_close(logits, model(**inputs).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_classifier_logits_come_in_float32_or_better(dtype):
    logits = SequenceClassificationHead(tiny_bert_classifier(dtype=dtype))(letter_batch(2))
    assert logits.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize(
    ("build", "make"), [(tiny_bert_classifier, letter_batch), (tiny_bert_choices, choice_batch)]
)
def test_a_bare_classifier_is_wrapped(build, make):
    model = build()
    bare = Laplace(model, "classification", "lora", "kron")
    assert isinstance(bare.model, SequenceClassificationHead)
    wrapped = Laplace(SequenceClassificationHead(model), "classification", "lora", "kron")
    for la in (bare, wrapped):
        la.fit([make(4)])
    torch.testing.assert_close(bare(make(3, seed=1)), wrapped(make(3, seed=1)))


def test_a_model_without_a_head_is_refused():
    base = tiny_bert_classifier().get_base_model().bert
    with pytest.raises(OutputError, match="BertModel returned no logits"):
        SequenceClassificationHead(base)(letter_batch(2))


def test_gradient_of_a_classifier_reaches_every_lora_tensor():
    head = SequenceClassificationHead(tiny_bert_classifier())
    head(letter_batch(4)).square().sum().backward()
    assert all(bool(t.weight.grad.abs().sum() > 0) for t in find_lora_tensors(head))


# Rewards ------------------------------------------------------------------------------------------


def llama_rewards() -> PeftModel:
    model = LlamaForSequenceClassification(LlamaConfig(**LLAMA_SHAPE, num_labels=1))
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(model, lora).double().eval()


def one_of(pairs: dict[str, Tensor], which: int) -> dict[str, Tensor]:
    """Return a batch of the first or second sequence of each pair."""
    return {k: v[:, which] for k, v in pairs.items() if v.ndim == 3}


@pytest.mark.parametrize("build", [lambda: tiny_bert_classifier(classes=1), llama_rewards])
@pytest.mark.parametrize("pad", ["right", "left"])
def test_a_model_of_one_label_scores_each_sequence_of_an_example(build, pad):
    head, pairs = SequenceClassificationHead(build()), pair_batch(4, pad=pad)
    scores = head(pairs)
    assert scores.shape == (4, 2)
    for which in (0, 1):
        alone = one_of(pairs, which)
        assert head(alone).shape == (4, 1)
        torch.testing.assert_close(scores[:, which : which + 1], head(alone), rtol=1e-5, atol=1e-6)


def test_what_belongs_to_tokens_comes_with_the_sequences():
    head, pairs = SequenceClassificationHead(tiny_bert_classifier(classes=1)), pair_batch(4)
    kinds = {**pairs, "token_type_ids": 1 - pairs["token_type_ids"]}
    assert not torch.allclose(head(kinds), head(pairs))
    torch.testing.assert_close(head(kinds)[:, 1], head(one_of(kinds, 1))[:, 0])


def test_several_answers_may_be_compared():
    head, batch = SequenceClassificationHead(tiny_bert_classifier(classes=1)), ragged_choices(5)
    scores, present = head(batch), batch["choice_present"]
    assert torch.equal(scores == -torch.inf, ~present)
    alone = torch.cat([head(row)[0] for row in by_size(batch)])
    torch.testing.assert_close(scores[present], alone)


def test_sequences_of_several_labels_are_refused():
    with pytest.raises(OutputError, match=r"num_labels=1.*\(4, 2, 8\).*3 labels"):
        SequenceClassificationHead(tiny_bert_classifier())(pair_batch(4))
