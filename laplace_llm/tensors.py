"""The kinds of adapter weights, each a linear map: what a call of its module says of its gradient.

A weight of shape (out, in) that turns inputs a_t into outputs with gradients g_t has the
per-example gradient ``sum_t g_t a_t^T``. Each kind knows where the a_t and g_t of its weight are to
be found: in what its module was called with, in what it returned, and in that output's gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.nn import functional as F

Role = Literal["A", "B", "bias", "magnitude", "saved"]


@dataclass(frozen=True, eq=False)
class LoraTensor:
    """The weight of a linear module; the other kinds say what is different for them.

    Attributes
    ----------
    name : str
        The parameter's qualified name in the model.
    weight : torch.nn.Parameter
        The parameter itself.
    module : torch.nn.Module
        Whose calls give the gradient away: for ``lora_A[adapter]`` and ``lora_B[adapter]`` itself.
    layer : torch.nn.Module
        PEFT's layer around it.
    role : {'A', 'B', 'bias', 'magnitude', 'saved'}
        ``lora_A``, ``lora_B``, the latter's bias, DoRA's magnitudes, or a weight or bias of
        ``modules_to_save``.
    rows : tuple[int, ...], optional
        The only rows of the weight that the model's outputs depend on: those of the choices'
        tokens in a vocabulary matrix. The posterior is over these.
    """

    name: str
    weight: nn.Parameter
    module: nn.Module
    layer: nn.Module
    role: Role
    rows: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the linear map."""
        out = self.weight.shape[0] if self.rows is None else len(self.rows)
        return (out, self.weight[0].numel())

    @property
    def numel(self) -> int:
        """Number of weights that the posterior is over."""
        return self.shape[0] * self.shape[1]

    @property
    def small_outputs(self) -> bool:
        """Whether the map's outputs are its short side, as those of ``lora_A`` are."""
        return self.role == "A" or (self.role == "saved" and self.shape[0] <= self.shape[1])

    @property
    def is_plain(self) -> bool:
        """Whether this is all of a linear module's weight, which laplace-torch's backends know."""
        return type(self) is LoraTensor and self.rows is None

    def values(self) -> Tensor:
        """Return the weights that the posterior is over as a vector (out * in)."""
        weight = self.weight.detach()
        return (weight if self.rows is None else weight[list(self.rows)]).flatten()

    def placed(self, values: Tensor) -> Tensor:
        """Return a copy of the parameter with a vector (out * in) in place of its own values."""
        values = values.to(self.weight)
        if self.rows is None:
            return values.view_as(self.weight)
        weight = self.weight.detach().clone()
        weight[list(self.rows)] = values.view(-1, *weight.shape[1:])
        return weight

    def without(self) -> Tensor:
        """Return the parameter's value under which ``lora_B`` and what belongs to it do nothing."""
        return torch.zeros_like(self.weight)

    # What a call of the module says --------------------------------------------------------------

    def captured(self, args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor) -> Tensor:
        """Return what to keep of a call of the module until the backward pass."""
        return args[0]

    def inputs(self, captured: Tensor) -> Tensor:
        """Return the inputs a_t (..., in)."""
        return captured

    def gradients(self, gradient: Tensor, captured: Tensor | None) -> Tensor:
        """Return the output gradients g_t (..., out) from that of the module's output."""
        return gradient if self.rows is None else gradient[..., list(self.rows)]

    def positions(self, shape: torch.Size) -> int:
        """Return the number of positions t of all examples for a module's output of this shape."""
        return shape[:-1].numel()

    # What inputs and gradients make together -----------------------------------------------------

    def outer(self, gradients: Tensor, inputs: Tensor) -> Tensor:
        """Return ``sum_t g_t a_t^T`` (B, out, in) of gradients (B, S, out) and `inputs`."""
        return gradients.mT @ inputs.to(gradients)

    def total(self, inputs: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``sum_t a_t`` (B, in)."""
        return inputs.to(dtype).sum(1)

    def dense(self, inputs: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the a_t (B, S, in) themselves."""
        return inputs.to(dtype)


class ConvTensor(LoraTensor):
    """The weight of a convolution, a linear map of patches: ``in`` is channels x kernel."""

    def inputs(self, captured: Tensor) -> Tensor:
        """Return the patches (B, L, in)."""
        module: Any = self.module
        padding = module.padding
        if isinstance(padding, str):  # 'same' and 'valid'
            captured = F.pad(captured, module._reversed_padding_repeated_twice)
            padding = (0,) * len(module.kernel_size)
        options: list[Any] = [module.kernel_size, module.dilation, padding, module.stride]
        if captured.ndim == 3:  # unfold knows two dimensions only
            captured = captured[:, :, None]
            options = [(n, *option) for n, option in zip((1, 1, 0, 1), options, strict=True)]
        return F.unfold(captured, *options).mT

    def gradients(self, gradient: Tensor, captured: Tensor | None) -> Tensor:
        """Return the output gradients (B, L, out)."""
        return _channels_last(gradient)

    def positions(self, shape: torch.Size) -> int:
        """Return B * L."""
        return shape.numel() // shape[1]


class BiasTensor(LoraTensor):
    """A bias, which is the weight of an input that is always one: (out, 1)."""

    def captured(self, args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor) -> Tensor:
        """Return the ones (..., 1)."""
        return torch.ones_like(self._last(output.detach())[..., :1])

    def gradients(self, gradient: Tensor, captured: Tensor | None) -> Tensor:
        """Return the output gradients (..., out)."""
        return super().gradients(self._last(gradient), captured)

    def positions(self, shape: torch.Size) -> int:
        """Return the number of positions."""
        return shape.numel() // shape[1 if self._is_conv else -1]

    def _last(self, values: Tensor) -> Tensor:
        return _channels_last(values) if self._is_conv else values

    @property
    def _is_conv(self) -> bool:
        return isinstance(self.module, (nn.Conv1d, nn.Conv2d))


class MagnitudeTensor(LoraTensor):
    """The magnitudes m of a DoRA layer, (out, 1); its module returns ``(m / n) * h - h_0``.

    h are the layer's outputs with its adapter and h_0 those without, both without a bias, and n
    are the norms of the adapted weight, which PEFT does not differentiate (Liu et al., *DoRA:
    Weight-Decomposed Low-Rank Adaptation*, ICML 2024, section 4.3).
    """

    def captured(self, args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor) -> Tensor:
        """Return ``h / n`` (..., out)."""
        base, result = kwargs["base_layer"], kwargs.get("base_result")
        result = base(args[0]) if result is None else result
        if base.bias is not None:
            result = result - base.bias
        return (output + result) / self.weight

    def inputs(self, captured: Tensor) -> Tensor:
        """Return the ones (..., 1)."""
        return torch.ones_like(captured[..., :1])

    def gradients(self, gradient: Tensor, captured: Tensor | None) -> Tensor:
        """Return the gradients of each position's magnitudes (..., out)."""
        assert captured is not None
        return gradient * captured

    def without(self) -> Tensor:
        """Return the norms of the base weight, under which it is what it was."""
        layer: Any = self.layer
        weight = dequantize_module_weight(layer.get_base_layer()).detach().to(self.weight)
        module: Any = self.module
        return module.get_weight_norm(weight, weight.new_zeros(()), 0)


class EmbeddingTensor(LoraTensor):
    """``lora_embedding_B`` (d, r): its inputs are columns of ``lora_embedding_A``.

    PEFT reads both as parameters, so `module` is the layer itself.
    """

    @property
    def _adapter(self) -> str:
        return self.name.rpartition(".")[2]

    def captured(self, args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor) -> Tensor:
        """Return the token ids (..., 1)."""
        return args[0][..., None]

    def inputs(self, captured: Tensor) -> Tensor:
        """Return the embedded tokens (..., r)."""
        layer: Any = self.layer
        return F.embedding(captured[..., 0], layer.lora_embedding_A[self._adapter].detach().T)

    def gradients(self, gradient: Tensor, captured: Tensor | None) -> Tensor:
        """Return the output gradients (..., d), times the layer's scales."""
        layer: Any = self.layer
        scales = [layer.scaling[self._adapter]]
        if hasattr(layer, "_get_embed_scale"):  # Gemma's embeddings have one; since PEFT 0.18
            scales += [scale for scale in [layer._get_embed_scale()] if scale is not None]
        for scale in scales:
            gradient = gradient * scale
        return gradient


class OneHotTensor(EmbeddingTensor):
    """``lora_embedding_A`` (r, V): a linear map of one-hot tokens, which `inputs` has as numbers.

    They count from one; zero is padding, and what the embedding ignores.
    """

    def inputs(self, captured: Tensor) -> Tensor:
        """Return the tokens' numbers (..., 1)."""
        layer: Any = self.layer
        ignored = layer.get_base_layer().padding_idx
        return captured + 1 if ignored is None else (captured + 1) * (captured != ignored)

    def gradients(self, gradient: Tensor, captured: Tensor | None) -> Tensor:
        """Return the gradients of the embedded tokens (..., r)."""
        layer: Any = self.layer
        return (
            super().gradients(gradient, captured) @ layer.lora_embedding_B[self._adapter].detach()
        )

    def outer(self, gradients: Tensor, inputs: Tensor) -> Tensor:
        """Return ``sum_t g_t a_t^T`` (B, r, V)."""
        b, _, out = gradients.shape
        sums = gradients.new_zeros(b, self.shape[1] + 1, out)
        return sums.scatter_add(1, inputs.expand_as(gradients), gradients)[:, 1:].mT

    def total(self, inputs: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``sum_t a_t`` (B, V)."""
        return self.outer(torch.ones_like(inputs, dtype=dtype), inputs)[:, 0]

    def dense(self, inputs: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the one-hot tokens (B, S, V)."""
        return F.one_hot(inputs[..., 0], self.shape[1] + 1)[..., 1:].to(dtype)


def _channels_last(values: Tensor) -> Tensor:
    """Turn (B, C, *) into (B, L, C)."""
    return values.flatten(2).mT
