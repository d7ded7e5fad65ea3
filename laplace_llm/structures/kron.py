"""Kronecker-factored Laplace over LoRA weights, ``("lora", "kron")``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from laplace_llm._compat import CurvatureInterface, KronLaplace
from laplace_llm.adapters import Sides
from laplace_llm.curvature import BatchSummary
from laplace_llm.factors import LoraKron
from laplace_llm.kronecker import LoraKronDecomposed
from laplace_llm.laplace import LoraLaplace
from laplace_llm.options import check_flag
from laplace_llm.session import undisturbed_calls
from laplace_llm.shards import Shard
from laplace_llm.taps import Batch


@undisturbed_calls
class KronLoraLaplace(LoraLaplace, KronLaplace):
    """Kronecker-factored Laplace over LoRA weights, ``("lora", "kron")``; the default.

    The posterior precision of each LoRA tensor is ``B (x) A + delta``, with an exact r x r factor
    and a d x d one that is exact up to d = 128 and low-rank beyond (``backend_kwargs={"rank":
    ...}``, see `StreamingInterface` and `laplace_llm.sketch`). Source: Yang et al., *Bayesian
    Low-rank Adaptation for Large Language Models*, ICLR 2024.

    Parameters
    ----------
    damping : bool, default=False
        Add the root of the prior precision to each factor instead of the prior precision to their
        product (Ritter et al., 2018). The parent drops it on the way to its posterior.
    *args, **kwargs
        See `LoraLaplace`.
    """

    _key = ("lora", "kron")

    def __init__(
        self,
        model: nn.Module,
        likelihood: str = "classification",
        sigma_noise: float | Tensor = 1.0,
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | Tensor = 0.0,
        temperature: float = 1.0,
        enable_backprop: bool = False,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        backend: type[CurvatureInterface] | None = None,
        damping: bool = False,
        backend_kwargs: dict[str, Any] | None = None,
        asdl_fisher_kwargs: dict[str, Any] | None = None,
        adapter: str | None = None,
        tensors: Sides = "AB",
        include_modules_to_save: bool = False,
    ) -> None:
        check_flag("damping", damping)
        LoraLaplace.__init__(
            self, model, likelihood, sigma_noise, prior_precision, prior_mean, temperature,
            enable_backprop, dict_key_x, dict_key_y, backend, backend_kwargs, asdl_fisher_kwargs,
            adapter, tensors, include_modules_to_save, damping=damping,
        )  # fmt: skip

    @property
    def _prior_lengths(self) -> list[int]:
        return [1, self.n_layers]

    def _init_H(self) -> None:
        self.H: LoraKronDecomposed | None = None
        self.H_facs: LoraKron | None = None

    def _empty_curvature(self) -> LoraKron:
        rank = getattr(self.backend, "rank", max(max(t.shape) for t in self.tensors))
        return LoraKron.empty(self.tensors, rank, self._dtype)

    def _accumulate(self, state: LoraKron, x: Batch, y: Tensor) -> BatchSummary:
        return self._streaming.accumulate_kron(state, x, y)

    def _accumulate_parent(self, state: LoraKron, x: Batch, y: Tensor) -> Tensor:
        # N=1 makes the parent's input factor a sum over examples, which is what LoraKron keeps.
        loss, kron = self.backend.kron(x, y, N=1, **self._asdl_fisher_kwargs)
        for pair, factors in zip(state.pairs, kron.kfacs, strict=True):
            for moment, factor in zip((pair.outputs, pair.inputs), factors, strict=True):
                total = moment.sum.open()  # type: ignore[union-attr]
                total += factor.to(total)
        state.n_data += len(y)
        return loss

    def _over_all(self, state: LoraKron, shard: Shard) -> LoraKron:
        found = shard.exchange((state.n_data, state.sources))
        sources = [sources for n_data, sources in found if n_data]
        shared = all(other == sources[0] for other in sources)
        state.share_inputs(sources[0] if shared else list(range(len(state))))
        shard.sum(state.tensors())
        state.n_data = sum(n_data for n_data, _ in found)
        return state

    def _set_curvature(self, state: LoraKron, merge: bool) -> None:
        if merge and self.H_facs is not None:
            state.merge(self.H_facs)
        self.H = state.decompose(damping=self.damping)
        self.H_facs = state

    @property
    def log_det_ratio(self) -> Tensor:
        """``log det P - log det P_0``, computed as one (the parent subtracts two huge numbers)."""
        return self.posterior_precision.logdet_ratio().to(self._dtype)

    def _variance(self, jacobians: Sequence[Tensor]) -> Tensor:
        return self.posterior_precision.variance(jacobians)

    def _variance_grid(self, jacobians: Sequence[Tensor], values: Tensor) -> Tensor:
        return (self.H * self._H_factor).variance_grid(jacobians, values)

    def _tensor_variances(self, jacobians: Sequence[Tensor], values: Tensor) -> Tensor:
        parts = (self.H * self._H_factor).tensor_variances(jacobians, values)
        return torch.stack(list(parts), 1)

    def _options(self) -> dict[str, Any]:
        return {**super()._options(), "damping": self.damping}

    def _curvature_state(self) -> dict[str, Any]:
        assert self.H_facs is not None
        return self.H_facs.state()

    def _curvature_from_state(self, state: dict[str, Any]) -> Any:
        return self._empty_curvature().load(state)
