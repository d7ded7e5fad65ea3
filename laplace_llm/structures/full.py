"""Dense Laplace over LoRA weights, ``("lora", "full")``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from laplace_llm._compat import FullLaplace
from laplace_llm.curvature import BatchSummary
from laplace_llm.eigen import eigh
from laplace_llm.laplace import LoraLaplace
from laplace_llm.session import undisturbed_calls
from laplace_llm.taps import Batch, gathered


@undisturbed_calls
class FullLoraLaplace(LoraLaplace, FullLaplace):
    """Laplace over LoRA weights with the dense GGN, ``("lora", "full")``; for small P only.

    Takes the arguments of `LoraLaplace`. Memory is P x P in float64, allocated by `fit`: next to a
    small prior precision the GGN has no inverse in single precision. The parent's Cholesky factor
    of P^-1, which there may be none of, gives way to a root from eigenvectors, which is not
    triangular.
    """

    _key = ("lora", "full")
    _posterior_scale: Tensor | None

    def _empty_curvature(self) -> Tensor:
        return torch.zeros(self.n_params, self.n_params, dtype=torch.float64, device=self._device)

    def _accumulate(self, state: Tensor, x: Batch, y: Tensor) -> BatchSummary:
        return self._streaming.accumulate_full(state, x, y)

    def _accumulate_parent(self, state: Tensor, x: Batch, y: Tensor) -> Tensor:
        loss, matrix = self.backend.full(x, y, N=1, **self._asdl_fisher_kwargs)
        state += matrix.to(state)
        return loss

    def _set_curvature(self, state: Tensor, merge: bool) -> None:
        self.H = state + self.H if merge else state
        self._posterior_scale = None
        self._spectrum: tuple[Tensor, Tensor] | None = None

    @property
    def posterior_precision(self) -> Tensor:
        """Posterior precision (P, P)."""
        self._check_H_init()
        return (self._H_factor * self.H + self.prior_precision_diag.diag()).to(self._dtype)

    def _whitened(self) -> tuple[Tensor, Tensor]:
        """Return the eigenpairs of ``P_0^-1/2 H P_0^-1/2`` (times `_H_factor`), in float64."""
        self._check_H_init()
        if len(self.prior_precision) == 1:  # one decomposition serves all of them
            if self._spectrum is None:
                self._spectrum = eigh(self.H, "the GGN")
            values, vectors = self._spectrum
            values = values / self.prior_precision.double()
        else:
            scale = self.prior_precision_diag.double().rsqrt()
            values, vectors = eigh(scale[:, None] * self.H * scale, "the whitened GGN")
        # Below is only rounding, of eigenvalues that are not negative.
        rounding = len(values) * torch.finfo(values.dtype).eps * values.detach()[-1]
        return self._H_factor * torch.where(values > rounding, values, 0), vectors

    @property
    def log_det_ratio(self) -> Tensor:
        """``log det P - log det P_0``, computed as one (the parent subtracts two huge numbers)."""
        return self._whitened()[0].log1p().sum().to(self._dtype)

    def _compute_scale(self) -> None:
        values, vectors = self._whitened()
        root = self.prior_precision_diag.double().rsqrt()
        self._posterior_scale = (root[:, None] * vectors * (1 + values).rsqrt()).to(self._dtype)

    def _variance(self, jacobians: Sequence[Tensor]) -> Tensor:
        return self.functional_variance(gathered(jacobians, -1))

    def functional_variance(self, Js: Tensor) -> Tensor:
        """Return ``J P^-1 J^T`` (B, C, C) for Jacobians (B, C, P)."""
        scaled = Js @ self.posterior_scale
        return scaled @ scaled.mT

    def functional_covariance(self, Js: Tensor) -> Tensor:
        """Return the joint covariance (B C, B C) for Jacobians (B, C, P)."""
        return self.functional_variance(Js.flatten(0, 1)[None])[0]
