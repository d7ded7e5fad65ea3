"""Inputs and output gradients of LoRA tensors during one forward pass.

A LoRA tensor with input a_t and output gradient g_t at token t has the per-example gradient
``sum_t g_t a_t^T``. `forward` runs the model once with a hook on every tensor; `Taps.backward`
hands the output gradients that belong to cotangents of the logits to a function as they arise, in
one backward pass, with no vmap and no parameter gradients. Which rows of an activation belong to
which example, and which are padding, is decided here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from laplace_llm.errors import OutputError, TapError
from laplace_llm.hooks import Tap, heads_batch, tapped
from laplace_llm.tensors import LoraTensor

Batch = Tensor | MutableMapping[str, Any]
T = TypeVar("T")


class Taps:
    """Logits of one batch and the activations behind them.

    Attributes
    ----------
    logits : Tensor
        (B, C), with its graph; -inf for a choice that its row does not have.
    sources : list[int]
        For each tensor the first one that reads the same input: ``lora_A`` of q, k and v do.
    """

    def __init__(
        self,
        tensors: Sequence[LoraTensor],
        logits: Tensor,
        taps: Sequence[Tap],
        roots: Sequence[Tensor],
        attention_mask: Tensor | None,
    ) -> None:
        self.tensors = tensors
        self.logits = logits
        self._taps = taps
        self._roots = roots
        self._masks = [
            _token_mask(tensor, tap.shape, attention_mask, len(logits))
            for tensor, tap in zip(tensors, taps, strict=True)
        ]
        self.sources = [tap.source for tap in taps]

    def inputs(self, index: int) -> Tensor:
        """Return a tensor's inputs (B, S, n) at an example's S positions, zero on padding.

        n is `in`, or 1 for tokens of `laplace_llm.tensors.OneHotTensor`.
        """
        captured = self._taps[self.sources[index]].captured
        assert captured is not None
        inputs = self.tensors[index].inputs(captured)
        return _by_example(inputs, self._masks[index], len(self.logits))

    def backward(
        self,
        cotangent: Tensor,
        consume: Callable[[int, Tensor], T],
        last: bool = False,
        create_graph: bool = False,
    ) -> list[T]:
        """Return what a function makes of the output gradient of each tensor.

        A gradient is consumed and freed before the next one is computed.

        Parameters
        ----------
        cotangent : Tensor
            (B, C), the direction in logit space.
        consume : Callable
            Called with a tensor's index and output gradient (B, S, out), zero on padding; zero
            altogether where the logits do not depend on it.
        last : bool, default=False
            Whether the graph may be freed.
        create_graph : bool, default=False
            Whether the result is to be differentiated again.

        Raises
        ------
        TapError
            If the logits depend on padding, so that the gradient without it is not theirs.
        """
        results: dict[int, T] = {}
        leaks: dict[int, Tensor] = {}

        def consumer(index: int) -> Callable[[Tensor], None]:
            tensor, tap = self.tensors[index], self._taps[index]

            def take(gradient: Tensor) -> None:
                gradient, mask = tensor.gradients(gradient, tap.captured), self._masks[index]
                if mask is not None:
                    leaks[index] = _reaches_padding(gradient, mask)
                by_example = _by_example(gradient, mask, len(self.logits))
                results[index] = consume(index, by_example)

            return take

        try:
            for index, tap in enumerate(self._taps):
                tap.consume = consumer(index)
            torch.autograd.grad(
                self.logits,
                self._roots,
                # Absent choices have no gradient, however the model marks them.
                grad_outputs=cotangent.to(self.logits.dtype).where(self.logits.isfinite(), 0),
                retain_graph=create_graph or not last,
                create_graph=create_graph,
                allow_unused=True,
            )
        finally:
            for tap in self._taps:
                tap.consume = None
        for index, tap in enumerate(self._taps):
            if index not in results:
                consumer(index)(self.tensors[index].weight.new_zeros(tap.shape))
        self._check_padding(leaks)
        return [results[index] for index in range(len(self._taps))]

    def _check_padding(self, leaks: dict[int, Tensor]) -> None:
        """Raise TapError if some gradient is not zero on padding, where it was left out."""
        device = self.logits.device  # gathered first: one synchronisation, not one a tensor
        if not leaks or not bool(torch.stack([leak.to(device) for leak in leaks.values()]).any()):
            return
        index = next(i for i, leak in leaks.items() if bool(leak))
        raise TapError(
            f"Expected logits that do not depend on padding, but they do, through LoRA tensor "
            f"{self.tensors[index].name!r} on positions that attention_mask marks as padding. Pad "
            "on the side that the model expects (encoders read their first token, so the right), "
            "or mask these positions in the model."
        )

    def sweep(
        self,
        directions: Tensor,
        consume: Callable[[int, Tensor], T],
        create_graph: bool = False,
    ) -> Iterator[list[T]]:
        """Yield the results of `backward` for each direction in turn; the last frees the graph.

        Parameters
        ----------
        directions : Tensor
            (B, C, K), or (C, K) for all examples.
        consume, create_graph
            See `backward`.
        """
        last = directions.shape[-1] - 1
        for index, column in enumerate(directions.unbind(-1)):
            cotangent = column.expand_as(self.logits)
            yield self.backward(cotangent, consume, index == last, create_graph)

    def token_counts(self, index: int) -> Tensor | int:
        """Return the number of real positions of each example (B, 1) for one tensor, at least 1."""
        mask = self._masks[index]
        if mask is None:
            return self.tensors[index].positions(self._taps[index].shape) // len(self.logits)
        return mask.sum(1, keepdim=True).clamp_min(1)


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
        If the output is not a (B, C) matrix of finite numbers, or -inf where a row does not have a
        choice (but at least one).
    """
    taps, roots = [Tap(index) for index in range(len(tensors))], list[Tensor]()
    with tapped(tensors, taps, roots, create_graph), heads_batch(model) as prepared:
        logits = model(batch)
    for tensor, tap in zip(tensors, taps, strict=True):
        if tap.calls != 1:
            raise TapError(
                f"Expected LoRA tensor {tensor.name!r} to be used once in a forward pass, but it "
                f"was used {tap.calls} times. This kind of layer or model is not supported; leave "
                "it out of LoraConfig(target_modules=...)."
            )
    check_logits(logits)
    seen = prepared[-1] if prepared else batch
    attention_mask = seen.get("attention_mask") if isinstance(seen, MutableMapping) else None
    run = Taps(tensors, logits, taps, roots, attention_mask)
    if not _all_finite(logits):
        name = _first_not_finite(model, run, batch)
        check_finite(logits, f"LoRA tensor {name!r}" if name else None)
    return run


def check_finite(logits: Tensor, seen_at: str | None = "the outputs") -> None:
    """Raise OutputError unless logits (B, C) are finite, or -inf for absent choices.

    `seen_at` says where what is not finite was first seen; None after the last LoRA layer.
    """
    if not _all_finite(logits):
        where = f"first seen at {seen_at}" if seen_at else "after the last LoRA layer"
        raise OutputError(
            f"Expected finite logits (or -inf for some of a row's choices, which the row then does "
            f"not have), but the model returned NaN or inf, {where}. "
            "Check the batch and the model's precision (float16 overflows; bfloat16 does not)."
        )


def _all_finite(logits: Tensor) -> bool:
    finite, absent = logits.isfinite(), logits == -torch.inf
    return bool(((finite | absent) & finite.any(1, keepdim=True)).all())


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


def _first_not_finite(model: nn.Module, run: Taps, batch: Batch) -> str | None:
    """Return the name of the first tensor with NaN or inf in its input or output."""
    found: list[str] = []

    def check(index: int, tensor: LoraTensor) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            for values in (args[0], output):
                if values.is_floating_point():
                    values = _by_example(values, run._masks[index], len(run.logits))
                    if not bool(values.isfinite().all()):
                        found.append(tensor.name)

        return tensor.module.register_forward_hook(hook)

    with ExitStack() as stack, torch.no_grad():
        for index, tensor in enumerate(run.tensors):
            stack.callback(check(index, tensor).remove)
        model(batch)
    return found[0] if found else None


def gathered(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Return what tensors on several devices hold, concatenated on the device of the first."""
    return torch.cat([part.to(parts[0].device) for part in parts], dim)


def _token_mask(
    tensor: LoraTensor, shape: torch.Size, attention_mask: Tensor | None, n_examples: int
) -> Tensor | None:
    """Return the (B, S) mask of one tensor's positions; None where all are real."""
    rows = tensor.positions(shape)
    if rows % n_examples:
        raise TapError(
            f"Expected the activation of LoRA tensor {tensor.name!r} to hold the same number of "
            f"positions for each of {n_examples} examples, but its shape is "
            f"{tuple(shape)}. Batches must be example-major."
        )
    if attention_mask is None or rows == n_examples:  # pooled, or a decoder's first
        return None
    if rows == attention_mask.shape[:-1].numel():  # pooled: one position for each sequence
        attention_mask = attention_mask.bool().any(-1)
    if attention_mask.numel() != rows:
        raise TapError(
            f"Expected one entry of attention_mask for each position, but it has shape "
            f"{tuple(attention_mask.shape)} and the activation of LoRA tensor {tensor.name!r} has "
            f"shape {tuple(shape)}. This architecture is not supported yet."
        )
    mask = attention_mask.reshape(n_examples, -1).to(tensor.weight.device, torch.bool)
    return None if bool(mask.all()) else mask


def _reaches_padding(gradient: Tensor, mask: Tensor) -> Tensor:
    """Return whether an output gradient (..., d) is other than zero, or NaN, on padding."""
    largest = gradient.detach().abs().amax(-1).view_as(mask)
    return ((largest > 0) & ~mask).any()


def _by_example(activation: Tensor, mask: Tensor | None, n_examples: int) -> Tensor:
    """Turn (..., d) into (B, S, d) with zeros on padding, whatever stood there (even NaN)."""
    activation = activation.reshape(n_examples, -1, activation.shape[-1])
    if mask is None:
        return activation
    return torch.where(mask[..., None], activation, activation.new_zeros(()))
