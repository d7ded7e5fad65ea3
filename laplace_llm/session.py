"""Borrowing the user's model: nothing disturbs a call, and everything is put back after it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from laplace_llm.errors import AdapterError, StorageError
from laplace_llm.locks import alone_in_process, alone_with

C = TypeVar("C", bound=type)
# Devices that have an autocast of their own.
DEVICES = ("cpu", "cuda", "mps", "xpu")


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run in one thread at a time, without autocast, and on tensors that can take gradients.

    A posterior is that of the model in its own precision. Under autocast its factors and links
    would be in 16 bits, and its weights would be others than in a call outside. Tensors made under
    `torch.inference_mode` could not be used outside of it. Whether gradients are recorded stays.
    """
    gradients = torch.is_grad_enabled()
    with ExitStack() as stack:
        stack.enter_context(alone_with(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(gradients))
        for device in DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def undisturbed_calls(cls: C) -> C:
    """Make everything public of a posterior's class, the parent's included, `undisturbed`.

    And if it fails, all attributes are what they were: results are put in their places one after
    the other, and an error or an interrupt may come in between. Not so after a `StorageError`,
    which comes when all is in its place, and only the disk is full.
    """
    for name in dir(cls):
        member = inspect.getattr_static(cls, name)
        if name == "__init__":
            setattr(cls, name, _undisturbed(member, constructs=True))
        elif isinstance(member, property) and not name.startswith("_"):
            getter, setter = (f and _undisturbed(f) for f in (member.fget, member.fset))
            setattr(cls, name, property(getter, setter))
        elif inspect.isfunction(member) and (name == "__call__" or not name.startswith("_")):
            setattr(cls, name, _undisturbed(member))
    return cls


def _undisturbed(method: Callable[..., Any], constructs: bool = False) -> Callable[..., Any]:
    if hasattr(method, "_of_session"):
        return method

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        args = tuple(map(ordinary, args))
        kwargs = {key: ordinary(value) for key, value in kwargs.items()}
        before = dict(vars(self))
        try:
            return method(self, *args, **kwargs)
        except StorageError:  # what cannot be written is all the more to be kept
            raise
        except BaseException:
            for name in vars(self).keys() - before.keys():
                delattr(self, name)
            vars(self).update(before)
            raise

    @wraps(method)
    def on_a_model(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        with undisturbed(model) if isinstance(model, nn.Module) else nullcontext():
            return call(self, model, *args, **kwargs)

    @wraps(method)
    def on_its_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        with undisturbed(self.model):
            return call(self, *args, **kwargs)

    result = on_a_model if constructs else on_its_model
    result._of_session = True  # type: ignore[attr-defined]
    return result


def ordinary(value: Any) -> Any:
    """Return a tensor, batch or state with copies of what was made under `torch.inference_mode`.

    Autograd refuses such tensors, also where no gradient is wanted of them. Without any, it is
    `value` itself.
    """
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, MutableMapping):
        changed = {k: new for k, v in value.items() if (new := ordinary(v)) is not v}
        if changed:
            value = copy.copy(value)
            value.update(changed)
    elif type(value) in (list, tuple):
        parts = [ordinary(part) for part in value]
        if any(new is not old for new, old in zip(parts, value, strict=True)):
            return type(value)(parts)
    return value


@contextmanager
def borrowed(model: nn.Module, trainable: Sequence[nn.Parameter]) -> Iterator[None]:
    """Put the model into eval mode with gradients enabled for `trainable` alone.

    Afterwards, also after an exception, training modes, ``requires_grad`` flags and ``.grad``
    tensors are what they were. Weights are never written to. What was compiled runs uncompiled
    meanwhile, as compiled code heeds no hooks. Other threads that want the model, or one that has
    weights in common with it, wait (`undisturbed`).

    Parameters
    ----------
    model : torch.nn.Module
        The model to borrow.
    trainable : Sequence[torch.nn.Parameter]
        Parameters that the graph is to reach.

    Raises
    ------
    AdapterError
        If a weight was made under `torch.inference_mode`.
    """
    with undisturbed(model):
        _check_differentiable(model)
        with _put_back(model, set(trainable)), torch.enable_grad(), _uncompiled(model):
            yield


def _check_differentiable(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise AdapterError(
                f"Expected weights that gradients can be taken through, but {name!r} was made "
                "under torch.inference_mode(). Load the model, and build its head, outside of it; "
                "fit and prediction may be called inside."
            )


@contextmanager
def _put_back(model: nn.Module, chosen: set[nn.Parameter]) -> Iterator[None]:
    """Put the model into eval mode with flags for `chosen` alone, and back."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        for module, _ in modes:
            module.training = False
        for parameter, flag, _ in flags:
            parameter.grad = None
            if flag != (parameter in chosen):
                parameter.requires_grad_(parameter in chosen)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag, gradient in flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
            parameter.grad = gradient


@contextmanager
def _uncompiled(model: nn.Module) -> Iterator[None]:
    """Have compiled modules run as they were written."""
    if not any(
        hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules()
    ):
        yield
        return
    with alone_in_process(), torch.compiler.set_stance("force_eager"):
        yield


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
        with alone_in_process(), sdpa_kernel(SDPBackend.MATH):
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
