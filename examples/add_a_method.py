"""A method of your own in the calibration benchmark: vector scaling, in one file.

    python -m laplace_llm.benchmark calibration --quick --plugin examples/add_a_method.py

`fit` gets a problem: a trained model under its head, its logits, labelled batches. `predict`
returns probabilities (B, C), or (S, B, C) of S samples. The rest comes by itself: rows in every
table, costs, resuming, a row with the error if it fails. See `Method` and `Problem` for more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from laplace_llm.benchmark.calibration.method import Method, register
from laplace_llm.benchmark.calibration.problem import Problem


@register
class VectorScaling(Method):
    """A scale and a bias for each class.

    Source: Guo et al., *On Calibration of Modern Neural Networks*, ICML 2017.
    """

    name = "vector scaling"
    group = "point"
    tuned = True  # reads the validation questions, so it is not run on "all data"

    def fit(self, problem: Problem) -> None:
        """Minimise the NLL of the validation questions, with a little weight decay."""
        self.problem = problem
        logits = torch.cat([problem.logits(batch) for batch in problem.val])
        labels = torch.cat([batch["labels"] for batch in problem.val]).to(logits.device)
        scale = torch.ones_like(logits[0], requires_grad=True)
        bias = torch.zeros_like(logits[0], requires_grad=True)
        optimizer = torch.optim.LBFGS([scale, bias], max_iter=100, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(logits * scale + bias, labels)
            loss = loss + 0.01 * ((scale - 1).square().sum() + bias.square().sum())
            loss.backward()
            return loss

        optimizer.step(closure)
        self.scale, self.bias = scale.detach(), bias.detach()
        self.extra_parameters = len(scale) + len(bias)

    def predict(self, batch: Any) -> Tensor:
        """Return probabilities (B, C)."""
        return torch.softmax(self.problem.logits(batch) * self.scale + self.bias, -1)
