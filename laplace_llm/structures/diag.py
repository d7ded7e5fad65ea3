"""Diagonal Laplace over LoRA weights, ``("lora", "diag")``."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence

import torch
from torch import Tensor

from laplace_llm._compat import AsdlInterface, DiagLaplace, EFInterface
from laplace_llm.curvature import BatchSummary
from laplace_llm.errors import OptionError
from laplace_llm.laplace import LoraLaplace
from laplace_llm.session import undisturbed_calls
from laplace_llm.taps import Batch


@undisturbed_calls
class DiagLoraLaplace(LoraLaplace, DiagLaplace):
    """Laplace over LoRA weights with the exact diagonal of the GGN, ``("lora", "diag")``.

    Takes the arguments of `LoraLaplace`.
    """

    _key = ("lora", "diag")

    def _empty_curvature(self) -> Tensor:
        return torch.zeros(self.n_params, dtype=torch.float64, device=self._device)

    def _accumulate(self, state: Tensor, x: Batch, y: Tensor) -> BatchSummary:
        return self._streaming.accumulate_diag(state, x, y)

    def _accumulate_parent(self, state: Tensor, x: Batch, y: Tensor) -> Tensor:
        by_vmap = isinstance(self.backend, EFInterface) and not isinstance(
            self.backend, AsdlInterface
        )
        if by_vmap and isinstance(x, MutableMapping):
            raise OptionError(
                f"{self._backend_cls.__name__} computes a diagonal with vmap, which cannot take "
                "batches that are mappings. Use backend=StreamingEF."
            )
        loss, diagonal = self.backend.diag(x, y, N=1, **self._asdl_fisher_kwargs)
        state += diagonal.to(state)
        return loss

    def _set_curvature(self, state: Tensor, merge: bool) -> None:
        self.H = (state + self.H if merge else state).to(self._dtype)

    @property
    def log_det_ratio(self) -> Tensor:
        """``log det P - log det P_0``, computed as one (the parent subtracts two huge numbers)."""
        self._check_H_init()
        curvature = self._H_factor * self.H.double()
        return (curvature / self.prior_precision_diag).log1p().sum().to(self._dtype)

    def _variance(self, jacobians: Sequence[Tensor]) -> Tensor:
        variances = self.posterior_variance.split([j.shape[-1] for j in jacobians])
        on_one_device = [j.to(self.mean.device) for j in jacobians]
        parts = [(j * v) @ j.mT for j, v in zip(on_one_device, variances, strict=True)]
        return torch.stack(parts).sum(0)

    def _tensor_variances(self, jacobians: Sequence[Tensor], values: Tensor) -> Tensor:
        parts = []
        curvature = (self._H_factor * self.H).split([j.shape[-1] for j in jacobians])
        for jacobian, precision in zip(jacobians, curvature, strict=True):
            jacobian = jacobian.to(precision.device)
            parts.append(torch.stack([(jacobian / (precision + v)) @ jacobian.mT for v in values]))
        return torch.stack(parts, 1)
