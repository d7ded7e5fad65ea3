"""Which tensors are LoRA's: PEFT's types in, a list of `LoraTensor` out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from laplace_llm.errors import AdapterError, OptionError, UnsupportedLayerError

Sides = Literal["AB", "B"]

# PEFT containers that read the weights of lora_A and lora_B without calling the modules.
_WEIGHTS_READ_DIRECTLY = {"ParamWrapper", "MultiheadAttention"}


@dataclass(frozen=True, eq=False)
class LoraTensor:
    """One LoRA weight and the linear map it belongs to.

    Attributes
    ----------
    name : str
        The parameter's qualified name in the model.
    module : torch.nn.Linear
        ``lora_A[adapter]`` of weight (r, d_in), or ``lora_B[adapter]`` of weight (d_out, r).
    layer : torch.nn.Module
        PEFT's layer around it.
    side : {'A', 'B'}
        Which of the two it is.
    """

    name: str
    module: nn.Linear
    layer: nn.Module
    side: Literal["A", "B"]

    @property
    def weight(self) -> nn.Parameter:
        """The parameter itself, of shape (out, in)."""
        return cast(nn.Parameter, self.module.weight)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        return (self.weight.shape[0], self.weight.shape[1])


def resolve_adapter(model: nn.Module, adapter: str | None = None) -> str:
    """Return the name of the adapter that a posterior is to be put over.

    Parameters
    ----------
    model : torch.nn.Module
        Any module with PEFT LoRA layers somewhere inside.
    adapter : str, optional
        The adapter asked for; None for the active one.

    Returns
    -------
    adapter : str

    Raises
    ------
    AdapterError
        If there is no LoRA layer, the adapter is unknown, or it takes no part in the forward
        pass because it is inactive, merged or disabled.
    UnsupportedLayerError
        If the model carries an adapter of another PEFT method.
    """
    layers = dict(_lora_layers(model))
    known = sorted({name for layer in layers.values() for name in _adapters_of(layer)})
    if not known:
        raise AdapterError(
            f"Expected a model with PEFT LoRA layers, but {type(model).__name__} has none. "
            "Wrap it with peft.get_peft_model(model, LoraConfig(...)) first."
        )
    active = {name: None for layer in layers.values() for name in layer.active_adapters}
    if adapter is None:
        if len(active) != 1:
            raise AdapterError(
                f"Expected one active adapter, but {list(active)} are active. "
                "Choose one with adapter=..."
            )
        adapter = next(iter(active))
    if adapter not in known:
        raise AdapterError(
            f"Unknown adapter {adapter!r}: the model has LoRA tensors of {known}. "
            "Pass one of these names as adapter=..."
        )
    for name, layer in layers.items():
        if adapter not in _adapters_of(layer):
            continue
        if layer.disable_adapters:
            raise AdapterError(
                f"Adapter {adapter!r} is disabled in {name!r}, so its weights take no part in the "
                "forward pass. Enable it again (leave `disable_adapter()`)."
            )
        if layer.merged:
            raise AdapterError(
                f"Adapter(s) {layer.merged_adapters} are merged into the base weights of {name!r}, "
                "so the LoRA tensors are not called. Call model.unmerge_adapter() first."
            )
        if adapter not in layer.active_adapters:
            raise AdapterError(
                f"Adapter {adapter!r} is not active (active: {list(active)}), so its weights take "
                f"no part in the forward pass. Call model.set_adapter({adapter!r}) first."
            )
    return adapter


def find_lora_tensors(
    model: nn.Module, adapter: str | None = None, sides: Sides = "AB"
) -> list[LoraTensor]:
    """List the LoRA tensors of one adapter, in the order of ``model.parameters()``.

    Tensors are found through PEFT's `LoraLayer`, never by their names or ``requires_grad``
    (PEFT loads adapters frozen).

    Parameters
    ----------
    model : torch.nn.Module
        Any module with PEFT LoRA layers somewhere inside.
    adapter : str, optional
        Adapter's name; None for the active one.
    sides : {'AB', 'B'}, default='AB'
        All tensors, or each layer's ``lora_B`` alone.

    Returns
    -------
    tensors : list[LoraTensor]

    Raises
    ------
    OptionError
        If `sides` is neither.
    AdapterError
        See `resolve_adapter`.
    UnsupportedLayerError
        If a layer of this adapter is not a plain LoRA around a linear map; named in the message.
    """
    if sides not in get_args(Sides):
        raise OptionError(f"Expected tensors='AB' or tensors='B', but got {sides!r}.")
    adapter = resolve_adapter(model, adapter)
    found: dict[nn.Parameter, tuple[nn.Linear, nn.Module, Literal["A", "B"]]] = {}
    for name, layer in _lora_layers(model):
        if adapter in _adapters_of(layer):
            _check_supported(name, layer, adapter)
            found[layer.lora_A[adapter].weight] = (layer.lora_A[adapter], layer, "A")
            found[layer.lora_B[adapter].weight] = (layer.lora_B[adapter], layer, "B")
    return [
        LoraTensor(name, *found[parameter])
        for name, parameter in model.named_parameters()
        if parameter in found and found[parameter][2] in sides
    ]


def lora_dtype(tensors: list[LoraTensor]) -> torch.dtype:
    """Return the adapters' common precision, or float32 where that is lower."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.weight.dtype)
    return dtype


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module
        elif isinstance(module, BaseTunerLayer):
            raise UnsupportedLayerError(
                f"Layer {name!r} is a {type(module).__module__}.{type(module).__name__}. Only LoRA "
                "adapters are supported; other PEFT methods are not."
            )


def _adapters_of(layer: LoraLayer) -> list[str]:
    return sorted({key for part in ("lora_A", "lora_embedding_A") for key in getattr(layer, part)})


def _check_supported(name: str, layer: LoraLayer, adapter: str) -> None:
    """Refuse by name whatever is not ``x -> B(A(x))`` with A and B plain linear maps."""
    kind = type(layer).__name__
    reason = None
    if kind in _WEIGHTS_READ_DIRECTLY or adapter not in layer.lora_A:
        reason = f"its container lora.{kind} is not supported yet, only linear layers are"
    elif adapter in getattr(layer, "lora_variant", {}):
        variant = type(layer.lora_variant[adapter]).__name__
        reason = f"its LoRA variant {variant} (DoRA and others) is not supported yet"
    elif layer.lora_bias.get(adapter, False):
        reason = "lora_bias=True is not supported yet"
    else:
        for part in (layer.lora_A[adapter], layer.lora_B[adapter]):
            if type(part) is not nn.Linear:
                reason = (
                    f"in its container lora.{kind} the factors are {type(part).__name__}, and only "
                    "torch.nn.Linear is supported yet"
                )
    if reason is not None:
        raise UnsupportedLayerError(
            f"Cannot put a posterior over adapter {adapter!r} in layer {name!r}: {reason}. "
            "Leave this layer out of LoraConfig(target_modules=...)."
        )
