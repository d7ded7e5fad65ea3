"""Hooks on a model during one forward pass: what LoRA layers read, and what heads are given."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from laplace_llm.errors import TapError
from laplace_llm.heads import Head
from laplace_llm.tensors import LoraTensor


class Tap:
    """What one tensor's module was called with, and who is to be told of its output's gradient.

    The graph refers to taps, so taps must not refer to the graph.
    """

    def __init__(self, index: int) -> None:
        self.entered = 0  # how often its layer was called, and
        self.calls = 0  # in how many of these calls its module was
        self.source = index
        self.captured: Tensor | None = None
        self.shape = torch.Size()  # of the output
        self.consume: Callable[[Tensor], None] | None = None

    def gradient(self, gradient: Tensor) -> None:
        """Pass the output's gradient on, in a backward pass of ours."""
        if self.consume is not None:
            self.consume(gradient)


@contextmanager
def tapped(
    tensors: Sequence[LoraTensor], taps: Sequence[Tap], roots: list[Tensor], create_graph: bool
) -> Iterator[None]:
    """Fill in the taps, and the roots: where a backward pass may stop.

    These are the outputs of ``lora_A``, which every path through its ``lora_B`` ends at and which
    are small; the inputs of ``lora_B`` where it is tapped alone; and the outputs of modules that
    are no LoRA layers, or whose weights are no modules.
    """
    alone = all(tensor.role == "B" for tensor in tensors)
    readers: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def entered(tap: Tap) -> Any:
        def hook(_layer: nn.Module, _args: tuple[Tensor, ...]) -> None:
            tap.entered += 1

        return hook

    def read(tensor: LoraTensor, index: int) -> Any:
        """Find out whether an earlier layer had the same input: PEFT casts it for each anew."""

        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            earlier = readers.get(id(args[0]))
            if earlier is None or earlier[0]() is not args[0]:
                earlier = readers[id(args[0])] = (weakref.ref(args[0]), index)
            weight, other = tensor.weight, tensors[earlier[1]].weight
            if weight.dtype == other.dtype and weight.device == other.device:
                taps[index].source = earlier[1]

        return tensor.layer.register_forward_pre_hook(hook)

    def before(tensor: LoraTensor) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if not args[0].requires_grad:  # there is no graph before the first tapped layer
                args[0].requires_grad_()
            roots.append(args[0])

        return tensor.module.register_forward_pre_hook(hook)

    def after(tensor: LoraTensor, index: int) -> Any:
        def hook(
            _module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Tensor
        ) -> None:
            # Of the calls in one of the layer, the last counts: DoRA's first is on the identity.
            tap = taps[index]
            tap.calls, tap.shape = tap.entered, output.shape
            if not output.requires_grad:
                raise TapError(
                    f"Expected LoRA tensor {tensor.name!r} to be used with gradients, but it was "
                    "not. Checkpoint layers with use_reentrant=False, and run none of them under "
                    "torch.no_grad()."
                )
            if tap.source == index:
                captured = tensor.captured(args, kwargs, output)
                tap.captured = captured if create_graph else captured.detach()
            output.register_hook(tap.gradient)
            if tensor.role == "A" or tensor.module is tensor.layer:
                roots.append(output)

        return tensor.module.register_forward_hook(hook, with_kwargs=True)

    with ExitStack() as stack:
        for index, tensor in enumerate(tensors):
            enter = tensor.layer.register_forward_pre_hook(entered(taps[index]))
            handles = [enter, after(tensor, index)]
            if tensor.role == "A" and type(tensor) is LoraTensor:
                handles.append(read(tensor, index))
            elif alone and tensor.module is not tensor.layer:
                handles.append(before(tensor))
            for handle in handles:
                stack.callback(handle.remove)
        yield


@contextmanager
def heads_batch(model: nn.Module) -> Iterator[list[Any]]:
    """Fill the list with what heads within the model make of their batches, and run them on it.

    A head may take a batch apart, and the module around it may have made the batch itself.
    """
    prepared: list[Any] = []

    def prepare(head: Any, args: Any, kwargs: Any) -> tuple[Any, dict[str, Any]]:
        prepared.append(head.prepare(*args, **kwargs))
        return (prepared[-1],), {}

    heads = [module for module in model.modules() if isinstance(module, Head)]
    handles = [head.register_forward_pre_hook(prepare, with_kwargs=True) for head in heads]
    try:
        yield prepared
    finally:
        for handle in handles:
            handle.remove()
