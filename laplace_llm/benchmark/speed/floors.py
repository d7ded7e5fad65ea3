"""The plain torch that nothing can be faster than."""

from __future__ import annotations

from collections.abc import Callable

import torch

from laplace_llm.benchmark.speed.presets import Problem


def sweep(problem: Problem, backwards: int) -> tuple[Callable[[], None], str]:
    """Return one forward and so many backward passes to the LoRA parameters, and their name."""
    head, batch, parameters = problem.head, problem.batch, problem.parameters

    def run() -> None:
        logits = head(batch)
        for index in range(backwards):
            seeds = torch.zeros_like(logits)
            seeds[:, index % seeds.shape[1]] = 1
            torch.autograd.grad(logits, parameters, seeds, retain_graph=index < backwards - 1)

    return run, f"forward + {backwards} backward"


def forwards(problem: Problem, count: int) -> tuple[Callable[[], None], str]:
    """Return so many forward passes without a graph, and their name."""

    @torch.no_grad()
    def run() -> None:
        for _ in range(count):
            problem.head(problem.batch)

    return run, f"{count} forward"
