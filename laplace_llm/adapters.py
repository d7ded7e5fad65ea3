"""Which tensors are LoRA's: PEFT's types in, a list of `LoraTensor` out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from laplace_llm.causal_heads import MultipleChoiceHead
from laplace_llm.errors import AdapterError, OptionError, UnsupportedLayerError
from laplace_llm.heads import check_module, offloaded
from laplace_llm.layers import adapters_of, check_supported, lora_layers, other_methods
from laplace_llm.tensors import (
    BiasTensor,
    ConvTensor,
    EmbeddingTensor,
    LoraTensor,
    MagnitudeTensor,
    OneHotTensor,
)

Sides = Literal["AB", "B"]


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
    check_module(model)
    layers = dict(lora_layers(model))
    known = sorted({name for layer in layers.values() for name in adapters_of(layer)})
    if not known:
        raise AdapterError(
            f"Expected a model with PEFT LoRA layers, but {type(model).__name__} has none"
            f"{other_methods(model)}. Wrap it with peft.get_peft_model(model, LoraConfig(...)) "
            "first."
        )
    active = active_adapters(model)
    if adapter is None:
        if len(active) != 1:
            raise AdapterError(
                f"Expected one active adapter, but {active} are active. Choose one with adapter=..."
            )
        adapter = active[0]
    if adapter not in known:
        raise AdapterError(
            f"Unknown adapter {adapter!r}: the model has LoRA tensors of {known}. "
            "Pass one of these names as adapter=..."
        )
    for name, layer in layers.items():
        if adapter not in adapters_of(layer):
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
                f"Adapter {adapter!r} is not active (active: {active}), so its weights take "
                f"no part in the forward pass. Call model.set_adapter({adapter!r}) first."
            )
    return adapter


def active_adapters(model: nn.Module) -> list[str]:
    """Return the names of the LoRA adapters that take part in the forward pass."""
    layers = [layer for _, layer in lora_layers(model)]
    return list({name: None for layer in layers for name in layer.active_adapters})


def check_active(model: nn.Module, expected: list[str]) -> None:
    """Raise AdapterError unless the adapters that were active in `fit` are the active ones."""
    active = active_adapters(model)
    if active != expected:
        raise AdapterError(
            f"Expected the adapters {expected} to be active, as in fit(), but {active} are. Call "
            "set_adapter(...), or fit again."
        )


def find_lora_tensors(
    model: nn.Module,
    adapter: str | None = None,
    sides: Sides = "AB",
    choice_rows: bool = False,
    include_modules_to_save: bool = False,
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
        All tensors, with LoRA's biases and DoRA's magnitudes, or each layer's ``lora_B`` alone.
    choice_rows : bool, default=False
        Whether tensors of a vocabulary matrix that a `MultipleChoiceHead` reads a few rows of are
        restricted to these.
    include_modules_to_save : bool, default=False
        Whether to list the weights of PEFT's ``modules_to_save`` too.

    Returns
    -------
    tensors : list[LoraTensor]

    Raises
    ------
    OptionError
        If `sides` is neither.
    AdapterError
        See `resolve_adapter`; there are no such tensors; or they are offloaded.
    UnsupportedLayerError
        If a layer of this adapter is not one of the kinds of `laplace_llm.tensors`; named in the
        message.
    """
    if sides not in get_args(Sides):
        raise OptionError(f"Expected tensors='AB' or tensors='B', but got {sides!r}.")
    adapter = resolve_adapter(model, adapter)
    rows = _rows_that_are_read(model) if choice_rows else {}
    names = {parameter: name for name, parameter in model.named_parameters()}
    found: dict[nn.Parameter, LoraTensor] = {}
    for name, layer in lora_layers(model):
        if adapter in adapters_of(layer):
            check_supported(name, layer, adapter)
            for tensor in _tensors_of(layer, adapter, names, rows.get(layer)):
                if tensor.role == "B" or sides == "AB":
                    found[tensor.weight] = tensor
    if include_modules_to_save:
        for tensor in _saved(model, adapter, names, rows):
            found[tensor.weight] = tensor
    tensors = [found[parameter] for parameter in names if parameter in found]
    _check_in_memory(tensors)
    _check_untied(tensors)
    return tensors


def _tensors_of(
    layer: LoraLayer,
    adapter: str,
    names: dict[nn.Parameter, str],
    rows: tuple[int, ...] | None,
) -> Iterator[LoraTensor]:
    if adapter in layer.lora_embedding_A:
        A, B = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        yield OneHotTensor(names[A], A, layer, layer, "A")
        yield EmbeddingTensor(names[B], B, layer, layer, "B")
        return
    A, B = layer.lora_A[adapter], layer.lora_B[adapter]
    kind = LoraTensor if type(A) is nn.Linear else ConvTensor
    yield kind(names[A.weight], A.weight, A, layer, "A")
    yield kind(names[B.weight], B.weight, B, layer, "B", rows)
    if B.bias is not None:
        yield BiasTensor(names[B.bias], B.bias, B, layer, "bias", rows)
    if adapter in layer.lora_magnitude_vector:
        dora = layer.lora_magnitude_vector[adapter]
        yield MagnitudeTensor(names[dora.weight], dora.weight, dora, layer, "magnitude")


def _saved(
    model: nn.Module,
    adapter: str,
    names: dict[nn.Parameter, str],
    rows: dict[nn.Module, tuple[int, ...]],
) -> Iterator[LoraTensor]:
    """Yield the weights and biases of linear modules that PEFT trains and saves as a whole."""
    for name, wrapper in model.named_modules():
        if not isinstance(wrapper, ModulesToSaveWrapper) or adapter not in wrapper.modules_to_save:
            continue
        for module in wrapper.modules_to_save[adapter].modules():
            own = dict(module.named_parameters(recurse=False))
            if own and type(module) is not nn.Linear:
                raise UnsupportedLayerError(
                    f"Cannot put a posterior over {type(module).__name__} in {name!r}, which is in "
                    "modules_to_save: only linear layers are supported there. Leave out "
                    "include_modules_to_save=True."
                )
            for key, parameter in own.items():
                kind = LoraTensor if key == "weight" else BiasTensor
                yield kind(names[parameter], parameter, module, module, "saved", rows.get(wrapper))


def _check_untied(tensors: list[LoraTensor]) -> None:
    """Refuse two weights of one storage, whose gradients would have to be added up."""
    seen: dict[tuple[int, int], str] = {}
    for tensor in tensors:
        weight = tensor.weight
        place = (weight.untyped_storage()._cdata, int(weight.storage_offset()))
        if place in seen:
            raise UnsupportedLayerError(
                f"Cannot put a posterior over {tensor.name!r} and {seen[place]!r}: they are one "
                "weight, which ensure_weight_tying=True makes. Train the adapter without it, or "
                "leave one of the two layers out of LoraConfig(target_modules=...)."
            )
        seen[place] = tensor.name


def _rows_that_are_read(model: nn.Module) -> dict[nn.Module, tuple[int, ...]]:
    """Return the vocabulary matrices that heads call, and the rows they read of their outputs."""
    heads = [head for head in model.modules() if isinstance(head, MultipleChoiceHead)]
    return {head.vocabulary: tuple(head.choice_token_ids) for head in heads if head.vocabulary}


def lora_dtype(tensors: list[LoraTensor]) -> torch.dtype:
    """Return the adapters' common precision, or float32 where that is lower."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.weight.dtype)
    return dtype


def _check_in_memory(tensors: list[LoraTensor]) -> None:
    """Raise AdapterError if accelerate keeps weights on CPU or disk between calls."""
    for tensor in tensors:
        if tensor.weight.is_meta and offloaded(tensor.layer):
            raise AdapterError(
                f"Expected adapter weights in memory, but {tensor.name!r} is offloaded with its "
                "layer. Choose a device_map that keeps the layers with an adapter on devices; "
                "other layers may be offloaded."
            )
