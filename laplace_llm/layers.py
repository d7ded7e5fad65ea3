"""PEFT's layers: which ones a model has, of which methods, and which of them are supported."""

from __future__ import annotations

from collections.abc import Iterator

from peft.tuners.lora.layer import LoraLayer
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from laplace_llm.errors import UnsupportedLayerError

# PEFT containers that read the weights of lora_A and lora_B without calling the modules.
_WEIGHTS_READ_DIRECTLY = {"lora.ParamWrapper", "lora.MultiheadAttention"}


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Yield the LoRA layers and their names.

    Raises
    ------
    UnsupportedLayerError
        At a layer of another method.
    """
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module
        elif isinstance(module, BaseTunerLayer) and not isinstance(module, TrainableTokensLayer):
            raise UnsupportedLayerError(
                f"Layer {name!r} is a {type(module).__module__}.{type(module).__name__}. Only LoRA "
                "adapters are supported; other PEFT methods are not."
            )


def other_methods(model: nn.Module) -> str:
    """Name the PEFT methods that leave no layers behind, such as prompt tuning."""
    configs = [c for m in model.modules() for c in getattr(m, "peft_config", {}).values()]
    kinds = sorted({str(getattr(config.peft_type, "value", "")) for config in configs} - {"LORA"})
    return f": its adapter is {', '.join(kinds)}, and only LoRA is supported" if kinds else ""


def adapters_of(layer: LoraLayer) -> list[str]:
    """Return the names of the adapters that a layer has."""
    return sorted({key for part in ("lora_A", "lora_embedding_A") for key in getattr(layer, part)})


def check_supported(name: str, layer: LoraLayer, adapter: str) -> None:
    """Refuse by name whatever is not ``x -> B(A(x))`` in a form that can be tapped."""
    # "lora.Linear", "adalora.SVDLinear"
    kind = f"{type(layer).__module__.split('.')[2]}.{type(layer).__name__}"
    variant = getattr(layer, "lora_variant", {}).get(adapter)  # since PEFT 0.16
    dora = adapter in (layer.lora_magnitude_vector or {})
    embedded = adapter in layer.lora_embedding_A
    reason = None
    if kind in _WEIGHTS_READ_DIRECTLY or not (embedded or adapter in layer.lora_A):
        reason = f"its container {kind} is not supported, which uses lora_A as no module"
    elif variant is not None and "Dora" not in type(variant).__name__:
        reason = f"its LoRA variant {type(variant).__name__} is not supported"
    elif embedded:
        reason = f"DoRA is not supported in {kind}" if dora else None
    else:
        A, B = layer.lora_A[adapter], layer.lora_B[adapter]
        kinds = {type(A), type(B)}
        if kinds not in ({nn.Linear}, {nn.Conv1d}, {nn.Conv2d}):
            names = " and ".join(sorted(each.__name__ for each in kinds))
            reason = f"in its container {kind} the factors are {names}, which is not supported"
        elif nn.Linear not in kinds and (A.groups, B.groups) != (1, 1):
            reason = "grouped convolutions are not supported"
        elif nn.Linear not in kinds and dora:
            reason = f"DoRA is not supported in {kind}"
    if reason is not None:
        raise UnsupportedLayerError(
            f"Cannot put a posterior over adapter {adapter!r} in layer {name!r}: {reason}. "
            "Leave this layer out of LoraConfig(target_modules=...)."
        )
