"""Dense Laplace over LoRA weights, ``("lora", "full")``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from laplace_llm._compat import FullLaplace
from laplace_llm.curvature import BatchSummary
from laplace_llm.laplace import LoraLaplace
from laplace_llm.session import undisturbed_calls
from laplace_llm.taps import Batch, gathered


@undisturbed_calls
class FullLoraLaplace(LoraLaplace, FullLaplace):
    """Laplace over LoRA weights with the dense GGN, ``("lora", "full")``; for small P only.

    Takes the arguments of `LoraLaplace`. Memory is P x P, allocated by `fit`.
    """

    _key = ("lora", "full")

    def _empty_curvature(self) -> Tensor:
        return torch.zeros(self.n_params, self.n_params, dtype=self._dtype, device=self._device)

    def _accumulate(self, state: Tensor, x: Batch, y: Tensor) -> BatchSummary:
        return self._streaming.accumulate_full(state, x, y)

    def _accumulate_parent(self, state: Tensor, x: Batch, y: Tensor) -> Tensor:
        loss, matrix = self.backend.full(x, y, N=1, **self._asdl_fisher_kwargs)
        state += matrix.to(state)
        return loss

    def _set_curvature(self, state: Tensor, merge: bool) -> None:
        self.H = state + self.H if merge else state
        self._posterior_scale = None

    def _variance(self, jacobians: Sequence[Tensor]) -> Tensor:
        return self.functional_variance(gathered(jacobians, -1))
