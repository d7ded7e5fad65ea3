"""Paired bootstrap: whether the difference between two methods' losses is more than chance."""

from __future__ import annotations

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
    generator = torch.Generator().manual_seed(0)
    means = []
    for _ in range(n_samples):
        rows = torch.randint(seeds, (seeds,), generator=generator)
        columns = torch.randint(questions, (questions,), generator=generator)
        means.append(difference[rows].mean(0)[columns].mean())
    low, high = torch.stack(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.double))
    return Difference(float(difference.mean()), float(low), float(high))
