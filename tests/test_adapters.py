"""Which tensors are LoRA's, and which adapters are refused."""

import warnings
from collections.abc import Callable

import pytest
import torch
from laplace import Laplace
from models import (
    bruteforce_jacobians,
    explicit_ggn,
    letter_batch,
    letter_head,
    tied_lm_head,
    tiny_bert_classifier,
    tiny_conv,
    tiny_llama,
    tiny_mlp,
)
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from torch import nn

from laplace_llm import LaplaceLLMError
from laplace_llm.adapters import find_lora_tensors, lora_dtype, resolve_adapter
from laplace_llm.errors import AdapterError, UnsupportedLayerError


def names(model: nn.Module, adapter: str | None = None) -> list[str]:
    return [tensor.name for tensor in find_lora_tensors(model, adapter)]


def with_second_adapter() -> PeftModel:
    model = tiny_llama()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["o_proj", "q_proj"]))
    return model


# What is found ------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [tiny_llama, tiny_bert_classifier, tiny_mlp])
def test_order_is_that_of_the_parameters(build):
    model = build()
    found = find_lora_tensors(model)
    weights = {tensor.weight for tensor in found}
    in_order = [(name, p) for name, p in model.named_parameters() if p in weights]
    assert [tensor.name for tensor in found] == [name for name, _ in in_order]
    assert all(tensor.weight is p for tensor, (_, p) in zip(found, in_order, strict=True))
    assert len(found) == 2 * sum(hasattr(m, "lora_A") for m in model.modules())


def test_each_tensor_knows_its_module_side_and_shape():
    model = tiny_llama(rank=3)
    modules = dict(model.named_modules())
    for tensor in find_lora_tensors(model):
        assert modules[tensor.name.removesuffix(".weight")] is tensor.module
        assert tensor.role == ("A" if ".lora_A." in tensor.name else "B")
        assert tensor.shape == tuple(tensor.weight.shape)
        assert tensor.shape[0 if tensor.role == "A" else 1] == 3


def test_only_peft_types_count_not_names():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_mlp()
            self.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2)})
            self.lora_head = nn.Linear(3, 3)

    assert len(find_lora_tensors(Named())) == 4
    assert all(name.startswith("inner.") for name in names(Named()))


def test_a_model_whose_modules_are_only_called_lora_has_none():
    model = nn.ModuleDict({"lora_A": nn.Linear(4, 2), "lora_B": nn.Linear(2, 4)})
    with pytest.raises(AdapterError, match="ModuleDict has none"):
        find_lora_tensors(model)


def test_requires_grad_does_not_matter():
    model = tiny_llama()
    expected = names(model)
    model.requires_grad_(False)
    assert names(model) == expected
    model.requires_grad_(True)
    assert names(model) == expected


def test_trained_classifier_head_is_left_out():
    model = tiny_bert_classifier()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("modules_to_save" in name for name in trainable)
    assert set(names(model)) == {name for name in trainable if "modules_to_save" not in name}


def test_rank_pattern_gives_each_layer_its_rank():
    model = tiny_llama(rank=3, rank_pattern={"v_proj": 5})
    for tensor in find_lora_tensors(model):
        rank = 5 if "v_proj" in tensor.name else 3
        assert tensor.shape[0 if tensor.role == "A" else 1] == rank


@pytest.mark.parametrize(
    ("adapters", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_precision_is_float32_or_better(adapters, expected):
    assert lora_dtype(find_lora_tensors(tiny_llama(dtype=adapters))) == expected


# Frozen and loaded adapters -----------------------------------------------------------------------


def test_adapter_loaded_for_inference_works_end_to_end(tmp_path):
    trained = tiny_llama(init_lora_weights=False)
    trained.save_pretrained(tmp_path)
    base = trained.unload()
    loaded = PeftModel.from_pretrained(base, str(tmp_path), autocast_adapter_dtype=False).double()
    assert not any(p.requires_grad for p in loaded.parameters())

    la = Laplace(letter_head(loaded), "classification", "lora", "kron")
    la.fit([letter_batch(6)])
    la.optimize_prior_precision(method="marglik", n_steps=3)
    reference = Laplace(letter_head(tiny_llama()), "classification", "lora", "kron")
    reference.fit([letter_batch(6)])
    reference.prior_precision = la.prior_precision
    probabilities = la(letter_batch(4, seed=1))
    torch.testing.assert_close(probabilities, reference(letter_batch(4, seed=1)))
    assert not any(p.requires_grad for p in loaded.parameters())


# Several adapters ---------------------------------------------------------------------------------


def test_the_active_adapter_is_the_default():
    model = with_second_adapter()
    assert resolve_adapter(model) == "default"
    assert all(".default." in name for name in names(model))
    model.set_adapter("second")
    assert resolve_adapter(model) == "second"
    assert all(".second." in name for name in names(model))
    assert any("o_proj" in name for name in names(model))


def test_an_adapter_can_be_chosen_where_several_are_active():
    model = with_second_adapter()
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(AdapterError, match=r"'default', 'second'.*adapter="):
        find_lora_tensors(model)
    assert all(".second." in name for name in names(model, "second"))
    la = Laplace(letter_head(model), "classification", "lora", "kron", adapter="second")
    assert la.adapter == "second"
    assert [tensor.name for tensor in la.tensors] == names(la.model, "second")
    la.fit([letter_batch(5)])
    assert la(letter_batch(2)).shape == (2, 3)


@pytest.mark.parametrize("adapter", ["default", "second"])
def test_the_curvature_is_the_chosen_adapters_where_both_are_active(adapter):
    model = with_second_adapter().double()
    model.base_model.set_adapter(["default", "second"])
    head, batch = letter_head(model), letter_batch(5)
    la = Laplace(head, "classification", "lora", "full", adapter=adapter)
    la.fit([batch])
    jacobians = bruteforce_jacobians(head, batch, find_lora_tensors(head, adapter))
    torch.testing.assert_close(la.H, explicit_ggn(jacobians, head(batch).detach()))


def test_inactive_adapter_is_refused():
    with pytest.raises(AdapterError, match=r"'second' is not active.*set_adapter\('second'\)"):
        find_lora_tensors(with_second_adapter(), "second")


def test_unknown_adapter_is_refused_and_the_known_are_named():
    with pytest.raises(AdapterError, match=r"Unknown adapter 'third'.*\['default', 'second'\]"):
        find_lora_tensors(with_second_adapter(), "third")


def test_merged_adapter_is_refused_until_unmerged():
    model = tiny_llama()
    model.merge_adapter()
    with pytest.raises(AdapterError, match=r"'default'\] are merged.*q_proj.*unmerge_adapter"):
        find_lora_tensors(model)
    model.unmerge_adapter()
    assert len(find_lora_tensors(model)) == 8


def test_merged_and_unloaded_model_has_no_lora():
    with pytest.raises(AdapterError, match="LlamaForCausalLM has none"):
        find_lora_tensors(tiny_llama().merge_and_unload())


def test_disabled_adapter_is_refused_until_enabled():
    model = tiny_llama()
    with model.disable_adapter(), pytest.raises(AdapterError, match="'default' is disabled"):
        find_lora_tensors(model)
    assert len(find_lora_tensors(model)) == 8


def test_each_adapter_has_its_own_posterior():
    model = with_second_adapter().double()
    head, batch, x = letter_head(model), letter_batch(5), letter_batch(3, seed=1)
    posteriors = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        posteriors[name] = Laplace(head, "classification", "lora", "full")
        posteriors[name].fit([batch])
    for name in ("default", "second"):
        model.set_adapter(name)
        la = posteriors[name]
        jacobians = bruteforce_jacobians(head, x, find_lora_tensors(head, name))
        expected = jacobians @ torch.linalg.inv(la.posterior_precision) @ jacobians.mT
        torch.testing.assert_close(la._glm_predictive_distribution(x)[1], expected)


def test_switching_the_adapter_between_fit_and_predict_is_an_error():
    model = with_second_adapter()
    la = Laplace(letter_head(model), "classification", "lora", "kron")
    la.fit([letter_batch(5)])
    model.set_adapter("second")
    for action in (
        lambda: la(letter_batch(2)),
        lambda: la(letter_batch(2), pred_type="nn", link_approx="mc"),
        lambda: la.optimize_prior_precision(),
        lambda: la.optimize_prior_precision(val_loader=[letter_batch(2)]),
        lambda: la.fit([letter_batch(2)], override=False),
        lambda: la.fit([letter_batch(2)]),
    ):
        with pytest.raises(
            AdapterError, match=r"'default' is not active.*set_adapter\('default'\)"
        ):
            action()
    model.set_adapter("default")
    assert la(letter_batch(2)).shape == (2, 3)


def test_another_adapter_beside_it_is_an_error_until_it_is_fitted_anew():
    model = with_second_adapter().double()
    la = Laplace(letter_head(model), "classification", "lora", "kron")
    la.fit([letter_batch(5)])
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(AdapterError, match=r"\['default'\] to be active.*\['default', 'second'\]"):
        la(letter_batch(2))
    la.fit([letter_batch(5)])
    assert la(letter_batch(2)).shape == (2, 3)


@pytest.mark.parametrize("change", ["merge_adapter", "disable"])
def test_merging_or_disabling_after_fit_is_an_error(change):
    model = tiny_llama()
    la = Laplace(letter_head(model), "classification", "lora", "kron")
    la.fit([letter_batch(5)])
    if change == "merge_adapter":
        model.merge_adapter()
        with pytest.raises(AdapterError, match="are merged"):
            la(letter_batch(2))
    else:
        with model.disable_adapter(), pytest.raises(AdapterError, match="is disabled"):
            la(letter_batch(2))


# Around the adapter -------------------------------------------------------------------------------


def test_lora_dropout_is_inactive():
    plain, dropping = tiny_llama(), tiny_llama(lora_dropout=0.5)
    dropping.load_state_dict(plain.state_dict())
    dropping.train()
    posteriors = []
    for model in (plain, dropping):
        la = Laplace(letter_head(model), "classification", "lora", "kron")
        la.fit([letter_batch(5)])
        posteriors.append(la)
    x = letter_batch(3, seed=1)
    torch.testing.assert_close(posteriors[1](x), posteriors[0](x), rtol=1e-12, atol=1e-12)
    assert dropping.training


def whole(model: nn.Module) -> nn.Module:
    return torch.compile(letter_head(model), backend="eager")


def adapted_inside(model: nn.Module) -> nn.Module:
    return letter_head(torch.compile(model, backend="eager"))


def layer_by_layer(model: nn.Module) -> nn.Module:
    for layer in model.base_model.model.model.layers:
        layer.compile(backend="eager")
    return letter_head(model)


def layers_wrapped(model: nn.Module) -> nn.Module:
    layers = model.base_model.model.model.layers
    for index, layer in enumerate(layers):
        layers[index] = torch.compile(layer, backend="eager")
    return letter_head(model)


@pytest.mark.parametrize("wrap", [whole, adapted_inside, layer_by_layer, layers_wrapped])
def test_compiled_models_give_what_they_give_uncompiled(wrap):
    reference = Laplace(letter_head(tiny_llama()), "classification", "lora", "kron")
    model = wrap(tiny_llama())
    x = letter_batch(3, seed=1)
    with warnings.catch_warnings():  # torch's own, on what it compiles
        warnings.simplefilter("ignore")
        model(x)
    la = Laplace(model, "classification", "lora", "kron")
    for each in (reference, la):
        each.fit([letter_batch(5)])
    torch.testing.assert_close(la(x), reference(x), rtol=1e-10, atol=1e-10)
    for each in (reference, la):
        each.optimize_prior_precision()
    torch.testing.assert_close(la.prior_precision, reference.prior_precision)
    samples = la(x, pred_type="nn", link_approx="mc", n_samples=2)
    assert samples.shape == (3, 3)


# Kinds that are not supported ---------------------------------------------------------------------


def mlp_with(config: PeftConfig) -> PeftModel:
    """Return the tiny MLP with an adapter of another method."""
    return get_peft_model(tiny_mlp().unload().float(), config)


class Experts(nn.Module):
    """A mixture of experts, whose weights are parameters of three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 4, 3))

    def forward(self, x):
        return torch.einsum("bi,eio->bo", x, self.weight)


class MoE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()

    def forward(self, x):
        return self.experts(x)


def moe_model() -> PeftModel:
    return get_peft_model(MoE(), LoraConfig(r=2, target_parameters=["experts.weight"]))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class Volume(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 2, 3)

    def forward(self, x):
        return self.conv(x)


BOTH = ["first", "second"]


@pytest.mark.parametrize(
    ("build", "layer", "kind"),
    [
        pytest.param(
            lambda: tiny_llama(targets=("embed_tokens", "q_proj"), use_dora=True),
            "embed_tokens",
            "DoRA is not supported in lora.Embedding",
            id="dora embedding",
        ),
        pytest.param(
            lambda: tiny_conv(2, use_dora=True), "conv", "DoRA .* lora.Conv2d", id="dora conv2d"
        ),
        pytest.param(
            lambda: get_peft_model(Volume(), LoraConfig(r=2, target_modules=["conv"])),
            "conv",
            "lora.Conv3d",
            id="conv3d",
        ),
        pytest.param(
            lambda: get_peft_model(Attention(), LoraConfig(r=2, target_modules=["attention"])),
            "attention",
            "lora.MultiheadAttention",
            id="MultiheadAttention",
        ),
        pytest.param(moe_model, "experts", "lora.ParamWrapper", id="target_parameters"),
        pytest.param(
            lambda: mlp_with(IA3Config(target_modules=BOTH, feedforward_modules=["second"])),
            "first",
            "ia3",
            id="ia3",
        ),
        pytest.param(
            lambda: mlp_with(AdaLoraConfig(target_modules=BOTH, total_step=10, init_r=2)),
            "first",
            "adalora",
            id="adalora",
        ),
        pytest.param(
            lambda: mlp_with(VeraConfig(target_modules=["second"], r=2)),
            "second",
            "vera",
            id="vera",
        ),
        pytest.param(
            lambda: mlp_with(LoHaConfig(target_modules=BOTH, r=2)), "first", "loha", id="loha"
        ),
        pytest.param(
            lambda: mlp_with(OFTConfig(target_modules=BOTH, oft_block_size=2)),
            "first",
            "oft",
            id="oft",
        ),
        pytest.param(
            lambda: tiny_llama(alora_invocation_tokens=[1, 2]),
            "q_proj",
            "ALoraLinearVariant",
            id="alora",
        ),
        pytest.param(
            lambda: tied_lm_head(ensure_weight_tying=True, dtype=torch.float32),
            "lm_head",
            "ensure_weight_tying",
            id="ensure_weight_tying",
        ),
    ],
)
def test_unsupported_kind_is_refused_by_name(build: Callable[[], PeftModel], layer, kind):
    model = build()
    with pytest.raises(UnsupportedLayerError, match=f"(?s){layer}.*{kind}") as error:
        find_lora_tensors(model)
    assert isinstance(error.value, LaplaceLLMError)
    assert isinstance(error.value, ValueError)


def test_a_method_without_layers_is_refused_by_name():
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = get_peft_model(tiny_llama().unload(), config)
    with pytest.raises(AdapterError, match="PROMPT_TUNING, and only LoRA is supported"):
        find_lora_tensors(model)


def test_trainable_tokens_are_left_out_like_modules_to_save():
    model = tiny_llama(trainable_token_indices=[3, 4])
    assert any("trainable_tokens" in name for name, _ in model.named_parameters())
    assert names(model) == names(tiny_llama())
    la = Laplace(letter_head(model), "classification", "lora", "kron")
    la.fit([letter_batch(5)])
    assert la(letter_batch(2)).shape == (2, 3)


def test_unsupported_layer_of_another_adapter_does_not_matter():
    model = tiny_llama()
    config = LoraConfig(
        r=2, target_modules=["q_proj"], alora_invocation_tokens=[1], task_type="CAUSAL_LM"
    )
    model.add_adapter("alora", config)
    assert len(find_lora_tensors(model, "default")) == 8
    model.set_adapter("alora")
    with pytest.raises(UnsupportedLayerError, match="q_proj"):
        find_lora_tensors(model)


@pytest.mark.parametrize(
    "kwargs", [{"use_rslora": True}, {"init_lora_weights": "gaussian"}], ids=["rslora", "gaussian"]
)
def test_variants_that_are_plain_lora_are_found(kwargs):
    assert len(find_lora_tensors(tiny_llama(**kwargs))) == 8
