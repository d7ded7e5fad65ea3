"""The trained model as it is, and with a temperature."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from laplace_llm.benchmark.calibration.method import Method, register
from laplace_llm.benchmark.calibration.problem import Problem

MAP_NAME = "MAP"


@register
class MAP(Method):
    """The trained model's own probabilities."""

    name = MAP_NAME
    group = "point"

    def fit(self, problem: Problem) -> None:
        """Keep the problem, whose logits are what is predicted."""
        self.problem = problem

    def predict(self, batch: Any) -> Tensor:
        """Return probabilities (B, C)."""
        return torch.softmax(self.problem.logits(batch), -1)


@register
class TemperatureScaling(MAP):
    """Logits divided by one number.

    Source: Guo et al., *On Calibration of Modern Neural Networks*, ICML 2017.
    """

    name = "temperature scaling"
    tuned = True
    extra_parameters = 1

    def fit(self, problem: Problem) -> None:
        """Choose the temperature with the lowest NLL on the validation split."""
        super().fit(problem)
        logits = torch.cat([problem.logits(batch) for batch in problem.val])
        labels = torch.cat([batch["labels"] for batch in problem.val]).to(logits.device)
        self.temperature = fit_temperature(logits, labels)
        self.note = f"T = {self.temperature:.3g}"

    def predict(self, batch: Any) -> Tensor:
        """Return probabilities (B, C)."""
        return torch.softmax(self.problem.logits(batch) / self.temperature, -1)


@torch.enable_grad()
def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature, between 0.01 and 100, that minimises the NLL.

    Parameters
    ----------
    logits : Tensor
        (N, C).
    labels : Tensor
        (N,).
    """
    logits = logits.detach().double()
    log_t = torch.zeros(1, dtype=logits.dtype, device=logits.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_t], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(logits / log_t.exp(), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    # Where all answers are right, or no better than chance, the best temperature is at infinity.
    return float(log_t.detach().exp().clamp(0.01, 100))
