"""Bad input is an error that names what was bad, and nothing is changed by it."""

import re
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from laplace import Laplace
from models import (
    choice_batch,
    frozen,
    letter_batch,
    letter_head,
    scoring_head,
    snapshot,
    tiny_bert_classifier,
    tiny_llama,
    tiny_mlp,
)
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

import laplace_llm
from laplace_llm import LaplaceLLMError, StreamingEF
from laplace_llm.errors import (
    AdapterError,
    DataError,
    NotFittedError,
    OptionError,
    OutputError,
    PriorError,
    StateError,
    TapError,
    UnsupportedLayerError,
)

# The type that code written for the parent, or any Python code, would catch.
BUILT_IN = {
    AdapterError: ValueError,
    UnsupportedLayerError: ValueError,
    DataError: ValueError,
    OptionError: ValueError,
    OutputError: ValueError,
    PriorError: ValueError,
    StateError: ValueError,
    NotFittedError: AttributeError,
    TapError: RuntimeError,
}
STRUCTURES = ("kron", "diag", "full")


def lora(model: nn.Module, structure: str = "kron", **kwargs: Any) -> Any:
    return Laplace(model, "classification", "lora", structure, **kwargs)


def table(*rows: tuple) -> pytest.MarkDecorator:
    """Parametrise with rows of (name, what is done, error, pattern of its message)."""
    params = [pytest.param(*row[1:], id=row[0].replace(" ", "-")) for row in rows]
    return pytest.mark.parametrize(("act", "error", "message"), params)


def assert_raises(error: type[Exception], message: str, act: Callable, *args: Any) -> None:
    with pytest.raises(error, match=re.compile(message, re.DOTALL)) as caught:
        act(*args)
    if error in BUILT_IN:
        assert type(caught.value) is error
        assert isinstance(caught.value, LaplaceLLMError)
        assert isinstance(caught.value, BUILT_IN[error])


def posterior(la: Any) -> dict[str, Any]:
    """Return what a posterior consists of and predicts."""
    generator = torch.Generator().manual_seed(0)
    parts = {"prediction": la(letter_batch(2, seed=3)), "samples": la.sample(1, generator)}
    return frozen({**la.state_dict(), **parts})


# Construction -------------------------------------------------------------------------------------


def with_second_adapter() -> nn.Module:
    model = tiny_llama()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    return model


def merged() -> nn.Module:
    model = tiny_llama()
    model.merge_adapter()
    return model


def disabled() -> nn.Module:
    model = tiny_llama()
    model.base_model.disable_adapter_layers()
    return model


def head(**kwargs: Any) -> Callable:
    """Return what builds a posterior over a new head."""
    return lambda: (letter_head(), kwargs)


def backend(**kwargs: Any) -> Callable:
    return head(backend_kwargs=kwargs)


@table(
    ("no lora", lambda: (tiny_mlp().unload(), {}), AdapterError, "MLP has none.*get_peft_model"),
    ("no module", lambda: (nn.Linear(2, 2), {}), AdapterError, "Linear has none"),
    (
        "unknown adapter",
        lambda: (letter_head(), {"adapter": "mine"}),
        AdapterError,
        r"Unknown adapter 'mine'.*\['default'\]",
    ),
    (
        "inactive adapter",
        lambda: (letter_head(with_second_adapter()), {"adapter": "second"}),
        AdapterError,
        r"'second' is not active.*set_adapter\('second'\)",
    ),
    ("merged", lambda: (letter_head(merged()), {}), AdapterError, "default.*merged.*q_proj"),
    ("disabled", lambda: (letter_head(disabled()), {}), AdapterError, "default.*disabled.*q_proj"),
    (
        "alora",
        lambda: (letter_head(alora_invocation_tokens=[1]), {}),
        UnsupportedLayerError,
        "default.*layers.0.self_attn.q_proj.*ALora",
    ),
    (
        "embedding",
        lambda: (letter_head(targets=("embed_tokens",), use_dora=True), {}),
        UnsupportedLayerError,
        r"embed_tokens.*lora\.Embedding",
    ),
    ("rank 0", backend(rank=0), OptionError, "rank.*got 0"),
    ("rank 1.5", backend(rank=1.5), OptionError, r"rank.*got 1\.5"),
    ("rank -3", backend(rank=-3), OptionError, "rank.*got -3"),
    ("rank text", backend(rank="8"), OptionError, "rank.*got '8'"),
    ("rank bool", backend(rank=True), OptionError, "rank.*got True"),
    ("kfac_approx", backend(kfac_approx="mean"), OptionError, "kfac_approx.*got 'mean'"),
    ("mc_samples 0", backend(stochastic=True, mc_samples=0), OptionError, "mc_samples.*got 0"),
    ("mc_samples 1.5", backend(mc_samples=1.5), OptionError, r"mc_samples.*got 1\.5"),
    ("last_layer", backend(last_layer=True), OptionError, "StreamingGGN.*last layer"),
    (
        "sampled empirical fisher",
        head(backend=StreamingEF, backend_kwargs={"stochastic": True}),
        OptionError,
        "stochastic or mc_samples",
    ),
    ("prior negative", head(prior_precision=-1.0), PriorError, r"got \[-1\.0\]"),
    ("prior length", head(prior_precision=torch.ones(3)), PriorError, r"got shape \(3,\)"),
    ("prior text", head(prior_precision="1"), PriorError, "got a str"),
    ("prior mean length", head(prior_mean=torch.zeros(3)), PriorError, "336 values"),
    ("likelihood", head(likelihood="classificaton"), ValueError, "classificaton"),
    ("sigma_noise", head(sigma_noise=2.0), ValueError, "(?i)sigma noise"),
)
def test_construction(act, error, message):
    model, kwargs = act()
    before = snapshot(model)
    kwargs = {"likelihood": "classification", **kwargs}
    build = lambda: Laplace(  # noqa: E731
        model, subset_of_weights="lora", hessian_structure="kron", **kwargs
    )
    assert_raises(error, message, build)
    assert snapshot(model) == before


@pytest.mark.parametrize("structure", ["lowranks", "kronecker"])
def test_unknown_structure(structure):
    message = rf"\['diag', 'ekfac', 'full', 'gp', 'kron', 'lowrank'\].*got '{structure}'"
    assert_raises(
        OptionError,
        message,
        lambda: laplace_llm.Laplace(letter_head(), hessian_structure=structure),
    )


# Before fit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", [*STRUCTURES, "lowrank", "ekfac", "gp"])
@pytest.mark.parametrize(
    "use",
    [
        pytest.param(lambda la: la(letter_batch(2)), id="glm"),
        pytest.param(lambda la: la(letter_batch(2), pred_type="nn", link_approx="mc"), id="nn"),
        pytest.param(lambda la: la.sample(2), id="sample"),
        pytest.param(lambda la: la.log_marginal_likelihood(), id="marglik"),
        pytest.param(lambda la: la.optimize_prior_precision(), id="optimize"),
        pytest.param(lambda la: la.functional_samples(letter_batch(2)), id="functional_samples"),
        pytest.param(lambda la: la.predictive_samples(letter_batch(2)), id="predictive_samples"),
        pytest.param(lambda la: la.moments_grid(letter_batch(2), torch.ones(2)), id="moments"),
        pytest.param(lambda la: la.log_prob(torch.zeros(la.n_params)), id="log_prob"),
        pytest.param(lambda la: la.posterior_precision, id="posterior_precision"),
        pytest.param(lambda la: la.state_dict(), id="state_dict"),
    ],
)
def test_use_before_fit(structure, use):
    la = lora(letter_head(), structure)
    assert_raises(NotFittedError, r"Run fit\(\) first", use, la)


# Fit ----------------------------------------------------------------------------------------------


def without(batch: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {k: v for k, v in batch.items() if k != key}


def labels(*values: Any) -> list:
    """Return a loader whose second batch has these labels."""
    batch = letter_batch(3)
    return [letter_batch(2), {**batch, "labels": torch.tensor(values)}]


def masked(change: Callable[[Tensor], Tensor]) -> list:
    batch = letter_batch(3)
    return [letter_batch(2), {**batch, "attention_mask": change(batch["attention_mask"])}]


IN_BATCH_1 = ".*in batch 1 of the loader"


@table(
    ("empty loader", list, DataError, "at least one batch"),
    ("exhausted loader", lambda: iter([]), DataError, "at least one batch"),
    (
        "no labels",
        lambda: [letter_batch(2), without(letter_batch(3), "labels")],
        DataError,
        r"labels under 'labels'.*\['attention_mask', 'input_ids'\]",
    ),
    ("text for a batch", lambda: ["a question"], DataError, "mapping or an .* pair.*a str"),
    ("tensor for a batch", lambda: [torch.ones(2, 3)], DataError, "pair.*a Tensor"),
    ("triple for a batch", lambda: [(1, 2, 3)], DataError, "pair.*a tuple"),
    ("none for a batch", lambda: [None], DataError, "pair.*a NoneType"),
    ("a batch for the loader", lambda: letter_batch(2), DataError, "pair.*a str"),
    ("label too large", lambda: labels(0, 3, 1), DataError, f"0 to 2.*got 3{IN_BATCH_1}"),
    (
        "label of an absent choice",
        lambda: [
            letter_batch(2),
            {
                **letter_batch(3),
                "choice_present": torch.eye(3).bool(),
                "labels": torch.arange(3) // 2,
            },
        ],
        DataError,
        f"row 1 has label 0, whose logit is -inf{IN_BATCH_1}",
    ),
    ("label negative", lambda: labels(0, -1, 1), DataError, f"0 to 2.*got -1{IN_BATCH_1}"),
    ("label ignored", lambda: labels(0, -100, 1), DataError, f"got -100{IN_BATCH_1}"),
    ("labels float", lambda: labels(0.0, 1.0, 1.0), DataError, f"integer.*float32{IN_BATCH_1}"),
    ("labels too few", lambda: labels(0, 1), DataError, rf"3 examples.*\(2,\){IN_BATCH_1}"),
    ("labels of rank 2", lambda: labels([0], [1], [2]), DataError, rf"\(3, 1\){IN_BATCH_1}"),
    (
        "no input_ids",
        lambda: [letter_batch(2), without(letter_batch(3), "input_ids")],
        DataError,
        f"'input_ids'.*NoneType{IN_BATCH_1}",
    ),
    (
        "input_ids of rank 3",
        lambda: [letter_batch(2), choice_batch(2)],
        DataError,
        rf"'input_ids'.*\(2, 3, 8\){IN_BATCH_1}",
    ),
    (
        "mask all 0",
        lambda: masked(torch.zeros_like),
        DataError,
        f"at least one real token{IN_BATCH_1}",
    ),
    (
        "mask of rank 4",
        lambda: masked(lambda m: m[:, None, None]),
        DataError,
        rf"'attention_mask'.*\(3, 1, 1, 8\){IN_BATCH_1}",
    ),
    (
        "mask too narrow",
        lambda: masked(lambda m: m[:, :-1]),
        DataError,
        rf"attention_mask.*\(3, 7\){IN_BATCH_1}",
    ),
    (
        "mask of too few rows",
        lambda: masked(lambda m: m[:-1]),
        DataError,
        rf"attention_mask.*\(2, 8\){IN_BATCH_1}",
    ),
)
@pytest.mark.parametrize(("structure", "override"), [("kron", False), ("diag", True)])
def test_fit(act, error, message, structure, override):
    la = lora(letter_head(), structure)
    la.fit([letter_batch(4)])
    model, state = snapshot(la.model), posterior(la)
    assert_raises(error, message, lambda: la.fit(act(), override=override))
    assert snapshot(la.model) == model
    assert posterior(la) == state


def test_scored_mask_of_another_shape():
    la, batch = lora(scoring_head()), choice_batch(2)
    batch["choice_mask"] = batch["choice_mask"][..., :-1]
    assert_raises(DataError, r"choice_mask.*\(2, 3, 7\)", la.fit, [batch])


# Models that misbehave ----------------------------------------------------------------------------


class Custom(nn.Module):
    """A model whose forward pass is given by a function of its layers and the input."""

    def __init__(self, act: Callable[["Custom", Tensor], Any]) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.out = nn.Linear(4, 3)
        self.act = act

    def forward(self, x: Tensor) -> Any:
        return self.act(self, x)


def custom(act: Callable[[Custom, Tensor], Any]) -> Callable:
    config = LoraConfig(r=2, target_modules=["first", "out"], init_lora_weights=False)
    return lambda: (get_peft_model(Custom(act), config), (torch.ones(2, 4), torch.tensor([0, 1])))


def causal() -> tuple:
    return tiny_llama(), letter_batch(2)


def broken(value: float, where: str) -> Callable:
    def build() -> tuple:
        model = letter_head()
        with torch.no_grad():
            dict(model.named_parameters())[where].view(-1)[3] = value
        return model, letter_batch(2, pad=None)

    return build


LAYER_1 = "model.base_model.model.model.layers.1"
LORA_0 = r"layers\.0\.self_attn\.q_proj\.lora_A\.default\.weight"
LORA_1 = r"layers\.1\.self_attn\.q_proj\.lora_A\.default\.weight"


@table(
    ("bare causal lm", causal, OutputError, r"\(2, 8, 50\).*MultipleChoiceHead"),
    (
        "model output",
        custom(lambda m, x: SequenceClassifierOutput(logits=m.out(m.first(x)))),
        OutputError,
        "SequenceClassifierOutput.*Wrap it",
    ),
    ("tuple", custom(lambda m, x: (m.out(m.first(x)),)), OutputError, "returned a tuple"),
    ("three axes", custom(lambda m, x: m.out(m.first(x))[:, None]), OutputError, r"\(2, 1, 3\)"),
    ("one axis", custom(lambda m, x: m.out(m.first(x))[:, 0]), OutputError, r"shape \(2,\)"),
    ("integers", custom(lambda m, x: m.out(m.first(x)).long()), OutputError, "int64"),
    (
        "layer not called",
        custom(lambda m, x: m.out(x)),
        TapError,
        r"first\.lora_A\.default\.weight.*used 0 times",
    ),
    (
        "layer called twice",
        custom(lambda m, x: m.out(m.first(m.first(x)))),
        TapError,
        r"first\.lora_A\.default\.weight.*used 2 times",
    ),
    (
        "layer on something else than examples",
        custom(lambda m, x: m.out(x + m.first(torch.ones(3, 4)).sum(0))),
        TapError,
        r"first\.lora_A\.default\.weight.*2 examples.*\(3, 2\)",
    ),
    (
        "nan in the output layer",
        custom(lambda m, x: m.out(m.first(x)) * float("nan")),
        OutputError,
        "finite logits.*after the last LoRA layer",
    ),
    (
        "no choice in a row",
        custom(lambda m, x: m.out(m.first(x)) - torch.tensor([[0.0], [torch.inf]])),
        OutputError,
        "finite logits.*after the last LoRA layer",
    ),
    (
        "plus infinity",
        custom(lambda m, x: m.out(m.first(x)) + torch.tensor([0.0, 0.0, torch.inf])),
        OutputError,
        "finite logits.*after the last LoRA layer",
    ),
    ("nan in a norm", broken(torch.nan, f"{LAYER_1}.input_layernorm.weight"), OutputError, LORA_1),
    ("inf in a norm", broken(torch.inf, f"{LAYER_1}.input_layernorm.weight"), OutputError, LORA_1),
    (
        "nan in a lora tensor",
        broken(torch.nan, f"{LAYER_1}.self_attn.v_proj.lora_A.default.weight"),
        OutputError,
        r"layers\.1\.self_attn\.v_proj\.lora_A\.default\.weight",
    ),
)
def test_models(act, error, message):
    model, batch = act()
    la = lora(model)
    before = snapshot(model)
    assert_raises(error, f"{message}.*in batch 0 of the loader", lambda: la.fit([batch]))
    assert snapshot(model) == before
    assert_raises(NotFittedError, "fit", la.sample)


def test_nan_in_one_batch_names_the_batch():
    la = lora(tiny_mlp(dtype=torch.float64))
    good = (torch.ones(2, 4, dtype=torch.float64), torch.tensor([0, 1]))
    bad = (torch.full((2, 4), torch.nan, dtype=torch.float64), torch.tensor([0, 1]))
    message = r"first\.lora_A\.default\.weight.*in batch 2 of the loader"
    assert_raises(OutputError, message, la.fit, [good, good, bad])


@pytest.mark.parametrize("structure", [*STRUCTURES, "lowrank", "ekfac", "gp"])
def test_infinite_gradients_are_named(structure):
    """Finite logits whose gradient is not: sqrt at 0."""
    build = custom(lambda m, x: torch.sqrt(m.out(m.first(x)).square() * 0))
    model, batch = build()
    la = lora(model, structure)
    message = r"finite curvature.*first\.lora_A\.default\.weight.*in batch 0"
    assert_raises(OutputError, message, la.fit, [batch])


def test_attention_mask_of_another_shape_than_the_activations():
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny_bert_classifier()

        def forward(self, batch):
            return self.model(input_ids=batch["input_ids"]).logits

    batch = letter_batch(3)
    batch["attention_mask"] = batch["attention_mask"][:, :-1]
    message = r"attention_mask.*\(3, 7\).*query\.lora_A\.default\.weight.*\(3, 8, 3\)"
    assert_raises(TapError, message, lora(Head()).fit, [batch])


# A fitted posterior -------------------------------------------------------------------------------


def set_prior(value: Any) -> Callable:
    return lambda la: setattr(la, "prior_precision", value)


def set_mean(value: Any) -> Callable:
    return lambda la: setattr(la, "prior_mean", value)


def tune(**kwargs: Any) -> Callable:
    return lambda la: la.optimize_prior_precision(**kwargs)


def marglik(**kwargs: Any) -> Callable:
    return tune(method="marglik", **kwargs)


def grid(loader: Callable[[], Any], **kwargs: Any) -> Callable:
    kwargs = {"method": "gridsearch", "grid_size": 3, **kwargs}
    return lambda la: la.optimize_prior_precision(val_loader=loader(), **kwargs)


def predict(*args: Any, **kwargs: Any) -> Callable:
    return lambda la: la(letter_batch(2), *args, **kwargs)


def load(change: Callable[[dict[str, Any]], Any]) -> Callable:
    def act(la: Any) -> None:
        state = deepcopy(la.state_dict())
        change(state)
        la.load_state_dict(state)

    return act


def load_from(build: Callable[[], Any]) -> Callable:
    def act(la: Any) -> None:
        other = build()
        other.fit([letter_batch(3)])
        la.load_state_dict(other.state_dict())

    return act


NN = {"pred_type": "nn", "link_approx": "mc", "n_samples": 2}
UNLABELLED = lambda: [without(letter_batch(3), "labels")]  # noqa: E731


@table(
    ("prior 0", set_prior(0.0), PriorError, r"positive.*\[0\.0\]"),
    ("prior negative", set_prior(-2.0), PriorError, r"positive.*\[-2\.0\]"),
    ("prior nan", set_prior(torch.nan), PriorError, r"\[nan\]"),
    ("prior inf", set_prior(torch.inf), PriorError, r"\[inf\]"),
    ("prior text", set_prior("1"), PriorError, "got a str"),
    ("prior none", set_prior(None), PriorError, "got a NoneType"),
    ("prior bool", set_prior(True), PriorError, "got a bool"),
    ("prior list", set_prior([1.0, 2.0]), PriorError, "got a list"),
    ("prior length", set_prior(torch.ones(3)), PriorError, r"1 or 8.*\(3,\)"),
    ("prior matrix", set_prior(torch.ones(2, 4)), PriorError, r"1 or 8.*\(2, 4\)"),
    ("one prior negative", set_prior(torch.tensor([-1.0] + 7 * [1.0])), PriorError, r"\[-1\.0"),
    ("mean length", set_mean(torch.ones(3)), PriorError, r"336 values.*\[1\., 1\., 1\.\]"),
    ("mean text", set_mean("0"), PriorError, "336 values, but got '0'"),
    ("marglik negative", lambda la: la.log_marginal_likelihood(-torch.ones(1)), PriorError, r"-1"),
    (
        "sigma_noise for classes",
        lambda la: la.log_marginal_likelihood(sigma_noise=torch.tensor(2.0)),
        ValueError,
        "sigma_noise",
    ),
    ("tune start negative", marglik(init_prior_prec=-1.0), PriorError, r"\[-1\.0\]"),
    ("tune method", tune(method="guess"), OptionError, "'guess'"),
    ("tune evidence", marglik(evidence="guess"), OptionError, "'guess'"),
    ("loo nn", tune(pred_type="nn"), OptionError, "'nn'"),
    ("loo per tensor", tune(prior_structure="layerwise"), OptionError, "'layerwise'"),
    ("tune structure", marglik(prior_structure="rows"), ValueError, "rows"),
    ("tune per weight", marglik(prior_structure="diag"), PriorError, r"1 or 8.*\(336,\)"),
    ("grid without loader", tune(method="gridsearch"), ValueError, "validation set"),
    ("grid loss", grid(lambda: [letter_batch(3)], loss="nll"), OptionError, "loss.*'nll'"),
    ("grid empty", grid(list), DataError, "at least one batch"),
    ("grid unlabelled", grid(UNLABELLED), DataError, r"labels under 'labels'"),
    ("grid label", grid(lambda: labels(0, 9, 1)), DataError, "0 to 2.*got 9"),
    ("grid label ignored", grid(lambda: labels(0, -100, 1)), DataError, "0 to 2.*got -100"),
    ("grid label count", grid(lambda: labels(0, 1)), DataError, r"3 examples.*\(2,\)"),
    ("grid nn empty", grid(list, **NN), DataError, "at least one batch"),
    ("grid nn unlabelled", grid(UNLABELLED, **NN), DataError, r"labels under 'labels'"),
    ("grid nn label", grid(lambda: labels(0, 9, 1), **NN), DataError, "0 to 2.*got 9"),
    ("pred_type", predict(pred_type="map"), OptionError, "pred_type.*'map'"),
    ("link", predict(link_approx="logit"), OptionError, "link_approx.*'logit'"),
    ("nn with probit", predict(pred_type="nn"), OptionError, "mc link.*'qmc'"),
    ("generator", predict(generator=3), ValueError, "generator"),
    ("generator for mc", predict(link_approx="mc", generator=3), ValueError, "generator"),
    ("generator for nn", predict(**NN, generator=3), ValueError, "generator"),
    ("no input_ids", lambda la: la({"labels": torch.ones(2)}), DataError, "input_ids"),
    ("tensor for a mapping", lambda la: la(torch.ones(2, 4)), DataError, "input_ids"),
    (
        "state class",
        load_from(lambda: lora(letter_head(), "diag")),
        StateError,
        "cls_name='KronLoraLaplace'.*'DiagLoraLaplace'",
    ),
    (
        "state layers",
        load_from(lambda: lora(letter_head(targets=("k_proj", "v_proj")))),
        StateError,
        "tensors=",
    ),
    ("state rank", load_from(lambda: lora(letter_head(rank=2))), StateError, "336 weights.*224"),
    (
        "state sketch",
        load_from(lambda: lora(letter_head(), backend_kwargs={"rank": 2})),
        StateError,
        r"\(16, 16\).*another kind",
    ),
    ("state adapter", load(lambda s: s.update(adapter="other")), StateError, "adapter='default'"),
    ("state likelihood", load(lambda s: s.update(likelihood="x")), StateError, "likelihood=.*'x'"),
    ("state factors", load(lambda s: s["H"]["pairs"].pop()), StateError, "8 LoRA tensors.*7"),
    ("state empty", lambda la: la.load_state_dict({}), StateError, "cls_name=.*None"),
)
def test_fitted(act, error, message):
    la = lora(letter_head(), prior_precision=2.0)
    la.fit([letter_batch(4)])
    model, state = snapshot(la.model), posterior(la)
    assert_raises(error, message, act, la)
    assert snapshot(la.model) == model
    assert posterior(la) == state


@pytest.mark.parametrize("structure", ["diag", "full"])
def test_state_of_another_shape(structure):
    la, other = (lora(letter_head(rank=rank), structure) for rank in (3, 2))
    for posterior_ in (la, other):
        posterior_.fit([letter_batch(3)])
    before = la(letter_batch(3))
    assert_raises(StateError, "336 weights.*224", la.load_state_dict, other.state_dict())
    torch.testing.assert_close(la(letter_batch(3)), before, rtol=0, atol=0)
