"""Which tensors are LoRA's, and which adapters are refused."""

from collections.abc import Callable

import pytest
import torch
from laplace import Laplace
from models import (
    bruteforce_jacobians,
    explicit_ggn,
    letter_batch,
    letter_head,
    tiny_bert_classifier,
    tiny_llama,
    tiny_mlp,
)
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
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
        assert tensor.side == ("A" if ".lora_A." in tensor.name else "B")
        assert tensor.shape == tuple(tensor.weight.shape)
        assert tensor.shape[0 if tensor.side == "A" else 1] == 3


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
        assert tensor.shape[0 if tensor.side == "A" else 1] == rank


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


# Kinds that are not supported ---------------------------------------------------------------------


def conv_model() -> PeftModel:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3)
            self.out = nn.Linear(8, 3)

        def forward(self, x):
            return self.out(self.conv(x).flatten(1))

    return get_peft_model(Net(), LoraConfig(r=2, target_modules=["conv", "out"]))


def ia3_model() -> PeftModel:
    config = IA3Config(target_modules=["first", "second"], feedforward_modules=["second"])
    return get_peft_model(tiny_mlp().unload(), config)


@pytest.mark.parametrize(
    ("build", "layer", "kind"),
    [
        pytest.param(lambda: tiny_llama(use_dora=True), "q_proj", "Dora", id="dora"),
        pytest.param(lambda: tiny_mlp(lora_bias=True), "first", "lora_bias", id="lora_bias"),
        pytest.param(
            lambda: tiny_llama(targets=("embed_tokens", "q_proj")),
            "embed_tokens",
            "lora.Embedding",
            id="embedding",
        ),
        pytest.param(conv_model, "conv", "lora.Conv2d", id="conv2d"),
        pytest.param(ia3_model, "first", "ia3", id="ia3"),
    ],
)
def test_unsupported_kind_is_refused_by_name(build: Callable[[], PeftModel], layer, kind):
    model = build()
    with pytest.raises(UnsupportedLayerError, match=f"(?s){layer}.*{kind}") as error:
        find_lora_tensors(model)
    assert isinstance(error.value, LaplaceLLMError)
    assert isinstance(error.value, ValueError)


def test_unsupported_layer_of_another_adapter_does_not_matter():
    model = tiny_mlp()
    model.add_adapter("dora", LoraConfig(r=2, target_modules=["first"], use_dora=True))
    assert len(find_lora_tensors(model, "default")) == 4
    model.set_adapter("dora")
    with pytest.raises(UnsupportedLayerError, match="first"):
        find_lora_tensors(model)


@pytest.mark.parametrize(
    "kwargs", [{"use_rslora": True}, {"init_lora_weights": "gaussian"}], ids=["rslora", "gaussian"]
)
def test_variants_that_are_plain_lora_are_found(kwargs):
    assert len(find_lora_tensors(tiny_llama(**kwargs))) == 8
