"""Training outputs as a Gaussian process sees them: Jacobian rows, curvatures and residuals."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from laplace_llm.errors import StateError
from laplace_llm.rows import LowRankGGN, sum_of_squares


class OutputRows(LowRankGGN):
    """The GGN of M examples under a diagonal output Hessian: one row ``sqrt(w) J`` an output.

    With ``W = diag(w)`` and the prior precision D, Woodbury's identity makes the posterior
    covariance ``J* (D + J^T W J)^-1 J*^T`` that of a Gaussian process with the kernel
    ``J D^-1 J^T`` and noise variances ``1 / w``. Rows are ordered by example, then output.
    Takes the arguments of `LowRankGGN`.

    Attributes
    ----------
    weights : Tensor
        (M, C), the diagonals w of the output Hessian. Where a probability has rounded to 0 or 1,
        a tiny number takes the place of 0.
    residuals : Tensor
        (M, C), targets minus outputs for regression, else 0.
    """

    weights: Tensor
    residuals: Tensor

    def add_outputs(self, jacobian: Iterable[Tensor], weights: Tensor, residuals: Tensor) -> None:
        """Add a batch.

        Parameters
        ----------
        jacobian : Iterable[Tensor]
            (B, P) rows of each output.
        weights, residuals : Tensor
            (B, C).
        """
        dtype = self.store.dtype
        weights = weights.to(dtype).clamp_min(torch.finfo(dtype).tiny ** 0.5)
        block = self.store.extend(weights.numel()).view(*weights.shape, -1)
        for output, rows in enumerate(jacobian):
            rows = weights[:, output, None].sqrt() * rows
            self.trace += sum_of_squares(rows)
            block[:, output] = rows
        self.join(weights, residuals.to(dtype))

    def join(self, weights: Tensor, residuals: Tensor) -> None:
        """Add the weights and residuals of rows that were added."""
        if not hasattr(self, "weights"):
            self.weights, self.residuals = weights, residuals
            return
        self.weights = torch.cat([self.weights, weights])
        self.residuals = torch.cat([self.residuals, residuals])

    def merge(self, other: LowRankGGN) -> None:
        """Add the outputs of other examples."""
        assert isinstance(other, OutputRows)
        super().merge(other)
        self.join(other.weights, other.residuals)

    def separate(self) -> list[OutputRows]:
        """Return C views, one of each output's rows alone."""
        views = []
        for output in range(self.weights.shape[1]):
            view = copy.copy(self)
            view.store = self.store.every(self.weights.shape[1], output)
            view.weights, view.residuals = (
                values[:, output, None] for values in (self.weights, self.residuals)
            )
            views.append(view)
        return views

    def project(self, values: Tensor) -> Tensor:
        """Return ``J values`` (m,) in float64 for a vector (P,) of weights."""
        parts = (
            self.store.columns_of(start, stop) @ values[start:stop] for start, stop in self.blocks()
        )
        return sum(part.double() for part in parts) / self.scale

    @property
    def scale(self) -> Tensor:
        """What each Jacobian row was multiplied by, (m,) in float64."""
        return self.weights.flatten().double().sqrt()

    def state(self) -> dict[str, Any]:
        """Return plain containers of tensors and numbers, for `torch.save`."""
        return {**super().state(), "weights": self.weights, "residuals": self.residuals}

    def load(self, state: dict[str, Any]) -> OutputRows:
        """Return new rows with the contents of `state`, in this one's place."""
        missing = {"weights", "residuals"} - set(state)
        if missing:
            raise StateError(
                f"Expected a state with {sorted(missing)} of training outputs, but it has "
                f"{sorted(state)}. Load it into the posterior it came from."
            )
        new = super().load(state)
        assert isinstance(new, OutputRows)
        new.join(*(state[key].to(self.trace.device) for key in ("weights", "residuals")))
        return new
