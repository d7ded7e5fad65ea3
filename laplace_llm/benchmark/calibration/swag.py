"""SWAG's Gaussian over weights (Maddox et al., NeurIPS 2019): moments of training's iterates."""

from __future__ import annotations

import torch
from torch import Tensor


class SwagMoments:
    """Mean, diagonal and low-rank covariance of weight vectors that come one by one.

    Parameters
    ----------
    max_rank : int, default=20
        Deviations kept, the latest ones; K in the paper.
    """

    def __init__(self, max_rank: int = 20) -> None:
        if max_rank < 2:
            raise ValueError(f"Expected max_rank of at least 2, but got {max_rank}.")
        self.max_rank = max_rank
        self.count = 0
        self.mean = torch.empty(0)
        self.square = torch.empty(0)
        self.deviations: list[Tensor] = []

    def collect(self, weights: Tensor) -> None:
        """Add one iterate (P,)."""
        weights = weights.detach().clone()
        if self.count == 0:
            self.mean, self.square = torch.zeros_like(weights), torch.zeros_like(weights)
        self.count += 1
        self.mean += (weights - self.mean) / self.count
        self.square += (weights.square() - self.square) / self.count
        # From the running mean, as in the paper's Algorithm 1.
        self.deviations = [*self.deviations, weights - self.mean][-self.max_rank :]

    @property
    def variance(self) -> Tensor:
        """The diagonal part (P,)."""
        return (self.square - self.mean.square()).clamp_min(0)

    @property
    def n_numbers(self) -> int:
        """What is kept, in numbers."""
        return (2 + len(self.deviations)) * self.mean.numel()

    def sample(self, n_samples: int, seed: int) -> Tensor:
        """Draw weights (S, P); equation (1) of the paper.

        Raises
        ------
        ValueError
            If fewer than two iterates have come.
        """
        if self.count < 2:
            raise ValueError(
                f"Expected at least two iterates before sampling, but got {self.count}. "
                "Collect more often or train longer."
            )
        generator = torch.Generator().manual_seed(seed)
        rank = len(self.deviations)
        z1 = torch.randn(n_samples, len(self.mean), generator=generator, dtype=torch.float64)
        z2 = torch.randn(n_samples, rank, generator=generator, dtype=torch.float64)
        diagonal = z1.to(self.mean) * (self.variance / 2).sqrt()
        low_rank = z2.to(self.mean) @ torch.stack(self.deviations) / (2 * (rank - 1)) ** 0.5
        return self.mean + diagonal + low_rank
