"""What adapters sit on: low precision, quantised bases, checkpointing, several devices."""

from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from laplace import Laplace
from models import (
    CAUSAL_ARCHITECTURES,
    LLAMA_SHAPE,
    bruteforce_jacobians,
    letter_batch,
    letter_head,
    packed_batch,
    scoring_head,
    snapshot,
    tiny,
    tiny_bert_classifier,
    tiny_llama,
)
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from laplace_llm import SequenceClassificationHead, moments
from laplace_llm.adapters import find_lora_tensors
from laplace_llm.errors import AdapterError, TapError
from laplace_llm.kernel import training_space
from laplace_llm.sketch import test_matrix

STRUCTURES = ["kron", "diag", "full", "lowrank"]
each_structure = pytest.mark.parametrize("structure", STRUCTURES)
TRAIN, TEST = letter_batch(8, seed=1), letter_batch(5)


def fitted(head: nn.Module, structure: str = "kron", train: Any = TRAIN, **kwargs: Any) -> Any:
    la = Laplace(head, "classification", "lora", structure, **kwargs)
    la.fit([train])
    return la


def results(head: nn.Module, structure: str = "kron") -> dict[str, Tensor]:
    """Return what there is to know of a fitted posterior, in float64."""
    la = fitted(head, structure)
    mean, covariance = la._glm_predictive_distribution(TEST)
    values = {
        "mean": mean,
        "covariance": covariance,
        "probabilities": la(TEST),
        "evidence": la.log_marginal_likelihood(),
    }
    return {name: value.detach().double() for name, value in values.items()}


def assert_close_to_the_largest(
    actual: dict[str, Tensor], expected: dict[str, Tensor], allowed: float
) -> None:
    """Compare with an error that is allowed relative to the largest entry."""
    for name, value in expected.items():
        error = float((actual[name] - value).abs().max() / value.abs().max())
        assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"


def jacobians(head: nn.Module, batch: Any = TEST) -> Tensor:
    la = Laplace(head, "classification", "lora", "kron")
    with la._borrowed():
        return la._streaming.jacobians(batch)[0]


def assert_exact(head: nn.Module, batch: Any = TEST) -> None:
    expected = bruteforce_jacobians(head, batch, find_lora_tensors(head))
    actual = jacobians(head, batch)
    torch.testing.assert_close(actual, expected.to(actual))
    assert bool((expected.abs().sum((0, 1)) > 0).float().mean() > 0.9)


# Precision ----------------------------------------------------------------------------------------

LORA = {"r": 3, "init_lora_weights": False, "task_type": "CAUSAL_LM"}


def adapted(base: nn.Module, targets: Any = "all-linear", autocast: bool = True) -> PeftModel:
    """Return the base with random LoRA, in float32 if `autocast`, else in the base's precision."""
    config = LoraConfig(target_modules=targets, **LORA)
    return get_peft_model(base, config, autocast_adapter_dtype=autocast).eval()


@each_structure
@pytest.mark.parametrize("adapters", ["float32", "same"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_of_low_precision_is_as_good_as_its_precision(dtype, adapters, structure):
    """Within 16 units of the base's precision, relative to the largest entry; measured: 9."""
    base = LlamaForCausalLM(LlamaConfig(**LLAMA_SHAPE)).to(dtype)
    targets = "all-linear" if structure == "kron" else ["v_proj"]
    model = adapted(base, targets, autocast=adapters == "float32")
    assert find_lora_tensors(model)[0].weight.dtype == (
        torch.float32 if adapters == "float32" else dtype
    )
    head, exact = letter_head(model), letter_head(deepcopy(model).double())
    assert fitted(head, structure)._dtype == torch.float32
    allowed = 16 * torch.finfo(dtype).eps
    assert_close_to_the_largest(results(head, structure), results(exact, structure), allowed)


# Checkpointing and attention ----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant, training):
    expected = results(letter_head())
    model = tiny_llama()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train(training)
    head = letter_head(model)
    before = snapshot(head)
    torch.testing.assert_close(results(head), expected)
    assert snapshot(head) == before
    assert_exact(letter_head(model.eval()))


def checkpointed(reentrant: bool) -> nn.Module:
    """Return a head whose layers are checkpointed in eval mode too."""
    model = tiny_llama()
    model.enable_input_require_grads()

    def run(forward: Any, hidden: Tensor, **kwargs: Any) -> Tensor:
        return checkpoint(partial(forward, **kwargs), hidden, use_reentrant=reentrant)

    for layer in model.get_base_model().model.layers:
        layer.forward = partial(run, layer.forward)
    return letter_head(model)


def test_layers_that_are_always_checkpointed_are_exact():
    assert_exact(checkpointed(reentrant=False))
    torch.testing.assert_close(results(checkpointed(reentrant=False)), results(letter_head()))


def test_layers_that_run_without_gradients_are_refused():
    head = checkpointed(reentrant=True)
    with pytest.raises(TapError, match=r"q_proj.lora_A.*with gradients.*use_reentrant=False"):
        fitted(head)


@pytest.mark.parametrize("build", [letter_head, lambda m: scoring_head(m)])
def test_eager_attention_equals_sdpa(build):
    batch = packed_batch(4) if build is not letter_head else TEST
    found = []
    for attention in ("sdpa", "eager"):
        model = tiny_llama()
        model.get_base_model().set_attn_implementation(attention)
        head = build(model)
        assert_exact(head, batch)
        found.append(fitted(head, train=batch)(batch))
    # Eager attention rounds its softmax to float32.
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


# Quantised bases ----------------------------------------------------------------------------------


def quantisers() -> dict[str, Any]:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
    from transformers import BitsAndBytesConfig, TorchAoConfig

    four_bits = partial(BitsAndBytesConfig, load_in_4bit=True)
    return {
        "int8": BitsAndBytesConfig(load_in_8bit=True),
        "nf4": four_bits(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        "fp4": four_bits(bnb_4bit_quant_type="fp4"),
        "nf4, bf16": four_bits(bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16),
        "torchao int8": TorchAoConfig(Int8WeightOnlyConfig()),
        "torchao int4": TorchAoConfig(IntxWeightOnlyConfig(torch.int4, PerGroup(32))),
    }


# What float32 computation on the same, dequantised weights differs by, relative to the largest
# entry: rounding; where activations are cast to bfloat16, 16 units of that. LLM.int8 also quantises
# activations, to 127 levels.
QUANTISED = {
    "int8": 0.05,
    "nf4": 1e-4,
    "fp4": 1e-4,
    "nf4, bf16": 16 * torch.finfo(torch.bfloat16).eps,
    "torchao int8": 1e-4,
    "torchao int4": 1e-4,
}
each_quantised = pytest.mark.parametrize("name", QUANTISED)
quantised_warnings = pytest.mark.filterwarnings(
    "ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning"  # by PEFT's preparation
)
SHAPE = LLAMA_SHAPE | {"hidden_size": 64, "intermediate_size": 64, "initializer_range": 0.1}
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a saved base, which quantised ones are loaded from."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(folder)
    return folder


def quantised(name: str, folder: Path) -> PeftModel:
    """Return LoRA on a base that transformers quantised while loading it."""
    pytest.importorskip("torchao" if "torchao" in name else "bitsandbytes")
    dtype = torch.bfloat16 if "bf16" in name else torch.float32
    base = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=quantisers()[name]
    )
    if "torchao" not in name:
        base = prepare_model_for_kbit_training(base)
    torch.manual_seed(1)
    return adapted(base, TARGETS)


def dequantised(model: PeftModel) -> PeftModel:
    """Return the same model with dense weights, each what its quantised one stands for."""
    torch.manual_seed(1)
    twin = adapted(LlamaForCausalLM(LlamaConfig(**SHAPE)), TARGETS)
    for name, module in model.named_modules():
        if "weight" in module._parameters:
            weight = module.weight
            if hasattr(weight, "dequantize") and "torchao" in type(weight).__module__:
                weight = weight.dequantize()
            elif "bitsandbytes" in type(weight).__module__:
                weight = dequantize_bnb_weight(weight, getattr(module, "state", None))
            twin.get_submodule(name).weight.data = weight.detach().float().clone()
    return twin


def is_quantised(model: PeftModel) -> bool:
    layer = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    kind = type(layer).__module__ + type(layer.weight).__module__
    return "bitsandbytes" in kind or "torchao" in kind


@quantised_warnings
@each_quantised
def test_jacobians_on_a_quantised_base_are_those_of_a_backward_pass_through_it(name, saved):
    model = quantised(name, saved)
    assert is_quantised(model)
    assert_exact(letter_head(model))


@quantised_warnings
@pytest.mark.parametrize("structure", ["kron", "lowrank"])
@each_quantised
def test_a_quantised_base_is_its_dequantised_twin(name, structure, saved):
    model = quantised(name, saved)
    twin = dequantised(model)
    place = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    original = LlamaForCausalLM.from_pretrained(saved).model.layers[0].self_attn.q_proj.weight
    assert (twin.get_parameter(place) - original).abs().max() > 1e-4
    expected = results(letter_head(twin), structure)
    assert_close_to_the_largest(results(letter_head(model), structure), expected, QUANTISED[name])


@quantised_warnings
@each_quantised
def test_a_quantised_base_tunes_and_samples_and_is_left_as_it_was(name, saved):
    head = letter_head(quantised(name, saved))
    head(TEST)  # bitsandbytes moves its state at the first call
    before = None if "torchao" in name else snapshot(head)
    la = fitted(head)
    la.optimize_prior_precision()  # runs the model without its adapter
    la.optimize_prior_precision(method="gridsearch", val_loader=[TEST], grid_size=5)
    probabilities = la(TEST, pred_type="nn", link_approx="mc", n_samples=3)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(5))
    if before is not None:
        assert snapshot(head) == before
    assert is_quantised(head.model)


@quantised_warnings
@each_quantised
def test_last_layer_laplace_works_beside_it(name, saved):
    class Loader(list):
        dataset = range(8)

    head = letter_head(quantised(name, saved))
    la = Laplace(head, "classification", "last_layer", "kron")
    la.fit(Loader([TRAIN]))
    torch.testing.assert_close(la(TEST, link_approx="probit").sum(1), torch.ones(5))


@quantised_warnings
@pytest.mark.parametrize(("name", "bits"), [("int8", 8), ("nf4", 4), ("torchao int8", 8)])
def test_a_quantised_model_counts_as_what_it_takes(name, bits, saved):
    """A slice of a batch is as large as the model's size allows."""
    weight = quantised(name, saved).get_base_model().model.layers[0].mlp.up_proj.weight
    numbers = 64 * 64
    assert numbers * bits // 8 <= moments._bytes(weight) <= numbers * bits // 8 + 8 * 64


# Offloaded layers ---------------------------------------------------------------------------------

PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head")


def dispatched(offloaded: tuple[str, ...], folder: Path, adapted_layers: list[int]) -> PeftModel:
    """Return LoRA on a model of which accelerate keeps some parts on disk between calls."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**LLAMA_SHAPE)).double()
    if offloaded:
        places = {part: "disk" if part in offloaded else "cpu" for part in PARTS}
        places["model.rotary_emb"] = "cpu"
        base = dispatch_model(base, places, main_device="cpu", offload_dir=str(folder))
    torch.manual_seed(1)
    config = LoraConfig(
        target_modules=["q_proj", "v_proj"], layers_to_transform=adapted_layers, **LORA
    )
    model = get_peft_model(base, config, autocast_adapter_dtype=False).eval()
    assert any(p.is_meta for p in model.parameters()) == bool(offloaded)
    return model


OFFLOADED = [("model.layers.1",), ("model.embed_tokens", "model.layers.1", "lm_head")]


@pytest.mark.parametrize("parts", OFFLOADED, ids=["a layer", "a layer, embeddings and lm_head"])
@pytest.mark.parametrize("build", [letter_head, scoring_head])
def test_layers_without_an_adapter_may_be_offloaded(parts, build, tmp_path):
    batch = packed_batch(5) if build is scoring_head else TEST
    expected = fitted(build(dispatched((), tmp_path, [0])), train=batch)
    la = fitted(build(dispatched(parts, tmp_path, [0])), train=batch)
    torch.testing.assert_close(la(batch), expected(batch))
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    options = {"pred_type": "nn", "link_approx": "mc", "n_samples": 2}
    torch.testing.assert_close(
        la(batch, generator=generators[0], **options),
        expected(batch, generator=generators[1], **options),
    )
    la.optimize_prior_precision()
    expected.optimize_prior_precision()
    torch.testing.assert_close(la.prior_precision, expected.prior_precision)
    assert any(p.is_meta for p in la.model.parameters())


@pytest.mark.parametrize("adapter_first", [False, True])
def test_an_offloaded_adapter_is_refused_by_name(adapter_first, tmp_path):
    if adapter_first:
        model = tiny_llama()
        places = {f"base_model.model.{part}": "cpu" for part in (*PARTS, "model.rotary_emb")}
        places["base_model.model.model.layers.1"] = "disk"
        model = dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path))
    else:
        model = dispatched(("model.layers.1",), tmp_path, [0, 1])
    with pytest.raises(AdapterError, match=r"'.*layers\.1.*q_proj.lora_A.* is offloaded"):
        Laplace(letter_head(model), "classification", "lora", "kron")


def test_a_classifier_with_offloaded_embeddings(tmp_path):
    expected = fitted(SequenceClassificationHead(tiny_bert_classifier()))(TEST)
    model = tiny_bert_classifier()
    base = model.get_base_model()
    places = {
        "bert.embeddings": "disk",
        "bert.encoder": "cpu",
        "bert.pooler": "cpu",
        "classifier": "cpu",
    }
    dispatch_model(base, places, main_device="cpu", offload_dir=str(tmp_path))
    assert next(model.parameters()).is_meta
    torch.testing.assert_close(fitted(SequenceClassificationHead(model))(TEST), expected)


# Several devices ----------------------------------------------------------------------------------

aten = torch.ops.aten
DEVICES = ("cpu", "cpu:1")  # fake tensors take any index


class GoodData(TorchDispatchMode):
    """Answer what checks ask of fake tensors: values are finite, labels right, rows padded."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            if args[0].dtype is torch.bool:
                return getattr(args[0], "answer", True)
            return 1.0 if args[0].is_floating_point() else 1
        if func is aten.index.Tensor:  # a boolean mask keeps everything
            chosen = [
                torch.empty(i.numel(), dtype=torch.long, device=i.device)
                if i is not None and i.dtype is torch.bool
                else i
                for i in args[1]
            ]
            args = (args[0], chosen, *args[2:])
        result = func(*args, **kwargs)
        if func in (aten.any.default, aten.any.dim):
            result.answer = False
        if func is aten._to_copy.default and kwargs.get("dtype") is torch.bool:
            result.is_mask = True
        if func is aten.all.default and hasattr(args[0], "is_mask"):
            result.answer = False
        return result


@pytest.fixture
def on_two_devices() -> Iterator[nn.Module]:
    """Return a head on a model with its second layer on a second device, in tensors of no values.

    Operations on tensors of both devices raise, as on two GPUs.
    """
    head = letter_head(tiny(CAUSAL_ARCHITECTURES["llama"], torch.float32, ["v_proj"], rank=2))
    causal = head.model.get_base_model()
    with FakeTensorMode(allow_non_fake_inputs=True), GoodData():
        for part in (*PARTS, "model.rotary_emb", "choice_layer"):
            second = part in ("model.layers.1", "model.norm", "lm_head", "choice_layer")
            top = head if part == "choice_layer" else causal
            module, device = top.get_submodule(part), DEVICES[second]
            for child in module.modules():
                for store in (child._parameters, child._buffers):
                    for key, value in store.items():
                        if value is not None:
                            empty = torch.empty(value.shape, dtype=value.dtype, device=device)
                            is_weight = isinstance(value, nn.Parameter)
                            store[key] = (
                                nn.Parameter(empty, value.requires_grad) if is_weight else empty
                            )
            # What accelerate's device_map puts on every part: it moves the inputs.
            add_hook_to_module(module, AlignDevicesHook(device, io_same_device=False))
        assert {str(p.device) for p in head.parameters()} == set(DEVICES)
        yield head
    test_matrix.cache_clear()


def fake(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.empty(value.shape, dtype=value.dtype) for key, value in batch.items()}


def test_fake_devices_do_not_mix(on_two_devices):
    """Else the tests below would prove nothing."""
    first, *_, last = [tensor.weight for tensor in find_lora_tensors(on_two_devices)]
    assert (str(first.device), str(last.device)) == DEVICES
    with pytest.raises(RuntimeError, match=r"two devices, cpu(:1)? and cpu"):
        torch.cat([first.flatten(), last.flatten()])


@pytest.mark.parametrize(
    ("structure", "rank"),
    [
        ("kron", 2),
        ("diag", None),
        pytest.param("full", None, marks=pytest.mark.slow),
        pytest.param("lowrank", None, marks=pytest.mark.slow),
        pytest.param("ekfac", 2, marks=pytest.mark.slow),
    ],
)
def test_layers_may_be_on_two_devices(on_two_devices, structure, rank):
    la = Laplace(on_two_devices, "classification", "lora", structure, backend_kwargs={"rank": rank})
    train, test = fake(TRAIN), fake(TEST)
    la.fit([train])
    if structure in ("kron", "ekfac"):  # every factor stays with its tensor
        places = [pair.outputs.trace.device for pair in la.H_facs.pairs]
        assert places == [tensor.weight.device for tensor in la.tensors]
        assert {str(place) for place in places} == set(DEVICES)
    values = {
        "mean": la.mean,
        "moments": la._glm_predictive_distribution(test)[1],
        "probabilities": la(test, link_approx="mean_field"),
        "nn": la(test, pred_type="nn", link_approx="mc", n_samples=1),
        "evidence": la.log_marginal_likelihood(),
        "samples": la.sample(2),
        "kernel": training_space(la, [train]).kernel,
    }
    if structure in ("kron", "ekfac", "diag"):
        layerwise = la.moments_grid(test, torch.ones(3), layerwise=True)
        values["layerwise"] = layerwise.covariance
        values["variance"] = la.functional_variance(torch.empty(5, 3, la.n_params))
    assert {name: str(value.device) for name, value in values.items()} == dict.fromkeys(
        values, DEVICES[0]
    )
    la.fit([train], override=False)
    la.load_state_dict(la.state_dict())
