"""Training of small layers on cached features, and what goes with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators inside the block, and put them back after it."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class Standardize(nn.Module):
    """Features with mean 0 and variance 1 over the training split.

    Layers that are trained from scratch start from the same scale whatever the language model.

    Parameters
    ----------
    features : Tensor
        (N, d), of the training split.
    """

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.mean = features.mean(0)
        std = features.std(0, correction=0)
        # Constant features stay zero instead of growing without bound.
        self.scale = torch.where(std > 1e-6 * std.max(), std, torch.inf)

    def forward(self, features: Tensor) -> Tensor:
        """Return (B, d)."""
        return (features - self.mean) / self.scale


def train_layer(
    layer: nn.Module,
    features: Tensor,
    labels: Tensor,
    loss: Callable[[Tensor, Tensor, int], Tensor],
    *,
    epochs: int,
    seed: int,
    optimizer: torch.optim.Optimizer,
    batch_size: int = 32,
    on_epoch: Callable[[int], None] | None = None,
) -> None:
    """Train a small module in place; ends in eval mode.

    Parameters
    ----------
    layer : torch.nn.Module
        What to train.
    features, labels : Tensor
        (N, d) and (N,), on the layer's device.
    loss : Callable
        ``loss(features, labels, epoch)`` of one batch, a mean over its examples.
    epochs : int
        Passes over the data, each in another order.
    seed : int
        Of the order, and of what the layer draws (dropout).
    optimizer : torch.optim.Optimizer
        Of the layer's parameters.
    batch_size : int, default=32
        Examples a step.
    on_epoch : Callable, optional
        Called after each epoch with its number, from 0.
    """
    layer.train()
    with seeded(seed, features.device), torch.enable_grad():
        for epoch in range(epochs):
            for rows in torch.randperm(len(features)).split(batch_size):
                rows = rows.to(features.device)
                optimizer.zero_grad()
                loss(features[rows], labels[rows], epoch).backward()
                optimizer.step()
            if on_epoch is not None:
                on_epoch(epoch)
    layer.eval()
