"""Streaming Kronecker factors of LoRA tensors: sums over data that add up and can be stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laplace_llm.adapters import LoraTensor
from laplace_llm.errors import StateError
from laplace_llm.kronecker import Block, LoraKronDecomposed
from laplace_llm.sketch import DenseMoment, Moment, SketchedMoment, new_moment


@dataclass
class FactorPair:
    """Running sums for one tensor of shape (out, in).

    The curvature is ``outputs (x) inputs / n_data``: `inputs` sums the second moments of the
    inputs, `outputs` those of the output gradients.
    """

    outputs: Moment
    inputs: Moment

    @property
    def trace(self) -> Tensor:
        """Product of the factors' traces, a scalar that is finite only if both factors are."""
        return self.outputs.trace * self.inputs.trace


class LoraKron:
    """Kronecker factors of all LoRA tensors, as sums over data.

    Parameters
    ----------
    pairs : list[FactorPair]
        One a tensor, in the order of the tensors.
    sides : list[str]
        'A' or 'B' of each tensor: which of the factors is the small one.
    n_data : int
        Number of examples summed so far.
    """

    def __init__(self, pairs: list[FactorPair], sides: list[str], n_data: int = 0) -> None:
        self.pairs = pairs
        self.sides = sides
        self.n_data = n_data

    @classmethod
    def empty(
        cls,
        tensors: Sequence[LoraTensor],
        rank: int | None,
        dtype: torch.dtype,
    ) -> LoraKron:
        """Make factors that have seen no data; `rank` as in `laplace_llm.sketch.new_moment`."""
        pairs = []
        for tensor in tensors:
            (out, in_), device = tensor.shape, tensor.weight.device
            small_out = tensor.side == "A"
            pairs.append(
                FactorPair(
                    outputs=new_moment(out, rank, dtype, device, small=small_out),
                    inputs=new_moment(in_, rank, dtype, device, small=not small_out),
                )
            )
        return cls(pairs, [tensor.side for tensor in tensors])

    def __len__(self) -> int:
        return len(self.pairs)

    def merge(self, other: LoraKron) -> None:
        """Add the factors and counts of another run over the same tensors, in place."""
        for mine, theirs in zip(self.pairs, other.pairs, strict=True):
            mine.outputs.merge(theirs.outputs)
            mine.inputs.merge(theirs.inputs)
        self.n_data += other.n_data

    def decompose(self, damping: bool = False) -> LoraKronDecomposed:
        """Eigendecompose all factors.

        Parameters
        ----------
        damping : bool, default=False
            Whether the prior precision is added to each factor (its square root) instead of to
            their product.
        """
        blocks = []
        for pair, side in zip(self.pairs, self.sides, strict=True):
            outputs = pair.outputs.spectrum()
            inputs = pair.inputs.spectrum().scaled(1 / max(self.n_data, 1))
            small, large = (outputs, inputs) if side == "A" else (inputs, outputs)
            blocks.append(Block(small, large, transposed=side == "B"))
        return LoraKronDecomposed(blocks, damping=damping)

    def state(self) -> dict[str, Any]:
        """Return plain containers of tensors and numbers, for `torch.save`."""
        pairs = [
            {"outputs": _moment_state(p.outputs), "inputs": _moment_state(p.inputs)}
            for p in self.pairs
        ]
        return {"pairs": pairs, "n_data": self.n_data}

    def load(self, state: dict[str, Any]) -> LoraKron:
        """Return new factors with the contents of `state`, checked against this one's shapes."""
        if len(state["pairs"]) != len(self):
            raise StateError(
                f"Expected factors of {len(self)} LoRA tensors, but the state has "
                f"{len(state['pairs'])}. Load it into a model with the same adapter."
            )
        pairs = [
            FactorPair(
                outputs=_moment_from_state(saved["outputs"], mine.outputs),
                inputs=_moment_from_state(saved["inputs"], mine.inputs),
            )
            for saved, mine in zip(state["pairs"], self.pairs, strict=True)
        ]
        return LoraKron(pairs, self.sides, int(state["n_data"]))


def _moment_state(moment: Moment) -> dict[str, Any]:
    if isinstance(moment, DenseMoment):
        return {"matrix": moment.matrix}
    return {"sketch": moment.sketch, "trace": moment.trace, "rank": moment.rank}


def _moment_from_state(state: dict[str, Any], like: Moment) -> Moment:
    """Rebuild a moment on the device and dtype of `like`, which also gives the expected shape."""
    if isinstance(like, DenseMoment):
        expected, saved = like.matrix, state.get("matrix")
    else:
        expected, saved = like.sketch, state.get("sketch")
    same_rank = isinstance(like, DenseMoment) or state.get("rank") == like.rank
    if saved is None or saved.shape != expected.shape or not same_rank:
        came = "a factor of another kind or rank"
        if saved is not None and saved.shape != expected.shape:
            came = f"shape {tuple(saved.shape)}"
        raise StateError(
            f"Expected a Kronecker factor of shape {tuple(expected.shape)}, but the state has "
            f"{came}. Load it with the same adapter and backend_kwargs (rank) as it was saved."
        )
    saved = saved.to(expected)
    if isinstance(like, DenseMoment):
        return DenseMoment(saved)
    return SketchedMoment(saved, state["trace"].to(expected), int(state["rank"]))
