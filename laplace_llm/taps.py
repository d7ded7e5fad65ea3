"""Inputs and output gradients of LoRA tensors during one forward pass.

A LoRA tensor with input a_t and output gradient g_t at token t has the per-example gradient
``sum_t g_t a_t^T``. `forward` runs the model once with a hook on every tensor; `backward` turns
cotangents of the logits into output gradients with one backward pass, no vmap and no parameter
gradients. Which rows of an activation belong to which example, and which are padding, is decided
here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from laplace_llm.adapters import LoraTensor
from laplace_llm.causal_heads import CausalHead
from laplace_llm.errors import OutputError, TapError

Batch = Tensor | MutableMapping[str, Any]


class Taps:
    """Logits of one batch and the activations behind them.

    Attributes
    ----------
    logits : Tensor
        (B, C), with its graph.
    inputs : list[Tensor]
        One a tensor, (B, S, in): the inputs at an example's S positions, zero on padding.
    """

    def __init__(
        self,
        tensors: Sequence[LoraTensor],
        logits: Tensor,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        attention_mask: Tensor | None,
    ) -> None:
        self.tensors = tensors
        self.logits = logits
        self._outputs = list(outputs)
        self._masks = [
            _token_mask(tensor, output, attention_mask, len(logits))
            for tensor, output in zip(tensors, outputs, strict=True)
        ]
        self.inputs = [
            _by_example(activation, mask, len(logits))
            for activation, mask in zip(inputs, self._masks, strict=True)
        ]

    def backward(
        self, cotangent: Tensor, last: bool = False, create_graph: bool = False
    ) -> list[Tensor]:
        """Return the output gradients of every tensor, each (B, S, out), zero on padding.

        Parameters
        ----------
        cotangent : Tensor
            (B, C), the direction in logit space.
        last : bool, default=False
            Whether the graph may be freed.
        create_graph : bool, default=False
            Whether the result is to be differentiated again.
        """
        gradients = torch.autograd.grad(
            self.logits,
            self._outputs,
            grad_outputs=cotangent.to(self.logits.dtype),
            retain_graph=create_graph or not last,
            create_graph=create_graph,
        )
        return [
            _by_example(gradient, mask, len(self.logits))
            for gradient, mask in zip(gradients, self._masks, strict=True)
        ]

    def token_counts(self, index: int) -> Tensor | int:
        """Return the number of real positions of each example (B, 1) for one tensor, at least 1."""
        mask = self._masks[index]
        if mask is None:
            return self.inputs[index].shape[1]
        return mask.sum(1, keepdim=True).clamp_min(1)

    def first_not_finite(self) -> str | None:
        """Return the name of the first tensor with NaN or inf in its input or output."""
        for tensor, mask, activation, output in zip(
            self.tensors, self._masks, self.inputs, self._outputs, strict=True
        ):
            for values in (activation, _by_example(output, mask, len(self.logits))):
                if not bool(values.isfinite().all()):
                    return tensor.name
        return None


def forward(
    model: nn.Module, tensors: Sequence[LoraTensor], batch: Batch, create_graph: bool = False
) -> Taps:
    """Run the model on a batch and keep what `Taps` needs.

    Parameters
    ----------
    model : torch.nn.Module
        Called once with the batch; returns logits (B, C).
    tensors : Sequence[LoraTensor]
        The tensors to tap. They must require gradients.
    batch : Tensor or MutableMapping
        A mapping's ``attention_mask`` tells real tokens from padding; where the model is one of
        our heads or has one inside, that of the batch the head prepares.
    create_graph : bool, default=False
        Whether the inputs keep their graph too, for derivatives of the result.

    Raises
    ------
    TapError
        If a tensor's module was not called exactly once.
    OutputError
        If the output is not a finite (B, C) matrix.
    """
    calls: list[list[tuple[Tensor, Tensor]]] = [[] for _ in tensors]
    with _hooks(tensors, calls), _heads_batch(model) as prepared:
        logits = model(batch)
    for tensor, fired in zip(tensors, calls, strict=True):
        if len(fired) != 1:
            raise TapError(
                f"Expected LoRA tensor {tensor.name!r} to be used once in a forward pass, but it "
                f"was used {len(fired)} times. This kind of layer or model is not supported; leave "
                "it out of LoraConfig(target_modules=...)."
            )
    check_logits(logits)
    seen = prepared[-1] if prepared else batch
    attention_mask = seen.get("attention_mask") if isinstance(seen, MutableMapping) else None
    inputs = [fired[0][0] if create_graph else fired[0][0].detach() for fired in calls]
    outputs = [fired[0][1] for fired in calls]
    taps = Taps(tensors, logits, inputs, outputs, attention_mask)
    if not bool(logits.isfinite().all()):
        name = taps.first_not_finite()
        where = f"first seen at LoRA tensor {name!r}" if name else "after the last LoRA layer"
        raise OutputError(
            f"Expected finite logits, but the model returned NaN or inf, {where}. "
            "Check the batch and the model's precision (float16 overflows; bfloat16 does not)."
        )
    return taps


def check_logits(logits: Any) -> None:
    """Raise OutputError unless `logits` is a (B, C) floating-point tensor."""
    if not isinstance(logits, Tensor):
        raise OutputError(
            f"Expected the model to return a (B, C) tensor of logits, but it returned a "
            f"{type(logits).__name__}. Wrap it in one of laplace_llm's heads, for example "
            "SequenceClassificationHead."
        )
    if logits.ndim != 2 or not logits.is_floating_point():
        raise OutputError(
            f"Expected logits of shape (B, C), but the model returned shape "
            f"{tuple(logits.shape)} of {logits.dtype}. For a causal language model use "
            "MultipleChoiceHead or ChoiceScoringHead."
        )


@contextmanager
def _hooks(
    tensors: Sequence[LoraTensor], calls: list[list[tuple[Tensor, Tensor]]]
) -> Iterator[None]:
    handles = []

    def recorder(fired: list[tuple[Tensor, Tensor]]) -> Any:
        return lambda _module, args, output: fired.append((args[0], output))

    try:
        for tensor, fired in zip(tensors, calls, strict=True):
            handles.append(tensor.module.register_forward_hook(recorder(fired)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _heads_batch(model: nn.Module) -> Iterator[list[Any]]:
    """Fill the list with what heads within the model make of their batches, and run them on it.

    A head may take a batch apart, and the module around it may have made the batch itself.
    """
    prepared: list[Any] = []

    def prepare(head: nn.Module, args: Any, kwargs: Any) -> tuple[Any, dict[str, Any]]:
        prepared.append(cast(CausalHead, head).prepare(*args, **kwargs))
        return (prepared[-1],), {}

    heads = [module for module in model.modules() if isinstance(module, CausalHead)]
    handles = [head.register_forward_pre_hook(prepare, with_kwargs=True) for head in heads]
    try:
        yield prepared
    finally:
        for handle in handles:
            handle.remove()


def _token_mask(
    tensor: LoraTensor, output: Tensor, attention_mask: Tensor | None, n_examples: int
) -> Tensor | None:
    """Return the (B, S) mask of one tensor's positions; None where all are real."""
    rows = output.shape[:-1].numel()
    if rows % n_examples:
        raise TapError(
            f"Expected the activation of LoRA tensor {tensor.name!r} to hold the same number of "
            f"positions for each of {n_examples} examples, but its shape is "
            f"{tuple(output.shape)}. Batches must be example-major."
        )
    if attention_mask is None or rows == n_examples:
        return None
    if attention_mask.numel() != rows:
        raise TapError(
            f"Expected one entry of attention_mask for each position, but it has shape "
            f"{tuple(attention_mask.shape)} and the activation of LoRA tensor {tensor.name!r} has "
            f"shape {tuple(output.shape)}. This architecture is not supported yet."
        )
    mask = attention_mask.reshape(n_examples, -1).to(output.device, torch.bool)
    return None if bool(mask.all()) else mask


def _by_example(activation: Tensor, mask: Tensor | None, n_examples: int) -> Tensor:
    """Turn (..., d) into (B, S, d) with zeros on padding, whatever stood there (even NaN)."""
    activation = activation.reshape(n_examples, -1, activation.shape[-1])
    if mask is None:
        return activation
    return torch.where(mask[..., None], activation, activation.new_zeros(()))
