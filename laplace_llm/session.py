"""Borrowing the user's model: everything is put back, whatever happens in between."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def borrowed(model: nn.Module, trainable: Sequence[nn.Parameter]) -> Iterator[None]:
    """Put the model into eval mode with gradients enabled for `trainable` alone.

    Afterwards, also after an exception, training modes, ``requires_grad`` flags and ``.grad``
    tensors are what they were. Weights are never written to. What was compiled runs uncompiled
    meanwhile, as compiled code heeds no hooks.

    Parameters
    ----------
    model : torch.nn.Module
        The model to borrow.
    trainable : Sequence[torch.nn.Parameter]
        Parameters that the graph is to reach.
    """
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    chosen = set(trainable)
    try:
        for module, _ in modes:
            module.training = False
        for parameter, flag, _ in flags:
            parameter.grad = None
            if flag != (parameter in chosen):
                parameter.requires_grad_(parameter in chosen)
        with torch.inference_mode(False), torch.enable_grad(), _uncompiled(modes):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag, gradient in flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
            parameter.grad = gradient


def _uncompiled(modules: Iterable[tuple[nn.Module, bool]]) -> AbstractContextManager[None]:
    """Return a context in which compiled modules run as they were written."""
    compiled = any(
        hasattr(module, "_orig_mod") or module._compiled_call_impl is not None
        for module, _ in modules
    )
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


@contextmanager
def hosting_parent_backend(model: nn.Module, n_outputs: int) -> Iterator[None]:
    """Give a parent's backend what it expects, and take off what it leaves on the modules.

    ASDL reads ``model.output_size`` and leaves ``fisher`` attributes and marks of its hooks behind;
    an error inside curvlinops leaves hooks. Curvlinops uses forward-mode differentiation, which
    fused attention kernels do not implement.
    """
    attributes = [(module, set(vars(module))) for module in model.modules()]
    hooks = [
        (vars(module), key, type(value)(value) if key.endswith("_hooks") else value)
        for module in model.modules()
        for key, value in vars(module).items()
        if key.endswith("_hooks") or key == "_is_full_backward_hook"
    ]
    had = getattr(model, "output_size", None)
    try:
        model.output_size = n_outputs  # type: ignore[assignment]
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for owner, key, value in hooks:
            if key.endswith("_hooks"):
                for handle in set(owner[key]) - set(value):
                    del owner[key][handle]
            else:
                owner[key] = value
        for module, names in attributes:
            for name in set(vars(module)) - names:
                delattr(module, name)
        if had is not None:
            model.output_size = had
