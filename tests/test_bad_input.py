"""Bad input is an error that names what was bad, and nothing is changed by it."""

import math
import re
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from laplace import Laplace
from laplace.curvature import CurvlinopsGGN
from models import (
    HAS_ELLA,
    choice_batch,
    frozen,
    letter_batch,
    letter_head,
    mlp_batch,
    packed_batch,
    scoring_head,
    snapshot,
    tiny_bert_classifier,
    tiny_llama,
    tiny_mlp,
    tiny_tokenizer,
)
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

import laplace_llm
from laplace_llm import (
    ChoiceScoringCollator,
    ChoiceScoringHead,
    LaplaceLLMError,
    MultipleChoiceCollator,
    MultipleChoiceHead,
    SequenceClassificationHead,
    Shard,
    StreamingEF,
    shared_moments_grid,
)
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
from laplace_llm.tasks import (
    Task,
    Template,
    load_task,
    read_jsonl,
    register_task,
    registered_tasks,
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

PARENTS_ERROR = ValueError if HAS_ELLA else KeyError  # of a choice that it does not have


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


def structure(name: Any, **kwargs: Any) -> Callable:
    return head(hessian_structure=name, **kwargs)


def features(**kwargs: Any) -> Callable:
    """Return what builds a posterior for regression."""
    return lambda: (tiny_mlp(), {"likelihood": "regression", **kwargs})


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
    ("prior mean nan", head(prior_mean=math.nan), PriorError, "finite number.*nan"),
    ("prior mean list", head(prior_mean=[0.0]), PriorError, r"336 values.*\[0\.0\]"),
    ("prior mean bool", head(prior_mean=True), PriorError, "336 values.*True"),
    ("temperature 0", head(temperature=0), OptionError, "temperature.*got 0"),
    ("temperature negative", head(temperature=-1.0), OptionError, r"temperature.*got -1\.0"),
    ("temperature nan", head(temperature=math.nan), OptionError, "temperature.*got nan"),
    ("temperature text", head(temperature="1"), OptionError, "temperature.*got '1'"),
    ("sigma_noise 0", features(sigma_noise=0.0), OptionError, r"sigma_noise.*got 0\.0"),
    ("sigma_noise negative", features(sigma_noise=-1.0), OptionError, r"sigma_noise.*got -1\.0"),
    ("sigma_noise nan", features(sigma_noise=math.nan), OptionError, "sigma_noise.*got nan"),
    ("sigma_noise text", features(sigma_noise="1"), OptionError, "sigma_noise.*got '1'"),
    ("sigma_noises", features(sigma_noise=torch.ones(2)), OptionError, "sigma_noise.*tensor"),
    ("enable_backprop", head(enable_backprop="yes"), OptionError, "enable_backprop.*got 'yes'"),
    (
        "include_modules_to_save",
        head(include_modules_to_save=1),
        OptionError,
        "include_modules_to_save.*got 1",
    ),
    ("tensors", head(tensors="A"), OptionError, "tensors='AB'.*got 'A'"),
    ("adapter by number", head(adapter=3), AdapterError, "Unknown adapter 3"),
    ("backend text", head(backend="StreamingGGN"), OptionError, "backend.*got 'StreamingGGN'"),
    ("backend of another kind", head(backend=int), OptionError, "backend.*class 'int'"),
    ("backend_kwargs list", head(backend_kwargs=[1]), OptionError, r"backend_kwargs.*\[1\]"),
    ("backend_kwargs unknown", backend(rnk=3), TypeError, "rnk"),
    ("stochastic text", backend(stochastic="yes"), OptionError, "stochastic.*got 'yes'"),
    ("mc_samples bool", backend(mc_samples=True), OptionError, "mc_samples.*got True"),
    ("unknown option", head(foo=3), TypeError, "foo"),
    ("damping text", head(damping="no"), OptionError, "damping.*got 'no'"),
    ("damping of diag", structure("diag", damping=True), TypeError, "damping"),
    ("max_rank of kron", head(max_rank=3), TypeError, "max_rank"),
    ("max_rank 0", structure("lowrank", max_rank=0), OptionError, "max_rank.*got 0"),
    ("max_rank 1.5", structure("lowrank", max_rank=1.5), OptionError, r"max_rank.*got 1\.5"),
    ("max_rank bool", structure("lowrank", max_rank=True), OptionError, "max_rank.*got True"),
    ("factors_on", structure("lowrank", factors_on="gpu"), OptionError, "factors_on.*got 'gpu'"),
    ("factors_on of gp", structure("gp", factors_on=1), OptionError, "factors_on.*got 1"),
    ("n_subset 0", structure("gp", n_subset=0), OptionError, "n_subset.*got 0"),
    ("n_subset 2.5", structure("gp", n_subset=2.5), OptionError, r"n_subset.*got 2\.5"),
    ("seed text", structure("gp", seed="a"), OptionError, "seed.*got 'a'"),
    ("independent", structure("gp", independent_outputs=2), OptionError, "independent_outputs"),
    (
        "lowrank without streaming",
        structure("lowrank", backend=CurvlinopsGGN),
        OptionError,
        "CurvlinopsGGN cannot give the rows",
    ),
    (
        "lowrank backend text",
        structure("lowrank", backend="StreamingGGN"),
        OptionError,
        "backend.*got 'StreamingGGN'",
    ),
    (
        "functional approximation",
        structure("gp", functional_approximation="foo"),
        OptionError,
        "functional_approximation.*'foo'",
    ),
    (
        "functional approximation of kron",
        head(functional_approximation="nystrom"),
        OptionError,
        "functional_approximation.*'nystrom'.*'kron'",
    ),
    ("subset of weights", head(subset_of_weights="loras"), PARENTS_ERROR, "loras"),
    ("structure none", structure(None), OptionError, "hessian_structure.*got None"),
    ("structure list", structure(["kron"]), OptionError, r"hessian_structure.*\['kron'\]"),
    ("likelihood none", head(likelihood=None), ValueError, "likelihood.*None"),
    ("likelihood", head(likelihood="classificaton"), ValueError, "classificaton"),
    ("sigma_noise", head(sigma_noise=2.0), ValueError, "(?i)sigma noise"),
)
def test_construction(act, error, message):
    model, kwargs = act()
    before = snapshot(model)
    assert_raises(error, message, lambda: laplace_llm.Laplace(model, **kwargs))
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
    la = lora(letter_head(), structure, prior_precision=2.0)
    before, prior = snapshot(la.model), frozen([la.prior_precision, la.mean])
    assert_raises(NotFittedError, r"Run fit\(\) first", use, la)
    assert snapshot(la.model) == before
    assert la.H is None
    assert frozen([la.prior_precision, la.mean]) == prior


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


def changed(**entries: Any) -> list:
    """Return a loader whose second batch has other entries."""
    return [letter_batch(2), {**letter_batch(3), **entries}]


def no_rows() -> dict[str, Tensor]:
    return {key: value[:0] for key, value in letter_batch(2).items()}


IN_BATCH_1 = ".*in batch 1 of the loader"


@table(
    ("empty loader", list, DataError, "at least one batch"),
    ("loader none", lambda: None, DataError, "loader.*NoneType"),
    ("loader number", lambda: 3, DataError, "loader.*an? int"),
    ("shard of none", lambda: laplace_llm.Shard(None), DataError, "loader.*NoneType"),
    ("loader text", lambda: "abc", DataError, "pair.*a str"),
    (
        "loader that fails",
        lambda: (1 / 0 for _ in range(2)),
        ZeroDivisionError,
        "division by zero",
    ),
    (
        "batch without rows",
        lambda: [letter_batch(2), no_rows()],
        DataError,
        f"one.*empty{IN_BATCH_1}",
    ),
    ("labels text", lambda: changed(labels=["a"] * 3), DataError, f"labels.*'a'{IN_BATCH_1}"),
    ("labels none", lambda: changed(labels=None), DataError, f"labels.*None{IN_BATCH_1}"),
    ("labels complex", lambda: labels(1j, 0j, 0j), DataError, f"integer.*complex64{IN_BATCH_1}"),
    ("labels scalar", lambda: changed(labels=torch.tensor(1)), DataError, f"label{IN_BATCH_1}"),
    (
        "labels on meta",
        lambda: changed(labels=torch.ones(3, device="meta").long()),
        DataError,
        f"labels.*meta{IN_BATCH_1}",
    ),
    (
        "inputs on meta",
        lambda: changed(input_ids=torch.ones(3, 8, device="meta").long()),
        DataError,
        f"input_ids.*meta{IN_BATCH_1}",
    ),
    (
        "no labels among other keys",
        lambda: [letter_batch(2), {3: 1, "a": 2}],
        DataError,
        r"labels under 'labels'.*\['3', 'a'\]",
    ),
    (
        "input_ids lists",
        lambda: changed(input_ids=[[1, 2, 3]] * 3),
        DataError,
        f"'input_ids'.*list{IN_BATCH_1}",
    ),
    (
        "input_ids array",
        lambda: changed(input_ids=np.ones((3, 8), dtype=int)),
        DataError,
        f"'input_ids'.*ndarray{IN_BATCH_1}",
    ),
    (
        "input_ids float",
        lambda: changed(input_ids=torch.ones(3, 8)),
        DataError,
        f"'input_ids'.*integers.*float32{IN_BATCH_1}",
    ),
    (
        "input_ids bool",
        lambda: changed(input_ids=torch.ones(3, 8).bool()),
        DataError,
        f"'input_ids'.*integers.*bool{IN_BATCH_1}",
    ),
    (
        "token beyond the vocabulary",
        lambda: changed(input_ids=torch.full((3, 8), 99)),
        DataError,
        f"'input_ids'.*0 to 49.*99{IN_BATCH_1}",
    ),
    (
        "token negative",
        lambda: changed(input_ids=torch.full((3, 8), -1)),
        DataError,
        f"'input_ids'.*0 to 49.*-1{IN_BATCH_1}",
    ),
    ("no token", lambda: changed(input_ids=torch.ones(3, 0).long()), DataError, r"\(3, 0\)"),
    ("mask of 2s", lambda: masked(lambda m: 2 * m), DataError, f"attention_mask.*2{IN_BATCH_1}"),
    ("mask of -1s", lambda: masked(lambda m: -m), DataError, f"attention_mask.*-1{IN_BATCH_1}"),
    ("mask nan", lambda: masked(lambda m: m * math.nan), DataError, f"nan{IN_BATCH_1}"),
    ("mask list", lambda: masked(lambda m: m.tolist()), DataError, f"list{IN_BATCH_1}"),
    ("mask none", lambda: masked(lambda m: None), DataError, f"NoneType{IN_BATCH_1}"),
    (
        "no choice in a row",
        lambda: changed(choice_present=torch.zeros(3, 3).bool()),
        DataError,
        f"choice_present{IN_BATCH_1}",
    ),
    (
        "too few choices in choice_present",
        lambda: changed(choice_present=torch.ones(3, 2).bool()),
        DataError,
        rf"choice_present.*\(3, 2\){IN_BATCH_1}",
    ),
    (
        "choice_present list",
        lambda: changed(choice_present=[[True] * 3] * 3),
        DataError,
        f"choice_present.*list{IN_BATCH_1}",
    ),
    ("packed choices", lambda: [letter_batch(2), packed_batch(2)], DataError, "choice_ids"),
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
    before = snapshot(la.model)
    assert_raises(DataError, r"choice_mask.*\(2, 3, 7\)", la.fit, [batch])
    assert snapshot(la.model) == before
    assert la.H is None


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
    before = snapshot(la.model)
    assert_raises(OutputError, message, la.fit, [good, good, bad])
    assert snapshot(la.model) == before
    assert la.H is None


@pytest.mark.parametrize("structure", [*STRUCTURES, "lowrank", "ekfac", "gp"])
def test_infinite_gradients_are_named(structure):
    """Finite logits whose gradient is not: sqrt at 0."""
    build = custom(lambda m, x: torch.sqrt(m.out(m.first(x)).square() * 0))
    model, batch = build()
    la = lora(model, structure)
    message = r"finite curvature.*first\.lora_A\.default\.weight.*in batch 0"
    before = snapshot(model)
    assert_raises(OutputError, message, la.fit, [batch])
    assert snapshot(model) == before
    assert la.H is None


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
    la = lora(Head())
    before = snapshot(la.model)
    assert_raises(TapError, message, la.fit, [batch])
    assert snapshot(la.model) == before
    assert la.H is None


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


class OtherDevice(torch.Generator):
    """A generator that says it is on a device which this machine need not have."""

    device = torch.device("cuda", 7)

    def __repr__(self) -> str:
        return "<generator elsewhere>"


VALIDATION = lambda: [letter_batch(3)]  # noqa: E731


def fitted(structure: str, **kwargs: Any) -> Any:
    la = lora(letter_head(), structure, **kwargs)
    la.fit([letter_batch(4)])
    return la


def val_grad(**kwargs: Any) -> Callable:
    return tune(**{"method": "val_grad", "val_loader": VALIDATION(), **kwargs})


def predict_with(**entries: Any) -> Callable:
    return lambda la: la({**letter_batch(2), **entries})


def call(name: str, **kwargs: Any) -> Callable:
    return lambda la: getattr(la, name)(letter_batch(2), **kwargs)


def grid_of_one(values: Any) -> Callable:
    return lambda la: la.moments_grid(letter_batch(2), values)


def grid_of_several(values: Any) -> Callable:
    return lambda la: shared_moments_grid([la], letter_batch(2), values)


def nans(n: int) -> Tensor:
    return torch.full((n,), math.nan)


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
    ("prior complex", set_prior(torch.ones(1) * 1j), PriorError, "complex64"),
    ("prior flags", set_prior(torch.ones(1).bool()), PriorError, "torch.bool"),
    ("prior on meta", set_prior(torch.ones(1, device="meta")), PriorError, "meta"),
    ("no prior", set_prior(torch.ones(0)), PriorError, r"\(0,\)"),
    ("mean nan", set_mean(torch.tensor(math.nan)), PriorError, "nan"),
    ("mean none", set_mean(None), PriorError, "got None"),
    ("temperature", lambda la: setattr(la, "temperature", 0.0), OptionError, r"temperature.*0\.0"),
    (
        "sigma_noise of a classifier",
        lambda la: setattr(la, "sigma_noise", 2.0),
        OptionError,
        r"sigma noise.*classification.*2\.0",
    ),
    ("marglik nan", lambda la: la.log_marginal_likelihood(nans(1)), PriorError, "nan"),
    ("marglik shape", lambda la: la.log_marginal_likelihood(torch.ones(3)), PriorError, r"\(3,\)"),
    ("n_samples 0", predict(n_samples=0), OptionError, "n_samples.*got 0"),
    ("n_samples -1", predict(n_samples=-1), OptionError, "n_samples.*got -1"),
    ("n_samples 1.5", predict(link_approx="mc", n_samples=1.5), OptionError, r"n_samples.*1\.5"),
    ("n_samples nan", predict(link_approx="mc", n_samples=math.nan), OptionError, "n_samples.*nan"),
    ("n_samples text", predict(n_samples="3"), OptionError, "n_samples.*got '3'"),
    ("link none", predict(link_approx=None), OptionError, "link_approx.*got None"),
    ("pred_type none", predict(pred_type=None), OptionError, "pred_type.*got None"),
    (
        "generator on another device",
        predict(link_approx="mc", generator=OtherDevice()),
        OptionError,
        "generator.*on cpu.*elsewhere",
    ),
    ("sample 0", lambda la: la.sample(0), OptionError, "n_samples.*got 0"),
    ("sample 1.5", lambda la: la.sample(1.5), OptionError, r"n_samples.*got 1\.5"),
    ("sample generator", lambda la: la.sample(1, generator=3), OptionError, "generator.*got 3"),
    *(
        (f"{name} {what}", call(name, **kwargs), OptionError, message)
        for name in ("functional_samples", "predictive_samples")
        for what, kwargs, message in (
            ("0", {"n_samples": 0}, "n_samples.*got 0"),
            ("nn 0", {"n_samples": 0, "pred_type": "nn"}, "n_samples.*got 0"),
            ("pred_type", {"pred_type": "map"}, "pred_type.*'map'"),
            ("generator", {"generator": 3}, "generator.*got 3"),
            ("nn generator", {"generator": 3, "pred_type": "nn"}, "generator.*got 3"),
        )
    ),
    *(
        (f"{name} {what}", act(values), PriorError, message)
        for name, act in (("moments of", grid_of_one), ("shared moments of", grid_of_several))
        for what, values, message in (
            ("a list", [1.0, 2.0], "got a list"),
            ("a float", 1.0, "got a float"),
            ("a scalar", torch.tensor(1.0), r"\(G,\).*got shape \(\)"),
            ("no value", torch.ones(0), r"\(0,\)"),
            ("a matrix", torch.ones(2, 2), r"\(2, 2\)"),
            ("0", torch.zeros(1), r"\[0\.0\]"),
            ("a negative value", -torch.ones(2), r"\[-1\.0, -1\.0\]"),
            ("nan", nans(2), r"\[nan, nan\]"),
            ("complex values", torch.ones(1) * 1j, "complex64"),
        )
    ),
    (
        "moments of no posterior",
        lambda la: shared_moments_grid([], letter_batch(2), torch.ones(1)),
        OptionError,
        r"posteriors.*\[\]",
    ),
    (
        "moments of one posterior",
        lambda la: shared_moments_grid(la, letter_batch(2), torch.ones(1)),
        OptionError,
        "sequence of posteriors.*KronLoraLaplace",
    ),
    (
        "moments of numbers",
        lambda la: shared_moments_grid([3], letter_batch(2), torch.ones(1)),
        OptionError,
        "posteriors.*got 3",
    ),
    (
        "moments of other models",
        lambda la: shared_moments_grid([la, fitted("kron")], letter_batch(2), torch.ones(1)),
        OptionError,
        r"does not have '.*lora_A\.default\.weight' of a KronLoraLaplace",
    ),
    ("log_prob of 3", lambda la: la.log_prob(torch.zeros(3)), OptionError, r"\(336,\).*\(3,\)"),
    ("log_prob of a list", lambda la: la.log_prob([0.0]), OptionError, r"\(336,\).*list"),
    ("grid_size 0", tune(grid_size=0), OptionError, "grid_size.*got 0"),
    ("grid_size -1", tune(grid_size=-1), OptionError, "grid_size.*got -1"),
    ("grid_size 2.5", tune(grid_size=2.5), OptionError, r"grid_size.*got 2\.5"),
    (
        "grid upside down",
        tune(log_prior_prec_min=4, log_prior_prec_max=-4),
        OptionError,
        "log_prior_prec_min <= log_prior_prec_max.*got 4 and -4",
    ),
    (
        "grid of one for val_grad",
        val_grad(log_prior_prec_min=1, log_prior_prec_max=1),
        OptionError,
        "log_prior_prec_min < log_prior_prec_max.*got 1 and 1",
    ),
    ("grid nan", tune(log_prior_prec_min=math.nan), OptionError, "log_prior_prec_min.*got nan"),
    ("grid inf", tune(log_prior_prec_max=math.inf), OptionError, "log_prior_prec_max.*got inf"),
    ("grid text", tune(log_prior_prec_max="4"), OptionError, "log_prior_prec_max.*got '4'"),
    ("grid too far", tune(log_prior_prec_max=400), OptionError, "log_prior_prec_max=400"),
    ("base 0", tune(log_prior_prec_base=0), OptionError, "log_prior_prec_base.*got 0"),
    ("base 1", tune(log_prior_prec_base=1), OptionError, "log_prior_prec_base.*got 1"),
    ("base text", tune(log_prior_prec_base="10"), OptionError, "log_prior_prec_base.*got '10'"),
    ("tune pred_type", marglik(pred_type="map"), OptionError, "pred_type.*'map'"),
    ("tune link", tune(link_approx="logit"), OptionError, "link_approx.*'logit'"),
    ("tune n_samples", tune(n_samples=0), OptionError, "n_samples.*got 0"),
    ("tune by number", tune(method=3), OptionError, "method.*got 3"),
    ("loo loss", tune(loss=lambda p, y: 1.0), OptionError, "no loss for method='loo'"),
    ("loo loader", tune(train_loader=3), DataError, "loader.*int"),
    ("loo empty", tune(train_loader=[]), DataError, "at least one batch"),
    ("n_steps 0", marglik(n_steps=0), OptionError, "n_steps.*got 0"),
    ("n_steps 1.5", marglik(n_steps=1.5), OptionError, r"n_steps.*got 1\.5"),
    ("lr 0", marglik(lr=0.0), OptionError, r"lr.*got 0\.0"),
    ("lr negative", marglik(lr=-1), OptionError, "lr.*got -1"),
    ("lr nan", marglik(lr=math.nan), OptionError, "lr.*got nan"),
    ("tune start text", marglik(init_prior_prec="1"), PriorError, "got a str"),
    ("tune start none", marglik(init_prior_prec=None), PriorError, "NoneType"),
    ("tune start nan", marglik(init_prior_prec=math.nan), PriorError, "nan"),
    (
        "linear mode per tensor",
        marglik(evidence="linear_mode", prior_structure="layerwise"),
        OptionError,
        "'linear_mode'.*'layerwise'",
    ),
    ("val_grad n_steps -1", val_grad(n_steps=-1), OptionError, "n_steps.*got -1"),
    ("val_grad lr", val_grad(lr=-1.0), OptionError, r"lr.*got -1\.0"),
    ("val_grad link", val_grad(link_approx="bridge"), OptionError, "link_approx.*'bridge'"),
    ("val_grad structure", val_grad(prior_structure="diag"), OptionError, "'diag'"),
    ("val_grad nn", val_grad(pred_type="nn"), OptionError, "'nn'"),
    ("val_grad without loader", tune(method="val_grad"), OptionError, "val_loader"),
    ("val_grad loader", val_grad(val_loader=3), DataError, "loader.*int"),
    ("val_grad empty", val_grad(val_loader=[]), DataError, "at least one batch"),
    ("val_grad unlabelled", val_grad(val_loader=UNLABELLED()), DataError, "'labels'"),
    ("val_grad label", val_grad(val_loader=labels(0, 9, 1)), DataError, "0 to 2.*got 9"),
    ("val_grad loss", val_grad(loss=3), OptionError, "loss.*int"),
    ("val_grad loss number", val_grad(loss=lambda p, y: 1.0), OptionError, r"loss.*1\.0"),
    ("val_grad losses", val_grad(loss=lambda p, y: p), OptionError, r"loss.*\(3, 3\)"),
    (
        "val_grad loss nan",
        val_grad(loss=lambda p, y: p.sum() * math.nan),
        PriorError,
        "finite loss",
    ),
    (
        "val_grad loss without gradient",
        val_grad(loss=lambda p, y: torch.tensor(1.0)),
        OptionError,
        "loss.*no gradient",
    ),
    ("grid loader", grid(lambda: 3), DataError, "loader.*int"),
    ("grid nn link", grid(VALIDATION, pred_type="nn"), OptionError, "mc link.*'qmc'"),
    ("grid per tensor", grid(VALIDATION, prior_structure="layerwise"), OptionError, "'layerwise'"),
    ("grid loss text", grid(VALIDATION, loss=lambda p, y: "x"), OptionError, "loss.*'x'"),
    ("grid losses", grid(VALIDATION, loss=lambda p, y: p), OptionError, r"loss.*\(3, 3\)"),
    ("grid loss nan", grid(VALIDATION, loss=lambda p, y: math.nan), PriorError, "finite loss"),
    ("grid loss fails", grid(VALIDATION, loss=lambda p, y: 1 / 0), ZeroDivisionError, "zero"),
    ("predict none", lambda la: la(None), DataError, "inputs.*NoneType"),
    ("predict text", lambda la: la("x"), DataError, "inputs.*str"),
    ("predict list", lambda la: la([1, 2]), DataError, "inputs.*list"),
    ("predict nothing", lambda la: la({}), DataError, "at least one example.*empty"),
    ("predict no rows", lambda la: la(no_rows()), DataError, "at least one example.*empty"),
    ("sample of no rows", lambda la: la(no_rows(), **NN), DataError, "at least one example"),
    ("predict on meta", predict_with(input_ids=torch.ones(2, 3, device="meta")), DataError, "meta"),
    ("predict lists", predict_with(input_ids=[[1, 2]]), DataError, "'input_ids'.*list"),
    ("predict floats", predict_with(input_ids=torch.ones(2, 3)), DataError, "integers.*float32"),
    (
        "predict token",
        predict_with(input_ids=torch.full((2, 8), 50)),
        DataError,
        "'input_ids'.*0 to 49.*50",
    ),
    (
        "predict mask",
        predict_with(attention_mask=torch.full((2, 8), 3)),
        DataError,
        "attention_mask.*got 3",
    ),
    (
        "predict other choices",
        predict_with(choice_present=torch.ones(2, 4).bool()),
        DataError,
        r"choice_present.*\(2, 3\).*\(2, 4\)",
    ),
    ("predict scored choices", lambda la: la(choice_batch(2)), DataError, "'input_ids'"),
    ("predict packed choices", lambda la: la(packed_batch(2)), DataError, "choice_ids"),
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
    model, state = snapshot(la.model), posterior(la)
    assert_raises(StateError, "336 weights.*224", la.load_state_dict, other.state_dict())
    assert snapshot(la.model) == model
    assert posterior(la) == state


# Features instead of tokens -----------------------------------------------------------------------


def nan_batch() -> tuple[Tensor, Tensor]:
    x, y = mlp_batch(2)
    return x * math.nan, y


FEATURES = mlp_batch(2)[0]


@table(
    ("array", lambda la: la(FEATURES.numpy()), DataError, "inputs.*ndarray"),
    ("lists", lambda la: la(FEATURES.tolist()), DataError, "inputs.*list"),
    ("scalar", lambda la: la(FEATURES[0, 0]), DataError, "inputs.*scalar"),
    ("no rows", lambda la: la(FEATURES[:0]), DataError, "at least one example"),
    ("meta", lambda la: la(FEATURES.to("meta")), DataError, "meta"),
    ("too wide", lambda la: la(torch.ones(2, 5).double()), RuntimeError, "2x5 and 4x6"),
    ("float32", lambda la: la(FEATURES.float()), RuntimeError, "Float"),
    ("integers", lambda la: la(FEATURES.long()), RuntimeError, "Long"),
    ("nan", lambda la: la(FEATURES * math.nan), OutputError, r"NaN.*first\.lora_A"),
    ("nan sampled", lambda la: la(FEATURES * math.nan, **NN), OutputError, "finite.*NaN"),
    ("fit arrays", lambda la: la.fit([(FEATURES.numpy(), [0, 1])]), DataError, "ndarray.*batch 0"),
    ("fit lists", lambda la: la.fit([(FEATURES.tolist(), [0, 1])]), DataError, "list.*batch 0"),
    ("fit no rows", lambda la: la.fit([(FEATURES[:0], [])]), DataError, "empty.*batch 0"),
    ("fit too many labels", lambda la: la.fit([(FEATURES, [0] * 3)]), DataError, r"2 ex.*\(3,\)"),
    ("loo nan", tune(train_loader=[nan_batch()]), OutputError, r"NaN.*first\.lora_B"),
    ("grid nan", tune(val_loader=[nan_batch()]), OutputError, r"NaN.*first\.lora_A"),
    ("grid nan sampled", tune(val_loader=[nan_batch()], **NN), OutputError, "NaN.*batch 0"),
    (
        "val_grad nan",
        tune(method="val_grad", val_loader=[nan_batch()]),
        OutputError,
        r"NaN.*first\.lora_A",
    ),
)
def test_features(act, error, message):
    la = lora(tiny_mlp(), prior_precision=2.0)
    la.fit([mlp_batch(4)])
    model, state = snapshot(la.model), frozen([la.state_dict(), la(FEATURES)])
    assert_raises(error, message, act, la)
    assert snapshot(la.model) == model
    assert frozen([la.state_dict(), la(FEATURES)]) == state


@table(
    ("targets nan", torch.full((2, 3), math.nan), DataError, "finite.*NaN.*batch 0"),
    ("targets inf", torch.full((2, 3), math.inf), DataError, "finite.*inf.*batch 0"),
    ("targets complex", torch.ones(2, 3) * 1j, DataError, "complex.*batch 0"),
    ("targets text", "abc", DataError, "labels.*'abc'.*batch 0"),
    ("targets too wide", torch.ones(2, 2), DataError, r"\(2, 3\).*\(2, 2\).*batch 0"),
    ("labels", torch.tensor([0, 1]), DataError, r"targets.*\(2, 3\).*\(2,\).*batch 0"),
)
@pytest.mark.parametrize("structure", ["kron", "gp"])
def test_regression(act, error, message, structure):
    la = laplace_llm.Laplace(tiny_mlp(), "regression", "lora", structure, sigma_noise=0.5)
    la.fit([mlp_batch(4, regression=True)])
    model, state = snapshot(la.model), frozen([la.state_dict(), la(FEATURES)])
    assert_raises(error, message, la.fit, [(FEATURES, act)])
    assert snapshot(la.model) == model
    assert frozen([la.state_dict(), la(FEATURES)]) == state


@pytest.mark.parametrize(
    "use",
    [
        lambda la: la(choice_batch(2, 5)),
        lambda la: la(choice_batch(2, 6), joint=True),
        lambda la: la.moments_grid(choice_batch(2, 5), torch.ones(1)),
        lambda la: la.optimize_prior_precision(val_loader=[choice_batch(2, 5)]),
    ],
)
def test_other_choices_than_independent_processes(use):
    la = laplace_llm.Laplace(scoring_head(), hessian_structure="gp", independent_outputs=True)
    la.fit([choice_batch(2, 3)])
    model, state = snapshot(la.model), frozen([la.state_dict(), la(choice_batch(2, 3))])
    assert_raises(DataError, "same number of outputs.*[56] after 3", use, la)
    assert snapshot(la.model) == model
    assert frozen([la.state_dict(), la(choice_batch(2, 3))]) == state


# Heads, collators, shards and tasks ---------------------------------------------------------------

ROW: dict[str, Any] = {"question": "what", "choices": ["red", "blue"], "answer": 0}
TOKENIZER = tiny_tokenizer()


def letters(ids: Any) -> Callable:
    return lambda model: MultipleChoiceHead(model, ids)


def from_tokenizer(*args: Any) -> Callable:
    return lambda model: MultipleChoiceHead.from_tokenizer(model, *args)


def classify(batch: Any) -> Callable:
    return lambda _: SequenceClassificationHead(tiny_bert_classifier())(batch)


def collate(row: Any = ROW, **kwargs: Any) -> Callable:
    kwargs = {"tokenizer": TOKENIZER, **kwargs}
    return lambda _: MultipleChoiceCollator(**kwargs)([row])


def score(row: Any = ROW, **kwargs: Any) -> Callable:
    kwargs = {"tokenizer": TOKENIZER, **kwargs}
    return lambda _: ChoiceScoringCollator(**kwargs)([row])


def rows_from(source: Any) -> Callable:
    return lambda _: Task("mine", source).rows()


def fill(text: Any) -> Callable:
    return lambda _: Template(text)(ROW)


@table(
    ("model none", lambda _: laplace_llm.Laplace(None), AdapterError, "model.*NoneType"),
    ("model text", lambda _: laplace_llm.Laplace("gpt2"), AdapterError, "model.*'gpt2'"),
    ("model function", lambda _: laplace_llm.Laplace(len), AdapterError, "model.*builtin"),
    (
        "ella of none",
        lambda _: laplace_llm.Laplace(
            None, hessian_structure="gp", functional_approximation="nystrom"
        ),
        AdapterError,
        "model.*NoneType",
    ),
    ("letters of none", lambda _: MultipleChoiceHead(None, [1]), AdapterError, "model.*NoneType"),
    ("letters of text", lambda _: MultipleChoiceHead("a", [1]), AdapterError, "model.*'a'"),
    (
        "letters of a classifier",
        lambda _: MultipleChoiceHead(tiny_bert_classifier(), [1]),
        OptionError,
        "causal language model.*BertForSequenceClassification",
    ),
    ("no token ids", letters([]), OptionError, r"token ids.*\[\]"),
    ("token ids none", letters(None), OptionError, "choice_token_ids.*None"),
    ("token id alone", letters(3), OptionError, "choice_token_ids.*3"),
    ("token ids text", letters("ABC"), OptionError, "choice_token_ids.*'ABC'.*from_tokenizer"),
    ("token ids texts", letters(["A", "B"]), OptionError, r"choice_token_ids.*\['A', 'B'\]"),
    ("token ids float", letters([1.5, 2.5]), OptionError, r"choice_token_ids.*\[1\.5, 2\.5\]"),
    ("token ids bool", letters([True, False]), OptionError, "choice_token_ids.*True"),
    ("token ids nested", letters([[1], [2]]), OptionError, r"choice_token_ids.*\[\[1\], \[2\]\]"),
    ("token ids twice", letters([1, 1]), OptionError, r"distinct.*\[1, 1\]"),
    ("token id beyond", letters([1, 50]), OptionError, r"0 and 49.*\[1, 50\]"),
    ("token id negative", letters([-1, 1]), OptionError, r"0 and 49.*\[-1, 1\]"),
    ("tokenizer none", from_tokenizer(None), OptionError, "tokenizer.*NoneType"),
    ("tokenizer text", from_tokenizer("gpt2"), OptionError, "tokenizer.*str"),
    ("choices numbers", from_tokenizer(TOKENIZER, (1, 2)), OptionError, r"choices.*\(1, 2\)"),
    ("choices none", from_tokenizer(TOKENIZER, ()), OptionError, r"\[\]"),
    ("choices same", from_tokenizer(TOKENIZER, ("A", "A")), OptionError, r"\['A', 'A'\]"),
    ("choices blank", from_tokenizer(TOKENIZER, ("A", " ")), DataError, "one token.*' '"),
    (
        "normalization",
        lambda model: ChoiceScoringHead(model, "avg"),
        OptionError,
        "normalization.*'avg'",
    ),
    ("scores of none", lambda _: ChoiceScoringHead(None), AdapterError, "model.*NoneType"),
    ("classes of none", lambda _: SequenceClassificationHead(None), AdapterError, "NoneType"),
    ("classify none", classify(None), DataError, "batch.*NoneType"),
    ("classify tensor", classify(torch.ones(2, 3)), DataError, "batch.*Tensor"),
    (
        "classify nothing",
        classify({"labels": torch.ones(2)}),
        DataError,
        r"input_ids.*\['labels'\]",
    ),
    ("classify lists", classify({"input_ids": [[1, 2]]}), DataError, "input_ids.*list"),
    (
        "classify floats",
        classify({"input_ids": torch.ones(2, 3)}),
        DataError,
        "input_ids.*float32",
    ),
    (
        "classify token",
        classify({"input_ids": torch.full((2, 3), 50)}),
        DataError,
        "input_ids.*0 to 49.*50",
    ),
    (
        "classify mask",
        classify({**letter_batch(2), "attention_mask": torch.ones(2, 7)}),
        DataError,
        r"attention_mask.*\(2, 8\).*\(2, 7\)",
    ),
    ("rows none", lambda _: MultipleChoiceCollator(TOKENIZER)([]), DataError, "at least one row"),
    ("rows single", lambda _: MultipleChoiceCollator(TOKENIZER)(ROW), DataError, "single row"),
    ("row text", collate("what"), DataError, "row 0.*'what'"),
    ("no question", collate({"choices": ["a", "b"]}), DataError, r"row 0 has \['choices'\]"),
    ("question none", collate({**ROW, "question": None}), DataError, "question.*row 0"),
    ("row choices none", collate({**ROW, "choices": None}), DataError, "choices.*row 0"),
    ("row choices text", collate({**ROW, "choices": "AB"}), DataError, "choices.*row 0.*'AB'"),
    ("row choice none", collate({**ROW, "choices": ["a", None]}), DataError, "row 0.*None"),
    ("answer text", collate({**ROW, "answer": "A"}), DataError, "answer.*row 0 has 'A'"),
    ("answer bool", collate({**ROW, "answer": True}), DataError, "answer.*row 0 has True"),
    ("answer none", collate({**ROW, "answer": None}), DataError, "answer.*row 0 has None"),
    ("answer beyond", collate({**ROW, "answer": 2}), DataError, "answer.*row 0 has 2"),
    ("27 choices", collate({**ROW, "choices": ["a"] * 27}), DataError, "26 choices.*27"),
    ("collator tokenizer", collate(tokenizer=None), OptionError, "tokenizer.*NoneType"),
    ("collator prompt", collate(prompt="hi"), OptionError, "prompt.*'hi'.*Template"),
    ("prompt returns none", collate(prompt=lambda row: None), DataError, "prompt.*None"),
    ("prompt returns a number", collate(prompt=lambda row: 3), DataError, "prompt.*3"),
    ("prompt returns nothing", collate(prompt=lambda row: ""), DataError, "prompt.*''"),
    ("n_choices 0", collate(n_choices=0), OptionError, "n_choices.*got 0"),
    ("n_choices 2.5", collate(n_choices=2.5), OptionError, r"n_choices.*got 2\.5"),
    ("n_choices text", collate(n_choices="4"), OptionError, "n_choices.*got '4'"),
    ("n_choices 1", collate(n_choices=1), DataError, "n_choices=1.*row 0 has 2"),
    ("scored tokenizer", score(tokenizer=3), OptionError, "tokenizer.*int"),
    ("scored n_choices", score(n_choices=1), DataError, "n_choices=1.*row 0 has 2"),
    ("scored answer", score({**ROW, "answer": -1}), DataError, "answer.*row 0 has -1"),
    ("scored choices text", score({**ROW, "choices": "AB"}), DataError, "choices.*row 0.*'AB'"),
    ("scored blank", score({**ROW, "choices": ["a", " "]}), DataError, "token.*' '"),
    ("scored prompt", score(prompt=lambda row: ""), DataError, "prompt.*''"),
    ("shard of none", lambda _: Shard(None), DataError, "loader.*NoneType"),
    ("shard of a number", lambda _: Shard(3), DataError, "loader.*int"),
    ("task unknown", lambda _: load_task("x"), OptionError, "boolq.*got 'x'"),
    ("task folder", lambda _: load_task("boolq", "/none"), OptionError, "'/none'"),
    ("task data", lambda _: load_task("boolq", 3), OptionError, "data.*got 3"),
    ("task no split", lambda _: Task("a", "a.jsonl"), OptionError, r"\{split\}.*'a\.jsonl'"),
    ("task source none", lambda _: Task("a", None), OptionError, r"\{split\}.*'None'"),
    ("task name", lambda _: Task(3, "a.{split}"), OptionError, "name.*got 3"),
    ("task prompt", lambda _: Task("a", "a.{split}", prompt="hi"), OptionError, "prompt.*'hi'"),
    ("task choice", lambda _: Task("a", "a.{split}", choices=("A",)), OptionError, r"\('A',\)"),
    ("task choices text", lambda _: Task("a", "a.{split}", choices="AB"), OptionError, "'AB'"),
    ("task source returns none", rows_from(lambda s: None), DataError, "'mine'.*None"),
    ("task row", rows_from(lambda s: [{"question": "x"}]), DataError, "'mine'.*row 0"),
    ("task row text", rows_from(lambda s: ["x"]), DataError, "'mine'.*row 0.*'x'"),
    ("task registered", lambda _: register_task("x"), OptionError, "Task.*'x'"),
    ("no file", lambda _: read_jsonl("/none.jsonl"), DataError, "'/none.jsonl'"),
    ("file none", lambda _: read_jsonl(None), DataError, "path.*NoneType"),
    ("template none", fill(None), OptionError, "prompt.*None"),
    ("template open", fill("{question"), OptionError, r"prompt.*'\{question'"),
    ("template without names", fill("{} {}"), OptionError, r"name.*'\{\} \{\}'"),
    ("template field", fill("{passage}"), DataError, r"\{passage\}.*'question'"),
    ("template attribute", fill("{question.foo}"), DataError, r"\{question\.foo\}.*foo"),
    ("template format", fill("{question:d}"), DataError, r"\{question:d\}.*'d'"),
)
def test_parts(act, error, message):
    model, tasks = tiny_llama(), registered_tasks()
    before = snapshot(model)
    assert_raises(error, message, act, model)
    assert snapshot(model) == before
    assert registered_tasks() == tasks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subsample_size": 0, "n_eigenvalues": 1}, "n_eigenvalues <= subsample_size"),
        ({"subsample_size": 2, "n_eigenvalues": 3}, "n_eigenvalues <= subsample_size"),
        ({"subsample_size": 2, "n_eigenvalues": 1, "backend": "x"}, "backend.*'x'"),
    ],
)
@pytest.mark.skipif(not HAS_ELLA, reason="of laplace-torch 0.3")
def test_ella(options, message):
    model = letter_head()
    before = snapshot(model)
    options = {"hessian_structure": "gp", "functional_approximation": "nystrom", **options}
    assert_raises(ValueError, message, lambda: laplace_llm.Laplace(model, **options))
    assert snapshot(model) == before
