"""What a method is given: one task, one seed, one trained adapter, and the data."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass
class Problem:
    """A fine-tuned model under its head and its labelled batches.

    Attributes
    ----------
    task : str
        Name of the task.
    seed : int
        Of training and of the data split; methods that draw random numbers seed with it.
    head : torch.nn.Module
        Maps a batch to (B, C) logits at the trained (MAP) weights; in eval mode.
    n_classes : int
        C.
    train, val : list
        Labelled batches (mappings with ``labels``), in a fixed order. `val` is the held-out split
        that all tuned methods share.
    train_adapter : Callable
        ``train_adapter(seed=..., dropout=0.0, optimizer=None, on_step=None)`` trains another
        adapter by the recipe of the first one and returns its head. ``optimizer(parameters, lr)``
        makes another optimizer than AdamW; ``on_step(head, step, n_steps)`` is called after every
        step. Slow: it is training all over.
    checkpoints : list[dict[str, Tensor]]
        The adapter's LoRA weights at the end of each epoch of its training, by the names that
        they have in `head`.
    shared : dict
        What several methods of this problem have computed in common; see `share`.
    charged : float
        Seconds of shared work that methods were spared.
    """

    task: str
    seed: int
    head: nn.Module
    n_classes: int
    train: list[Any]
    val: list[Any]
    train_adapter: Callable[..., nn.Module]
    checkpoints: list[dict[str, Tensor]]
    shared: dict[str, tuple[float, Any]] = field(default_factory=dict)
    charged: float = 0.0

    def share(self, key: str, make: Callable[[], Any]) -> Any:
        """Return what `make` returns, made once a problem; its time is charged to every user.

        `charged` grows by the seconds that the first call took whenever a later one is spared
        them, so that costs are as if each method had done its own work.
        """
        if key in self.shared:
            seconds, value = self.shared[key]
            self.charged += seconds
            return value
        start = time.perf_counter()
        value = make()
        self.shared[key] = (time.perf_counter() - start, value)
        return value
