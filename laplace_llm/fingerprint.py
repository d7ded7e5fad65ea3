"""What an adapter is recognised by: the names, shapes and values of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn


def fingerprint(model: nn.Module, adapter: str) -> str:
    """Return the SHA-256 of all weights that PEFT trains and saves for one adapter.

    They are taken as float64 and by `portable_name`, so that neither the precision nor the name
    that an adapter is loaded with matters.

    Parameters
    ----------
    model : torch.nn.Module
        Any module with PEFT layers somewhere inside.
    adapter : str
        The adapter's name.
    """
    own = {id(weight) for weight in _weights(model, adapter)}
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        if id(weight) in own:
            digest.update(f"{portable_name(name, adapter)} {tuple(weight.shape)}\n".encode())
            values = weight.detach().to("cpu", torch.float64).contiguous().flatten()
            digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _weights(model: nn.Module, adapter: str) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            containers = [getattr(module, key) for key in module.adapter_layer_names]
        elif isinstance(module, ModulesToSaveWrapper):
            containers = [module.modules_to_save]
        else:
            continue
        for container in containers:
            if isinstance(container, (nn.ModuleDict, nn.ParameterDict)) and adapter in container:
                part = container[adapter]
                yield from part.parameters() if isinstance(part, nn.Module) else [part]


def portable_name(name: str, adapter: str) -> str:
    """Return a weight's name without the adapter's, which may be loaded under another one."""
    parts = name.split(".")
    if adapter in parts:
        del parts[len(parts) - 1 - parts[::-1].index(adapter)]
    return ".".join(parts)
