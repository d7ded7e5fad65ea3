"""What a method is given: one task, one seed, one trained adapter, and the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from laplace_llm.benchmark.calibration import stored
from laplace_llm.benchmark.calibration.costs import Cost, Meter
from laplace_llm.benchmark.calibration.features import last_layer


class Shared(NamedTuple):
    """Something that several methods use, and what it took to make."""

    cost: Cost
    value: Any


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
        that all tuned methods share; empty where the adapter was trained on all data.
    train_adapter : Callable
        ``train_adapter(seed=..., dropout=0.0, optimizer=None, on_step=None)`` trains another
        adapter by the recipe of the first one and returns its head. ``optimizer(parameters, lr)``
        makes another optimizer than AdamW; ``on_step(head, step, n_steps)`` is called after every
        step. An optimizer with a context manager ``sampled_params(train=True)``, as IVON has, is
        given each forward and backward pass inside of it. Slow: it is training all over.
    checkpoints : list[dict[str, Tensor]]
        The adapter's LoRA weights at the end of each epoch of its training, by the names that
        they have in `head`.
    shared : dict
        What several methods of this problem have computed in common; see `share`.
    charged : float
        Seconds of shared work that methods were spared, less those of work for others.
    charged_memory : int
        Most bytes that shared work took which methods were spared.
    planned : frozenset[str]
        Names of the methods that are to run on this problem.
    folder : Path, optional
        Where to keep what is worth keeping between runs.
    train_seconds : float
        That training the adapter took.
    """

    task: str
    seed: int
    head: nn.Module
    n_classes: int
    train: list[Any]
    val: list[Any]
    train_adapter: Callable[..., nn.Module]
    checkpoints: list[dict[str, Tensor]]
    shared: dict[str, Shared] = field(default_factory=dict)
    charged: float = 0.0
    charged_memory: int = 0
    planned: frozenset[str] = frozenset()
    folder: Path | None = None
    train_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.meter = Meter(self.device)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(iter(self.head.parameters()), torch.empty(0)).device

    def share(self, key: str, make: Callable[[], Any]) -> Any:
        """Return what `make` returns, made once a problem; its cost is charged to every user.

        `charged` grows by the seconds that the first call took whenever a later one is spared
        them, so that costs are as if each method had done its own work.
        """
        if key in self.shared:
            cost, value = self.shared[key]
            self.charge(cost)
            return value
        charged, memory, self.charged_memory = self.charged, self.charged_memory, 0
        with self.meter.measure() as cost:
            value = make()
        # What making it was spared in turn.
        cost.seconds += self.charged - charged
        cost.memory = max(cost.memory, self.charged_memory)
        self.charged_memory = max(memory, self.charged_memory)
        self.shared[key] = Shared(cost, value)
        return value

    def charge(self, cost: Cost) -> None:
        """Charge the present method with work that it was spared."""
        self.charged += cost.seconds
        self.charged_memory = max(self.charged_memory, cost.memory)

    @contextmanager
    def aside(self) -> Iterator[Cost]:
        """Do work that the present method is not charged with; yields what it takes."""
        charged, memory = self.charged, self.charged_memory
        cost = Cost()
        try:
            with self.meter.hidden(), self.meter.measure() as cost:
                yield cost
        finally:
            self.charged, self.charged_memory = charged - cost.seconds, memory

    def features(self, split: str) -> tuple[Tensor, Tensor]:
        """Return the inputs (N, d) of the head's last linear layer, and the labels (N,).

        Computed once, kept in `folder`, and charged to every user.

        Parameters
        ----------
        split : {'train', 'val'}

        Raises
        ------
        NotApplicable
            If the head does not end in a linear layer.
        """
        batches = {"train": self.train, "val": self.val}[split]
        path = None if self.folder is None else self.folder / f"features.{split}.safetensors"

        def make() -> tuple[Tensor, Tensor]:
            if path is not None and path.exists():
                tensors, metadata = stored.load(path)
                self.charged += float(metadata["seconds"])
                return tensors["features"].to(self.device), tensors["labels"]
            charged = self.charged
            with self.meter.measure() as cost:
                features = torch.cat([self.batch_features(batch) for batch in batches])
            seconds = cost.seconds + self.charged - charged
            labels = torch.cat([torch.as_tensor(batch["labels"]) for batch in batches])
            if path is not None:
                tensors = {"features": features, "labels": labels}
                stored.save(path, tensors, {"seconds": str(seconds)})
            return features, labels

        last_layer(self.head)
        return self.share(f"features of {split}", make)

    def logits(self, batch: Any) -> Tensor:
        """Return the head's logits (B, C) of a batch.

        The head runs once on a batch, at everyone's cost. The batch is remembered by its identity,
        as the runner's batches live as long as this.
        """
        return self._outputs(batch)[0]

    def batch_features(self, batch: Any) -> Tensor:
        """Return the features (B, d) of a batch, from the same run as its logits; see `features`.

        Raises
        ------
        NotApplicable
            If the head does not end in a linear layer.
        """
        last_layer(self.head)
        return self._outputs(batch)[1]

    def _outputs(self, batch: Any) -> tuple[Tensor, Tensor]:
        key = f"outputs of batch {id(batch)}"
        _, logits, features = self.share(key, lambda: (batch, *self._run(batch)))
        return logits, features

    @torch.no_grad()
    def _run(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return logits, and the last layer's inputs; none where there is no such layer."""
        layer, seen = getattr(self.head, "choice_layer", None), [torch.empty(0)]
        if not isinstance(layer, nn.Linear):
            return self.head(batch), seen[0]
        hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            logits = self.head(batch)
        finally:
            hook.remove()
        return logits, seen[-1]
