"""The linearised model at its training examples: a Gaussian process over their outputs.

With features J (the Jacobian in the ``lora_B`` weights) the linear model's outputs have the prior
``N(b, J J^T / delta)``, where b are the outputs of the model *without* its adapter. Everything
that tuning asks of the training data, the linear model's own mode, its evidence and its
leave-one-out predictions, follows from the one kernel matrix ``J J^T``.

``lora_A`` is left out as a fixed feature map: its prior is its own initialisation, of precision
``3 d_in``, under which its part of the kernel is negligible.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from laplace_llm.contrasts import choice_contrasts, contrasts
from laplace_llm.eigen import cholesky, decomposing, eigh
from laplace_llm.errors import PriorError
from laplace_llm.moments import Moments


class Mode(NamedTuple):
    """The linear model's mode at one prior precision.

    Attributes
    ----------
    latent : Tensor
        (N, K) outputs at the mode.
    dual : Tensor
        (N, K), with ``latent = b + J J^T dual / delta``; equals the log likelihood's gradient.
    """

    latent: Tensor
    dual: Tensor


@dataclass(frozen=True)
class FunctionSpace:
    """Outputs, labels and kernel of N training examples, in float64.

    Classification works in the K = C - 1 contrasts of the logits (`contrasts`), as the softmax
    does not see what all logits share; regression in its K = C outputs themselves. Where examples
    have different numbers of choices, each has the contrasts of its own, and zeros in the others.

    Attributes
    ----------
    trained : Tensor
        (N, K) outputs of the trained model.
    initial : Tensor
        (N, K) outputs of the model with ``lora_B = 0``.
    labels : Tensor
        (N,) class indices, or (N, K) targets for regression.
    kernel : Tensor
        (N K, N K), ``J J^T``.
    factor : float
        What the log likelihood is multiplied by: 1 / temperature, over the noise variance.
    present : Tensor, optional
        (N, C), which choices each example has; default: all.
    """

    trained: Tensor
    initial: Tensor
    labels: Tensor
    kernel: Tensor
    factor: float = 1.0
    present: Tensor | None = None

    @property
    def regression(self) -> bool:
        """Whether the labels are real-valued targets."""
        return self.labels.is_floating_point()

    @cached_property
    def basis(self) -> Tensor:
        """(C, K), or (N, C, K) with `present`: what outputs are projected on."""
        k = self.trained.shape[1]
        if self.regression:
            return torch.eye(k).to(self.trained)
        if self.present is None:
            return contrasts(k + 1, self.trained)
        return choice_contrasts(self.present, self.trained)

    def outputs(self, latent: Tensor) -> Tensor:
        """Return the outputs (N, C) of latent ones (N, K), less what an example's choices share.

        They are -inf for a choice that the example does not have.
        """
        outputs = (latent[:, None] @ self.basis.mT)[:, 0]
        return outputs if self.present is None else outputs.masked_fill(~self.present, -torch.inf)

    def output_covariances(self, covariances: Tensor) -> Tensor:
        """Return the covariances (..., N, C, C) of outputs from latent ones (..., N, K, K)."""
        return self.basis @ covariances @ self.basis.mT

    # The likelihood ------------------------------------------------------------------------------

    def log_likelihood(self, latent: Tensor) -> Tensor:
        """Return the log likelihood at outputs (N, K), summed (for regression: up to constants)."""
        if self.regression:
            return -0.5 * self.factor * (self.labels - latent).square().sum()
        return -self.factor * F.cross_entropy(self.outputs(latent), self.labels, reduction="sum")

    def _gradient(self, latent: Tensor) -> Tensor:
        if self.regression:
            return self.factor * (self.labels - latent)
        p = torch.softmax(self.outputs(latent), -1)
        residuals = F.one_hot(self.labels, p.shape[1]) - p
        return self.factor * (residuals[:, None] @ self.basis)[:, 0]

    def _hessian_root(self, latent: Tensor) -> Tensor:
        """Return L (N, K, K) with ``L L^T`` the negative Hessian of the log likelihood."""
        n, k = latent.shape
        if self.regression:
            return self.factor**0.5 * torch.eye(k).to(latent).expand(n, k, k)
        p = torch.softmax(self.outputs(latent), -1)
        scaled = self.basis * p[:, :, None].sqrt()  # (N, C, K)
        shared = p[:, None] @ self.basis  # (N, 1, K)
        hessian = scaled.mT @ scaled - shared.mT @ shared
        # Of a class whose probability rounds to 0 or 1, rounding is all that is left.
        values, vectors = eigh(hessian, "the likelihood's Hessian")
        return vectors * (self.factor * values.clamp_min(0)).sqrt()[:, None]

    # The linear model ----------------------------------------------------------------------------

    def mode(self, delta: float, start: Mode | None = None, steps: int = 100) -> Mode:
        """Return the mode under prior precision `delta`, by Newton's method in the dual.

        Source: Rasmussen and Williams, *Gaussian Processes for Machine Learning*, 2006,
        algorithm 3.3, with a prior mean and step halving.

        Parameters
        ----------
        delta : float
            Prior precision of the ``lora_B`` weights.
        start : Mode, optional
            Where to start from; default: the prior mean.
        steps : int, default=100
            At most so many Newton steps.

        Raises
        ------
        PriorError
            If the iteration does not converge.
        """
        n, k = self.trained.shape
        dual = torch.zeros_like(self.trained) if start is None else start.dual
        latent, energy = self._at(dual, delta)
        for _ in range(steps):
            root = self._hessian_root(latent)
            weighted = root @ (root.mT @ (latent - self.initial)[:, :, None])
            rhs = weighted[:, :, 0] + self._gradient(latent)
            factor = self._cholesky(root, delta)
            # a = rhs - S (I + S^T K S)^-1 S^T K rhs, with K = J J^T / delta and S the root.
            image = (self.kernel @ rhs.flatten() / delta).view(n, k, 1)
            inner = torch.cholesky_solve((root.mT @ image).view(-1, 1), factor).view(n, k, 1)
            direction = rhs - (root @ inner)[:, :, 0] - dual
            for halving in range(40):
                trial = dual + 0.5**halving * direction
                latent, lower = self._at(trial, delta)
                if bool(lower <= energy):
                    break
            else:  # no step lowers it any more: converged to rounding
                return Mode(self._at(dual, delta)[0], dual)
            change, dual, energy = energy - lower, trial, lower
            if bool(change <= 1e-10 * (1 + energy.abs())):
                return Mode(latent, dual)
        raise PriorError(f"The linear model's mode did not converge at prior precision {delta:g}.")

    def _at(self, dual: Tensor, delta: float) -> tuple[Tensor, Tensor]:
        """Return the outputs at `dual` and their negative log joint density."""
        shift = (self.kernel @ dual.flatten() / delta).view_as(dual)
        latent = self.initial + shift
        return latent, 0.5 * (dual * shift).sum() - self.log_likelihood(latent)

    def _cholesky(self, root: Tensor, delta: float) -> Tensor:
        """Return the Cholesky factor of ``I + S^T K S / delta``."""
        inner = self._between(root) / delta
        inner.diagonal().add_(1)
        return cholesky(inner, f"the training kernel at prior precision {delta:g}")

    def _between(self, root: Tensor) -> Tensor:
        """Return ``S^T J J^T S`` (N K, N K) for the block-diagonal S of `root`."""
        n, k = self.trained.shape
        right = (self.kernel.view(-1, n, k).transpose(0, 1) @ root).transpose(0, 1)
        return (root.mT @ right.reshape(n, k, -1)).reshape(n * k, n * k)

    def log_evidence(self, delta: float, start: Mode | None = None) -> tuple[Tensor, Mode]:
        """Return Laplace's log evidence at the linear model's own mode, and that mode.

        Source: Antoran et al., *Adapting the Linearised Laplace Model Evidence for Modern Deep
        Learning*, ICML 2022.
        """
        mode = self.mode(delta, start)
        factor = self._cholesky(self._hessian_root(mode.latent), delta)
        return -self._at(mode.dual, delta)[1] - factor.diagonal().log().sum(), mode

    def leave_one_out(self, mode: Mode, delta: float) -> Moments:
        """Return what the linear model says of each example from all the others.

        The example's likelihood is taken out of the Gaussian around `mode`, to first order:
        ``V_-i = V_i (I - W_i V_i)^-1`` and ``m_-i = f_i - V_-i r_i``.

        Parameters
        ----------
        mode : Mode
            The mode under `delta`.
        delta : float
            Prior precision.

        Returns
        -------
        moments : Moments
            Mean (N, C) and covariance (N, C, C) of the outputs.
        """
        cavity = self.cavities(mode, self.kernel.new_tensor([delta]))[0]
        mean = mode.latent - (cavity @ self._gradient(mode.latent)[:, :, None])[:, :, 0]
        return Moments(self.outputs(mean), self.output_covariances(cavity))

    def cavities(self, mode: Mode, deltas: Tensor) -> Tensor:
        """Return the leave-one-out covariances around `mode` under G prior precisions.

        One eigendecomposition serves all of them; `mode` need not belong to any.

        Parameters
        ----------
        mode : Mode
            Where the likelihood's curvature is taken.
        deltas : Tensor
            (G,) prior precisions.

        Returns
        -------
        covariances : Tensor
            (G, N, K, K).
        """
        n, k = self.trained.shape
        deltas = deltas.to(self.kernel)
        root = self._hessian_root(mode.latent)
        # V = (K - K S (delta + S^T K S)^-1 S^T K) / delta with K = J J^T and S the root.
        values, vectors = eigh(self._between(root), "the training kernel")
        right = (root.mT @ self.kernel.view(n, k, -1)).reshape(n * k, -1)
        half = (vectors.T @ right).view(n * k, n, k)
        weights = 1 / (deltas[:, None] + values.clamp_min(0))  # (G, N K)
        blocks = self.kernel.view(n, k, n, k).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        variance = (blocks - _weighted(half, weights)) / deltas[:, None, None, None]
        # V (I - S S^T V)^-1 = V + V S (I - S^T V S)^-1 S^T V, symmetric in every step; and the
        # difference is a block of delta (delta + S^T K S)^-1, which does not cancel.
        moved = root.mT @ variance
        inner = _weighted(vectors.T.reshape(n * k, n, k), deltas[:, None] * weights)
        with decomposing("the leave-one-out covariances"):
            cavity = variance + moved.mT @ torch.linalg.solve(inner, moved)
        return (cavity + cavity.mT) / 2


def _weighted(rows: Tensor, weights: Tensor) -> Tensor:
    """Return ``sum_m w_gm r_mn r_mn^T`` (G, N, K, K) of rows (M, N, K) and weights (G, M)."""
    parts = []
    for row in rows.unbind(1):  # (M, K); all outer products at once would take N times as much
        outer = (row[:, :, None] * row[:, None, :]).flatten(1)
        parts.append((weights @ outer).unflatten(1, (row.shape[1], -1)))
    return torch.stack(parts, 1)
