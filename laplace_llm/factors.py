"""Streaming Kronecker factors of LoRA tensors: sums over data that add up and can be stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laplace_llm.errors import StateError
from laplace_llm.kronecker import Block, LoraKronDecomposed
from laplace_llm.sketch import DenseMoment, Moment, SketchedMoment, Spectrum, new_moment, spectra
from laplace_llm.tensors import LoraTensor


@dataclass
class FactorPair:
    """Running sums for one tensor of shape (out, in).

    The curvature is ``outputs (x) inputs / n_data``: `inputs` sums the second moments of the
    inputs, `outputs` those of the output gradients.
    """

    outputs: Moment
    inputs: Moment

    @property
    def largest_trace(self) -> Tensor:
        """The larger of the factors' traces (NaN if one is), which bounds all their numbers."""
        return torch.maximum(self.outputs.trace, self.inputs.trace.to(self.outputs.trace))


class LoraKron:
    """Kronecker factors of all LoRA tensors, as sums over data.

    Parameters
    ----------
    pairs : list[FactorPair]
        One a tensor, in the order of the tensors.
    small_outputs : list[bool]
        For each tensor whether its outputs' factor is the small one, or its inputs'.
    n_data : int
        Number of examples summed so far.
    sources : list[int], optional
        For each tensor the first one that reads the same input and so shares its input factor
        (the ``lora_A`` of q, k and v); default: each has its own.
    """

    def __init__(
        self,
        pairs: list[FactorPair],
        small_outputs: list[bool],
        n_data: int = 0,
        sources: list[int] | None = None,
    ) -> None:
        self.pairs = pairs
        self.small_outputs = small_outputs
        self.n_data = n_data
        self.sources = list(range(len(pairs))) if sources is None else sources

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
            small_out = tensor.small_outputs
            pairs.append(
                FactorPair(
                    outputs=new_moment(out, rank, dtype, device, small=small_out),
                    inputs=new_moment(in_, rank, dtype, device, small=not small_out),
                )
            )
        return cls(pairs, [tensor.small_outputs for tensor in tensors])

    def __len__(self) -> int:
        return len(self.pairs)

    def share_inputs(self, sources: list[int]) -> None:
        """Keep one input factor for tensors that read the same input, if no data tell otherwise.

        Parameters
        ----------
        sources : list[int]
            As for the class.
        """
        if sources == self.sources:
            return
        if self.n_data == 0:
            self.sources = sources
            for pair, source in zip(self.pairs, sources, strict=True):
                pair.inputs = self.pairs[source].inputs
            return
        for index, source in enumerate(self.sources):
            if source != index:
                self.pairs[index].inputs = deepcopy(self.pairs[source].inputs)
        self.sources = list(range(len(self)))

    def own_inputs(self) -> Iterator[int]:
        """Yield the tensors that every input factor is kept with."""
        return (index for index, source in enumerate(self.sources) if index == source)

    def tensors(self) -> list[Tensor]:
        """Return what adds up over parts of the data, of every factor once; to be written to."""
        moments = [pair.outputs for pair in self.pairs]
        moments += [self.pairs[index].inputs for index in self.own_inputs()]
        return [tensor for moment in moments for tensor in moment.tensors()]

    def merge(self, other: LoraKron) -> None:
        """Add the factors and counts of another run over the same tensors, in place."""
        self.share_inputs(other.sources)
        for mine, theirs in zip(self.pairs, other.pairs, strict=True):
            mine.outputs.merge(theirs.outputs)
        for index in self.own_inputs():
            self.pairs[index].inputs.merge(other.pairs[index].inputs)
        self.n_data += other.n_data

    def decompose(self, damping: bool = False) -> LoraKronDecomposed:
        """Eigendecompose all factors.

        Parameters
        ----------
        damping : bool, default=False
            Whether the prior precision is added to each factor (its square root) instead of to
            their product.
        """
        moments = [moment for pair in self.pairs for moment in (pair.outputs, pair.inputs)]
        found, blocks = spectra(moments), []
        for outputs, inputs, small_out in zip(
            found[::2], found[1::2], self.small_outputs, strict=True
        ):
            inputs = inputs.scaled(1 / max(self.n_data, 1))
            small, large = (outputs, inputs) if small_out else (inputs, outputs)
            blocks.append(Block(small, large, transposed=not small_out))
        return LoraKronDecomposed(blocks, damping=damping)

    def state(self) -> dict[str, Any]:
        """Return plain containers of tensors and numbers, for `torch.save`."""
        pairs = [{"outputs": _moment_state(pair.outputs)} for pair in self.pairs]
        for index in self.own_inputs():
            pairs[index]["inputs"] = _moment_state(self.pairs[index].inputs)
        return {"pairs": pairs, "n_data": self.n_data, "sources": self.sources}

    def load(self, state: dict[str, Any]) -> LoraKron:
        """Return new factors with the contents of `state`, checked against this one's shapes."""
        if len(state["pairs"]) != len(self):
            raise StateError(
                f"Expected factors of {len(self)} LoRA tensors, but the state has "
                f"{len(state['pairs'])}. Load it into a model with the same adapter."
            )
        pairs: list[FactorPair] = []
        for mine, saved, source in zip(self.pairs, state["pairs"], state["sources"], strict=True):
            own = "inputs" in saved
            inputs = _moment_from_state(saved["inputs"], mine.inputs) if own else None
            pairs.append(
                FactorPair(
                    outputs=_moment_from_state(saved["outputs"], mine.outputs),
                    inputs=pairs[source].inputs if inputs is None else inputs,
                )
            )
        return LoraKron(pairs, self.small_outputs, int(state["n_data"]), list(state["sources"]))


def _moment_state(moment: Moment) -> dict[str, Any]:
    if isinstance(moment, DenseMoment):
        return {"matrix": moment.matrix}
    if moment.spectrum is None:
        return {"sketch": moment.sketch, "trace": moment.trace}
    return {**vars(moment.spectrum), "trace": moment.trace}


def _moment_from_state(state: dict[str, Any], like: Moment) -> Moment:
    """Rebuild a moment on the device and dtype of `like`, which also gives the expected shape."""
    dense = isinstance(like, DenseMoment)
    shape = like.matrix.shape if isinstance(like, DenseMoment) else like.shape
    keys = ("matrix",) if dense else ("sketch", "vectors")
    saved = next((state[key] for key in keys if key in state), None)
    if saved is None or saved.shape != shape:
        came = f"shape {tuple(saved.shape)}" if saved is not None else "a factor of another kind"
        raise StateError(
            f"Expected a Kronecker factor of shape {tuple(shape)}, but the state has "
            f"{came}. Load it with the same adapter and backend_kwargs (rank) as it was saved."
        )
    if isinstance(like, DenseMoment):
        return DenseMoment(state["matrix"].to(like.matrix))
    trace, place = state["trace"].to(like.trace), (like.trace.device, like.dtype)
    if "sketch" in state:
        return SketchedMoment(state["sketch"].to(*place), trace)
    spectrum = Spectrum(*(state[key].to(*place) for key in ("vectors", "values", "rest")))
    return SketchedMoment.of_spectrum(spectrum, trace)
