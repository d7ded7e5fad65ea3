"""Packed choices: one sequence a question gives what one sequence a choice gives."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from laplace.curvature import AsdlGGN, CurvlinopsGGN
from models import (
    HIDDEN,
    VOCABULARY,
    WORDS,
    bruteforce_jacobians,
    letter_batch,
    letter_head,
    scoring_head,
    snapshot,
    tiny_gpt2,
    tiny_llama,
    tiny_opt,
    tiny_tokenizer,
)
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AttentionInterface,
    BambaConfig,
    BambaForCausalLM,
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from laplace_llm import ChoiceScoringCollator, StreamingEF, StreamingGGN, moments
from laplace_llm import Laplace as LoraLaplace
from laplace_llm.adapters import find_lora_tensors
from laplace_llm.errors import DataError
from laplace_llm.packing import additive, predecessors, unpack, visible

CAUSAL = {"llama": tiny_llama, "gpt2": tiny_gpt2, "opt": tiny_opt}
each_causal = pytest.mark.parametrize("build", CAUSAL.values(), ids=CAUSAL.keys())
each_side = pytest.mark.parametrize("side", ["right", "left"])


def random_rows(n: int, choices: int = 3, seed: int = 0) -> list[dict[str, Any]]:
    """Return questions of one to nine words with choices of one to four."""
    generator = torch.Generator().manual_seed(seed)
    words = [word for word in WORDS if word.isalpha()]

    def text(longest: int) -> str:
        size = int(torch.randint(1, longest + 1, (), generator=generator))
        picks = torch.randint(len(words), (size,), generator=generator)
        return " ".join(words[i] for i in picks)

    return [
        {"question": text(9), "choices": [text(4) for _ in range(choices)], "answer": i % choices}
        for i in range(n)
    ]


def separate(rows: list[dict[str, Any]], side: str = "right") -> dict[str, Tensor]:
    return dict(ChoiceScoringCollator(tiny_tokenizer(side), packed=False)(rows))


def packed(rows: list[dict[str, Any]], side: str = "right", extra: int = 0) -> dict[str, Tensor]:
    """Return a packed batch with `extra` columns of padding, of token 7, on its side."""
    batch = dict(ChoiceScoringCollator(tiny_tokenizer(side))(rows))
    columns = (extra, 0) if side == "left" else (0, extra)
    fill = {"input_ids": 7, "attention_mask": 0, "choice_ids": -1, "position_ids": 0}
    return {k: F.pad(v, columns, value=fill[k]) if k in fill else v for k, v in batch.items()}


# The collator -------------------------------------------------------------------------------------

ROW = {"question": "what is red ?", "choices": ["the sky", "snow"], "answer": 1}
SHORT = {"question": "what ?", "choices": ["sea", "grass"], "answer": 0}


@each_side
def test_a_packed_row_is_the_question_and_each_choice(side):
    tokenizer = tiny_tokenizer(side, bos=True, eos=True)
    batch = ChoiceScoringCollator(tokenizer)([ROW, SHORT])
    entries = ("input_ids", "attention_mask", "choice_ids", "position_ids", "labels")
    assert set(batch) == set(entries)
    texts = [
        tokenizer.convert_ids_to_tokens(ids[mask.bool()].tolist())
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert [" ".join(text) for text in texts] == [
        "<s> Question : what is red ? Answer : the sky snow",
        "<s> Question : what ? Answer : sea grass",
    ]
    padding = [-1, -1, -1]
    first, second = [-1] * 9 + [0, 0, 1], [-1] * 7 + [0, 1]
    second = padding + second if side == "left" else second + padding
    assert batch["choice_ids"].tolist() == [first, second]
    first, second = [*range(9), 9, 10, 9], [*range(7), 7, 7]
    second = [0, 0, 0, *second] if side == "left" else [*second, 0, 0, 0]
    assert batch["position_ids"].tolist() == [first, second]
    assert batch["labels"].tolist() == [1, 0]


def test_choices_are_packed_unless_told_otherwise():
    assert "choice_ids" in ChoiceScoringCollator(tiny_tokenizer())([ROW])
    assert "choice_mask" in ChoiceScoringCollator(tiny_tokenizer(), packed=False)([ROW])


# Who sees whom ------------------------------------------------------------------------------------


def test_a_token_sees_the_question_and_its_own_choice():
    choice_ids = torch.tensor([[-1, -1, -1, 0, 0, 1, -1]])
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 0]])
    seen = visible(choice_ids, mask)
    assert [torch.nonzero(row).flatten().tolist() for row in seen[0]] == [
        *([0], [1], [1, 2], [1, 2, 3], [1, 2, 3, 4], [1, 2, 5], [1, 2, 6]),
    ]
    assert predecessors(seen).tolist() == [[-1, -1, 1, 2, 3, 2, 2]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_additive_mask_takes_what_is_not_seen_out_of_a_softmax(dtype):
    seen = visible(torch.tensor([[-1, 0, 1]]), torch.ones(1, 3))
    mask = additive(seen, dtype)
    assert mask.shape == (1, 1, 3, 3)
    assert mask.dtype == dtype
    weights = torch.softmax(torch.randn(1, 1, 3, 3).to(dtype) + mask, -1)
    assert bool((weights[:, 0][~seen] == 0).all() & (weights[:, 0][seen] > 0).all())


# Scores and gradients -----------------------------------------------------------------------------


@each_causal
@each_side
@pytest.mark.parametrize("normalization", ["sum", "mean"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_scores_equal_separate_ones(build, side, normalization, attention):
    model, rows = build(), random_rows(4)
    model.get_base_model().config._attn_implementation = attention
    head = scoring_head(model, normalization)
    # On the left, transformers' eager attention turns separate rows' padding to NaN in float64.
    expected = head(separate(rows, side if attention == "sdpa" else "right"))
    torch.testing.assert_close(head(packed(rows, side)), expected)
    torch.testing.assert_close(head(packed(rows, side, extra=3)), expected)
    alone = torch.cat([head(packed([row], side)) for row in rows])
    torch.testing.assert_close(alone, expected)


def test_one_choice_and_many_are_scored_too():
    head = scoring_head()
    for choices in (1, 7):
        rows = random_rows(2, choices)
        torch.testing.assert_close(head(packed(rows)), head(separate(rows)))


def test_the_first_tokens_of_all_choices_share_their_logits():
    model, rows, shapes = tiny_llama(), random_rows(3, choices=4), []
    model.get_base_model().lm_head.register_forward_hook(
        lambda module, args, output: shapes.append(tuple(output.shape))
    )
    batch = packed(rows)
    scoring_head(model)(batch)
    tokens = int((batch["choice_ids"] >= 0).sum())
    assert shapes == [(tokens - 3 * (4 - 1), VOCABULARY)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_scores_are_close(dtype):
    rows, head = random_rows(4), scoring_head(dtype=dtype)
    scores = head(packed(rows, "left"))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, head(separate(rows, "left")), rtol=0.05, atol=0.1)


def test_adapters_in_float32_on_a_bfloat16_base_can_be_packed():
    model, rows = tiny_llama(dtype=torch.bfloat16), random_rows(3)
    for tensor in find_lora_tensors(model):
        tensor.weight.data = tensor.weight.data.float()
    head = scoring_head(model)
    torch.testing.assert_close(head(packed(rows)), head(separate(rows)), rtol=0.05, atol=0.1)


def gradients(head: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors = find_lora_tensors(head)
    head.zero_grad()
    F.cross_entropy(head(batch), batch["labels"]).backward()
    return {tensor.name: tensor.weight.grad.clone() for tensor in tensors}


@each_causal
@each_side
def test_packed_gradients_equal_separate_ones(build, side):
    head, rows = scoring_head(build()), random_rows(4)
    actual, expected = gradients(head, packed(rows, side)), gradients(head, separate(rows, side))
    torch.testing.assert_close(actual, expected)
    assert all(bool(gradient.abs().sum() > 0) for gradient in actual.values())


# Curvature ----------------------------------------------------------------------------------------


@each_causal
@each_side
def test_packed_jacobians_equal_separate_ones(build, side):
    head, rows = scoring_head(build()), random_rows(3)
    backend = StreamingGGN(head, "classification")
    blocks, logits = backend.jacobian_blocks(packed(rows, side))
    expected, expected_logits = backend.jacobian_blocks(separate(rows, side))
    torch.testing.assert_close(logits, expected_logits)
    torch.testing.assert_close(blocks, expected)
    oracle = bruteforce_jacobians(head, separate(rows, side), find_lora_tensors(head))
    torch.testing.assert_close(torch.cat([b.flatten(2) for b in blocks], -1), oracle)


@each_side
@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("backend", [StreamingGGN, StreamingEF])
def test_packed_full_and_diagonal_posteriors_equal_separate_ones(side, structure, backend):
    head, rows = scoring_head(tiny_llama(targets=("v_proj",))), random_rows(4)
    fits = []
    for batch in (packed(rows, side), separate(rows, side)):
        la = LoraLaplace(head, "classification", "lora", structure, backend=backend)
        la.fit([batch])
        fits.append(la)
    torch.testing.assert_close(fits[0].H, fits[1].H)


@each_side
@pytest.mark.parametrize("approx", ["reduce", "expand"])
def test_padding_changes_no_kronecker_posterior(side, approx):
    head, rows = scoring_head(), random_rows(4)
    test = packed(random_rows(3, seed=1), side)
    fits, batches = [], (packed(rows, side), packed(rows, side, extra=5))
    for batch in batches:
        options = {"kfac_approx": approx}
        la = LoraLaplace(head, "classification", "lora", "kron", backend_kwargs=options)
        la.fit([batch])
        fits.append(la)
    plain, padded = fits
    torch.testing.assert_close(padded.log_marginal_likelihood(), plain.log_marginal_likelihood())
    torch.testing.assert_close(padded(test), plain(test))


# What cannot be packed ----------------------------------------------------------------------------


def with_lora(model: nn.Module, *targets: str) -> PeftModel:
    config = LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False)
    return get_peft_model(model, config).double().eval()


def llama_shape(**kwargs: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        **kwargs,
    }


def test_other_models_of_full_attention_are_packed():
    model = with_lora(
        MistralForCausalLM(MistralConfig(**llama_shape(sliding_window=None))), "v_proj"
    )
    head, rows = scoring_head(model), random_rows(3)
    torch.testing.assert_close(head(packed(rows)), head(separate(rows)), rtol=1e-5, atol=1e-5)


def windows() -> PeftModel:
    config = MistralConfig(**llama_shape(sliding_window=4))
    return with_lora(MistralForCausalLM(config), "v_proj")


def some_windows() -> PeftModel:
    config = Qwen2Config(
        **llama_shape(use_sliding_window=True, sliding_window=4, max_window_layers=1)
    )
    return with_lora(Qwen2ForCausalLM(config), "v_proj")


def recurrent() -> PeftModel:
    config = BambaConfig(
        **llama_shape(attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8)
    )
    return with_lora(BambaForCausalLM(config), "v_proj")


def without_positions() -> PeftModel:
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN, n_layer=1, n_head=2)
    return with_lora(BloomForCausalLM(config), "query_key_value")


def with_alibi() -> PeftModel:
    config = FalconConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=2,
        alibi=True,
    )
    return with_lora(FalconForCausalLM(config), "query_key_value")


def local() -> PeftModel:
    config = GPTNeoConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        window_size=4,
        max_position_embeddings=64,
    )
    return with_lora(GPTNeoForCausalLM(config), "v_proj")


def bidirectional() -> PeftModel:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return with_lora(BertLMHeadModel(config), "value")


def other_attention() -> PeftModel:
    """Return a model whose attention, like flash attention, takes no mask of four dimensions."""
    AttentionInterface.register("causal_only", sdpa_attention_forward)
    model = tiny_llama()
    model.get_base_model().config._attn_implementation = "causal_only"
    return model


UNPACKABLE = {
    "windows": (windows, "MistralForCausalLM attends to windows of 4 tokens"),
    "some windows": (some_windows, "Qwen2ForCausalLM .*(sliding|windows).*"),
    "recurrent": (recurrent, "BambaForCausalLM has recurrent layers"),
    "no positions": (without_positions, "BloomForCausalLM takes no position_ids"),
    "alibi": (with_alibi, "FalconForCausalLM has attention of its own"),
    "local": (local, "GPTNeoForCausalLM has attention of its own"),
    # Older versions of transformers give it attention of its own.
    "bidirectional": (bidirectional, "BertLMHeadModel (attends to later tokens|has attention .*)"),
    "attention": (other_attention, "LlamaForCausalLM computes attention by 'causal_only', .*"),
}
each_unpackable = pytest.mark.parametrize(
    "build", [build for build, _ in UNPACKABLE.values()], ids=UNPACKABLE.keys()
)


@pytest.mark.parametrize(("build", "reason"), UNPACKABLE.values(), ids=UNPACKABLE.keys())
def test_the_reason_why_a_model_would_mix_choices_can_be_asked_for(build, reason):
    assert re.fullmatch(reason, scoring_head(build()).packing_obstacle)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_attention_is_looked_at_when_a_batch_comes(attention):
    head, batch = scoring_head(), packed(random_rows(2))
    assert head.packing_obstacle is None
    assert head.prepare(batch) is batch
    head.model.get_base_model().config._attn_implementation = attention
    assert head.packing_obstacle == (
        f"LlamaForCausalLM computes attention by '{attention}', not by sdpa or eager"
    )
    assert "choice_mask" in head.prepare(batch)


# Taking a packed batch apart ----------------------------------------------------------------------


def assert_same_batch(actual: Any, expected: Any) -> None:
    assert set(actual) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=0, atol=0)


UNEQUAL = [
    {"question": "what ?", "choices": ["sea", "the sea and the sky and the grass and snow"]},
    {"question": "what is the colour and what is the sky ?", "choices": ["blue and red", "blue"]},
]


@each_side
@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize(
    "rows",
    [random_rows(5), random_rows(1), random_rows(3, choices=1), random_rows(2, 7), UNEQUAL],
    ids=["several", "one row", "one choice", "many choices", "unequal"],
)
def test_apart_it_is_the_separate_batch_with_padding_on_the_right(rows, extra, side):
    head = scoring_head(windows())
    prepared = head.prepare(packed(rows, side, extra))
    assert_same_batch(prepared, separate(rows))
    assert head.prepare(prepared) is prepared


def test_without_a_mask_all_tokens_are_real():
    batch = packed([ROW])
    del batch["attention_mask"]
    assert_same_batch(
        unpack(batch["input_ids"], torch.ones_like(batch["input_ids"]), batch["choice_ids"]),
        {key: value for key, value in separate([ROW]).items() if key != "labels"},
    )
    prepared = scoring_head(windows()).prepare(batch)
    assert_same_batch(prepared, separate([ROW]))


def test_other_entries_are_kept():
    batch = {**packed([ROW, SHORT]), "names": ["first", "second"]}
    before = dict(batch)
    prepared = scoring_head(windows()).prepare(batch)
    assert prepared["names"] is batch["names"]
    assert prepared["labels"] is batch["labels"]
    assert_same_batch({**batch, "names": 0}, {**before, "names": 0})


def test_what_is_not_packed_stays_as_it_is():
    batch = separate([ROW], "left")
    for model in (windows(), tiny_llama()):
        assert scoring_head(model).prepare(batch) is batch
    letters = letter_batch(2)
    assert letter_head().prepare(letters) is letters


@each_unpackable
@each_side
@pytest.mark.parametrize("normalization", ["sum", "mean"])
def test_taken_apart_scores_equal_separate_ones(build, side, normalization):
    head, rows = scoring_head(build(), normalization), random_rows(4)
    expected = head(separate(rows))
    torch.testing.assert_close(head(packed(rows, side, extra=1)), expected, rtol=0, atol=0)
    alone = torch.cat([head(packed([row], side)) for row in rows])
    torch.testing.assert_close(alone, expected, rtol=1e-5, atol=1e-5)  # norms round to float32


@each_unpackable
@each_side
def test_taken_apart_jacobians_equal_separate_ones(build, side):
    head, rows = scoring_head(build()), random_rows(3)
    backend = StreamingGGN(head, "classification")
    blocks, logits = backend.jacobian_blocks(packed(rows, side))
    expected, expected_logits = backend.jacobian_blocks(separate(rows))
    torch.testing.assert_close(logits, expected_logits)
    torch.testing.assert_close(blocks, expected)
    oracle = bruteforce_jacobians(head, separate(rows), find_lora_tensors(head))
    torch.testing.assert_close(torch.cat([b.flatten(2) for b in blocks], -1), oracle)


def test_one_choice_on_the_left_is_masked_as_the_model_sees_it():
    """Packed and separate batches are then of one size, but of other sides."""
    head, rows = scoring_head(windows()), random_rows(3, choices=1)
    backend = StreamingGGN(head, "regression")
    blocks, _ = backend.jacobian_blocks(packed(rows, "left"))
    torch.testing.assert_close(blocks, backend.jacobian_blocks(separate(rows))[0])


def posterior_of(head: nn.Module, form: Callable[..., dict], **kwargs: Any) -> dict[str, Any]:
    """Return what a posterior fitted to one form of batches comes to."""
    la = LoraLaplace(head, "classification", "lora", **kwargs)
    la.fit([form(random_rows(4)), form(random_rows(3, seed=1))])
    test = form(random_rows(3, seed=2))
    result = {"evidence": la.log_marginal_likelihood().detach(), "glm": la(test)}
    la.optimize_prior_precision()
    generator = torch.Generator().manual_seed(0)
    samples = {"pred_type": "nn", "link_approx": "mc", "n_samples": 3, "generator": generator}
    return result | {"loo": la.prior_precision, "tuned": la(test), "nn": la(test, **samples)}


def packed_left(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return packed(rows, "left")


@each_unpackable
@pytest.mark.parametrize("structure", ["kron", "lowrank"])
def test_taken_apart_posteriors_equal_separate_ones(build, structure, monkeypatch):
    head = scoring_head(build())
    expected = posterior_of(head, separate, hessian_structure=structure)
    assert bool((expected["tuned"] - expected["glm"]).abs().max() > 1e-6)
    monkeypatch.setattr(moments, "JACOBIAN_BYTES", 1)  # one question a slice
    actual = posterior_of(head, packed_left, hessian_structure=structure)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", [CurvlinopsGGN, AsdlGGN])
def test_taken_apart_under_the_parents_backends(backend):
    head = scoring_head(windows())
    actual, expected = (posterior_of(head, f, backend=backend) for f in (packed_left, separate))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


class Around(nn.Module):
    """A module of the user's around a head."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, batch: Any) -> Tensor:
        return self.head(batch=dict(batch)) / 2


@pytest.mark.parametrize("build", [windows, tiny_llama])
@pytest.mark.parametrize("approx", ["reduce", "expand"])
def test_a_head_inside_another_module(build, approx):
    model = Around(scoring_head(build()))
    form = separate if build is windows else packed
    before = snapshot(model)
    options = {"backend_kwargs": {"kfac_approx": approx}}
    expected = posterior_of(model, form, **options)
    torch.testing.assert_close(posterior_of(model, packed_left, **options), expected)
    assert snapshot(model) == before


# Different numbers of choices ---------------------------------------------------------------------


def ragged_rows(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return rows of two to four choices."""
    rows = random_rows(n, 4, seed)
    return [
        {**row, "choices": row["choices"][: 2 + i % 3], "answer": row["answer"] % (2 + i % 3)}
        for i, row in enumerate(rows)
    ]


@pytest.mark.parametrize(
    "build", [tiny_llama, tiny_gpt2, windows], ids=["llama", "gpt2", "windows"]
)
@each_side
@pytest.mark.parametrize("n_choices", [None, 6])
def test_rows_of_different_sizes_score_as_each_alone(build, side, n_choices):
    head, rows = scoring_head(build()), ragged_rows(5)
    collate = ChoiceScoringCollator(tiny_tokenizer(side), n_choices=n_choices)
    scores = head(collate(rows))
    assert scores.shape == (5, n_choices or 4)
    for row, own in zip(rows, scores, strict=True):
        c = len(row["choices"])
        torch.testing.assert_close(own[:c], head(packed([row]))[0], rtol=1e-5, atol=1e-5)
        assert (own[c:] == -torch.inf).all()


@each_side
@pytest.mark.parametrize("build", [tiny_llama, windows])
def test_packed_tokens_of_an_absent_choice_are_padding(build, side):
    head, rows = scoring_head(build()), random_rows(4)
    batch = packed(rows, side)
    batch["choice_present"] = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 1, 1], [1, 0, 0]]).bool()
    scores = head(batch)
    torch.testing.assert_close(scores.isfinite(), batch["choice_present"])
    expected = head(packed(rows, side))
    torch.testing.assert_close(scores[scores.isfinite()], expected[scores.isfinite()])
    kept = head.prepare(batch)["attention_mask"].flatten(1).sum(1)
    whole = head.prepare(packed(rows, side))["attention_mask"].flatten(1).sum(1)
    assert ((kept < whole) == torch.tensor([False, True, True, True])).all()


def test_apart_there_are_as_many_choices_as_told():
    batch = dict(ChoiceScoringCollator(tiny_tokenizer("left"), n_choices=5)(ragged_rows(4)))
    prepared = scoring_head(windows()).prepare(batch)
    apart = ChoiceScoringCollator(tiny_tokenizer(), packed=False, n_choices=5)(ragged_rows(4))
    for key in ("attention_mask", "choice_mask", "choice_present"):
        assert torch.equal(prepared[key], apart[key])


def test_a_choice_that_nothing_is_told_of_is_refused():
    batch = packed(random_rows(2))
    batch["choice_present"] = torch.ones(2, 2, dtype=torch.bool)
    for model in (tiny_llama(), windows()):
        with pytest.raises(DataError, match=r"choice_present.*\(2, 3\).*\(2, 2\)"):
            scoring_head(model)(batch)


# Bad batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [tiny_llama, windows])
@pytest.mark.parametrize("missing", ["input_ids", "attention_mask", "position_ids"])
def test_a_missing_entry_is_named(build, missing):
    head, batch = scoring_head(build()), packed([ROW])
    expected = head(batch)
    del batch[missing]
    if missing == "attention_mask":  # all tokens are real
        torch.testing.assert_close(head(batch), expected)
        return
    with pytest.raises(DataError, match=missing):
        head(batch)


@pytest.mark.parametrize("build", [tiny_llama, windows])
@pytest.mark.parametrize("key", ["attention_mask", "choice_ids", "position_ids"])
def test_entries_of_another_shape_are_refused(build, key):
    batch = packed([ROW])
    batch[key] = batch[key][:, 1:]
    with pytest.raises(DataError, match=rf"{key}.*shape of input_ids"):
        scoring_head(build())(batch)


def test_a_choice_without_tokens_is_refused():
    batch = packed([ROW, ROW])
    batch["choice_ids"][1][batch["choice_ids"][1] == 1] = 0
    for model in (tiny_llama(), windows()):
        with pytest.raises(DataError, match="choice_ids is empty"):
            scoring_head(model)(batch)


def test_a_choice_without_a_question_is_refused():
    batch = packed([ROW])
    batch["choice_ids"][batch["choice_ids"] == -1] = 0
    for model in (tiny_llama(), windows()):
        with pytest.raises(DataError, match="begins at the first token"):
            scoring_head(model)(batch)


def test_letters_refuse_packed_choices():
    with pytest.raises(DataError, match="got packed choices"):
        letter_head()(packed([ROW]))
