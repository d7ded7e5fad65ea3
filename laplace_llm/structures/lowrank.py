"""Low-rank Laplace over all LoRA weights together, ``("lora", "lowrank")``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from laplace_llm._compat import CurvatureInterface, ParametricLaplace
from laplace_llm.adapters import Sides
from laplace_llm.curvature import BatchSummary, check_streaming
from laplace_llm.eigen import eigh
from laplace_llm.errors import OptionError
from laplace_llm.laplace import LoraLaplace
from laplace_llm.lowrank import LowRankPrecision
from laplace_llm.options import check_optional_count
from laplace_llm.rows import LowRankGGN
from laplace_llm.session import undisturbed_calls
from laplace_llm.shards import Shard
from laplace_llm.taps import Batch


@undisturbed_calls
class LowRankLoraLaplace(LoraLaplace, ParametricLaplace):
    """Laplace over LoRA weights with the GGN of all tensors together, ``("lora", "lowrank")``.

    Exact while the GGN's rank, N (C - 1) for N examples of C classes, is at most `max_rank`;
    beyond, its leading eigenpairs are kept and ``la.H.lost_trace`` says what was lost. Unlike
    the Kronecker structures it keeps the correlations between layers, which its marginal
    likelihood needs. Unlike in the parent (whose ``lowrank`` runs on a retired backend only),
    ``fit(override=False)`` adds data, and mappings are accepted as batches.

    Parameters
    ----------
    max_rank : int, optional
        At most 1.25 x `max_rank` rows of P values are kept; None keeps every row.
    factors_on : {'cpu', 'disk'}, optional
        Where the rows are kept; default: on the model's device. 'disk' is a temporary file.
    *args, **kwargs
        See `LoraPosterior`; the backend must be one of the streaming ones.

    Raises
    ------
    OptionError
        If `max_rank`, `factors_on` or the backend is not one of these.
    """

    _key = ("lora", "lowrank")

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
        backend_kwargs: dict[str, Any] | None = None,
        asdl_fisher_kwargs: dict[str, Any] | None = None,
        adapter: str | None = None,
        tensors: Sides = "AB",
        include_modules_to_save: bool = False,
        max_rank: int | None = 1024,
        factors_on: Literal["cpu", "disk"] | None = None,
    ) -> None:
        check_optional_count("max_rank", max_rank)
        if factors_on not in (None, "cpu", "disk"):
            raise OptionError(f"Expected factors_on=None, 'cpu' or 'disk', but got {factors_on!r}.")
        check_streaming(backend, "the rows of a GGN")
        self.max_rank, self.factors_on = max_rank, factors_on
        LoraLaplace.__init__(
            self, model, likelihood, sigma_noise, prior_precision, prior_mean, temperature,
            enable_backprop, dict_key_x, dict_key_y, backend, backend_kwargs, asdl_fisher_kwargs,
            adapter, tensors, include_modules_to_save,
        )  # fmt: skip

    def _init_H(self) -> None:
        self.H: LowRankGGN | None = None

    def _empty_curvature(self) -> LowRankGGN:
        sizes = [tensor.numel for tensor in self.tensors]
        return LowRankGGN(sizes, self.max_rank, self._dtype, self._device, self.factors_on)

    def _accumulate(self, state: LowRankGGN, x: Batch, y: Tensor) -> BatchSummary:
        return self._streaming.accumulate_rows(state, x, y)

    def _accumulate_parent(self, state: LowRankGGN, x: Batch, y: Tensor) -> Tensor:
        raise AssertionError("the constructor takes streaming backends only")

    def _over_all(self, state: LowRankGGN, shard: Shard) -> LowRankGGN:
        shard.sum([state.trace, state.lost_trace])
        total = self._empty_curvature()
        own = [(part,) for part in state.store.parts()]
        parts = (part for (part,) in shard.gather(own, self._device))
        total.extend(parts, state.trace, state.lost_trace)
        return total

    def _set_curvature(self, state: LowRankGGN, merge: bool) -> None:
        if merge and self.H is not None:
            state.merge(self.H)
        state.truncate()
        self._spectrum = eigh(state.gram(), "the GGN of all tensors")
        self._grams: Tensor | None = None
        self.H = state

    def _precision(self, deltas: Tensor) -> LowRankPrecision:
        self._check_H_init()
        assert self.H is not None
        if len(deltas) == self.n_layers > 1 and self._grams is None:
            self._grams = self.H.grams()
        return LowRankPrecision(self.H, self._H_factor, deltas, self._spectrum, self._grams)

    @property
    def posterior_precision(self) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """``(U, l), d`` with precision ``U diag(l) U^T + diag(d)``; U is (P, k), as in the parent.

        U is made on every call; prediction, sampling and evidence do without it.
        """
        self._check_H_init()
        assert self.H is not None
        precision = self._precision(torch.ones(1).to(self.mean))
        values, vectors = precision.spectrum()
        values = values * precision.deltas.double()
        basis = (vectors / values.sqrt()).to(self._dtype)
        rows = [self.H.store.columns_of(*block).T @ basis for block in self.H.blocks()]
        return (torch.cat(rows), self._H_factor * values.to(self._dtype)), self.prior_precision_diag

    @property
    def log_det_ratio(self) -> Tensor:
        """``log det P - log det P_0``, computed as one (the parent subtracts two huge numbers)."""
        return self._precision(self.prior_precision).logdet_ratio().to(self._dtype)

    def square_norm(self, value: Tensor) -> Tensor:
        """Return ``(value - mean)^T P (value - mean)``."""
        (vectors, values), prior = self.posterior_precision
        delta = value - self.mean
        return (delta @ vectors).square() @ values + delta.square() @ prior

    def sample(self, n_samples: int = 100, generator: torch.Generator | None = None) -> Tensor:
        """Return (n_samples, P) draws from the posterior."""
        self._check_H_init()
        self._check_sampling(n_samples, generator)
        return self.mean + self._precision(self.prior_precision).sample(n_samples, generator)

    def _variance(self, jacobians: Sequence[Tensor]) -> Tensor:
        return self._precision(self.prior_precision).variance(jacobians)

    def _variance_grid(self, jacobians: Sequence[Tensor], values: Tensor) -> Tensor:
        return self._precision(values.new_ones(1)).variance_grid(jacobians, values)

    def functional_variance(self, Js: Tensor) -> Tensor:
        """Return ``J P^-1 J^T`` (B, C, C) for Jacobians (B, C, P)."""
        self._check_H_init()
        assert self.H is not None
        return self._variance(Js.split(self.H.sizes, -1))

    def functional_covariance(self, Js: Tensor) -> Tensor:
        """Return the joint covariance (B C, B C) for Jacobians (B, C, P)."""
        return self.functional_variance(Js.flatten(0, 1)[None])[0]

    def _options(self) -> dict[str, Any]:
        return {**super()._options(), "max_rank": self.max_rank}

    def _curvature_state(self) -> dict[str, Any]:
        assert self.H is not None
        return self.H.state()

    def _curvature_from_state(self, state: dict[str, Any]) -> LowRankGGN:
        return self._empty_curvature().load(state)
