"""Paired bootstrap: whether the difference between two methods' losses is more than chance."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Difference(NamedTuple):
    """Mean of ``first - second``, and the ends of its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """'lower', 'higher', or 'tie' where the interval has 0 in it."""
        if self.high < 0:
            return "lower"
        return "higher" if self.low > 0 else "tie"


def paired_bootstrap(first: Tensor, second: Tensor, n_samples: int = 4000) -> Difference:
    """Compare two methods on the same questions and seeds.

    Questions are drawn with replacement, and so are seeds: both are samples of what could have
    been. With few seeds, what they contribute is underestimated.

    Parameters
    ----------
    first, second : Tensor
        (S, N) losses of S seeds on the same N questions.
    n_samples : int
        Number of bootstrap samples; they are the same in every call.
    """
    difference = (first - second).double()
    seeds, questions = difference.shape
    by_seed = _weights(n_samples, seeds, 0) @ difference  # (samples, N)
    means = (by_seed * _weights(n_samples, questions, 1)).sum(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.double))
    return Difference(float(difference.mean()), float(low), float(high))


@lru_cache(maxsize=16)
def _weights(n_samples: int, size: int, seed: int) -> Tensor:
    """Return (n_samples, size): how often each entry is drawn, as a share of all draws."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(size, (n_samples, size), generator=generator)
    counts = torch.zeros(n_samples, size, dtype=torch.double)
    return counts.scatter_add_(1, drawn, torch.ones_like(counts)) / size
