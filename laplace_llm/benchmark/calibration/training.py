"""Adapters: trained by a task's recipe, once, and kept on disk with the state of every epoch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import laplace_llm
from laplace_llm.benchmark.calibration import stored
from laplace_llm.benchmark.calibration.tasks import Recipe, Row, label_words

MakeOptimizer = Callable[[list[nn.Parameter], float], torch.optim.Optimizer]
OnStep = Callable[[nn.Module, int, int], None]
Weights = dict[str, Tensor]


@dataclass
class Adapter:
    """A trained adapter.

    Attributes
    ----------
    head : torch.nn.Module
        The model with it, under its head; in eval mode.
    checkpoints : list[dict[str, Tensor]]
        Its weights at the end of each epoch.
    seconds : float
        That its training took.
    trained : bool
        Whether just now, and not read from disk.
    """

    head: nn.Module
    checkpoints: list[Weights]
    seconds: float
    trained: bool


@dataclass
class Trainer:
    """Trains adapters on a task's rows.

    Parameters
    ----------
    base : torch.nn.Module
        The language model. It is copied for every adapter, but for its weights, which all share.
    tokenizer : PreTrainedTokenizerBase
    task : Recipe
    rows : Sequence[Row]
        The training rows.
    rank : int
        Of LoRA.
    targets : Sequence[str]
        Names of the layers to adapt.
    device : str
    batch_size : int, default=8
    """

    base: nn.Module
    tokenizer: Any
    task: Recipe
    rows: Sequence[Row]
    rank: int
    targets: Sequence[str]
    device: str
    batch_size: int = 8

    def untrained(self, seed: int, dropout: float = 0.0) -> nn.Module:
        """Return a new adapter's head."""
        shared = {id(tensor): tensor for tensor in self.base.parameters()}
        model = deepcopy(self.base, shared)
        torch.manual_seed(seed)  # LoRA's A is drawn
        lora = LoraConfig(
            r=self.rank,
            lora_alpha=2 * self.rank,
            target_modules=list(self.targets),
            lora_dropout=dropout,
        )
        return self._head(get_peft_model(model, lora).to(self.device)).eval()

    def _head(self, model: nn.Module) -> nn.Module:
        task = self.task
        if task.head == "scored":
            return laplace_llm.ChoiceScoringHead(model, task.normalization)
        choices: Sequence[str] = label_words(self.rows)
        if task.head == "letters":
            choices = laplace_llm.LETTERS[: len(choices)]
        return laplace_llm.MultipleChoiceHead.from_tokenizer(model, self.tokenizer, choices)

    @property
    def collate(self) -> Callable[[Sequence[Row]], Any]:
        """The collator that goes with the head."""
        if self.task.head == "scored":
            return laplace_llm.ChoiceScoringCollator(self.tokenizer, self.task.ask, packed=True)
        return laplace_llm.MultipleChoiceCollator(self.tokenizer, self.task.ask)

    def batches(self, rows: Iterable[Row]) -> list[Any]:
        """Return batches of rows; those of like length share one."""
        ordered = sorted(rows, key=lambda row: len(row["question"]) + max(map(len, row["choices"])))
        return list(DataLoader(ordered, self.batch_size, collate_fn=self.collate))  # type: ignore[arg-type]

    def train(
        self,
        seed: int,
        dropout: float = 0.0,
        optimizer: MakeOptimizer | None = None,
        on_step: OnStep | None = None,
    ) -> Adapter:
        """Train an adapter: cross-entropy over the choices, AdamW unless told otherwise."""
        started = time.perf_counter()
        head = self.untrained(seed, dropout)
        parameters = [p for p in head.parameters() if p.requires_grad]
        make = optimizer or (lambda params, lr: torch.optim.AdamW(params, lr=lr))
        steps = make(parameters, self.task.lr)
        generator = torch.Generator().manual_seed(seed)
        loader: DataLoader = DataLoader(
            list(self.rows),  # type: ignore[arg-type]
            self.batch_size,
            shuffle=True,
            collate_fn=self.collate,
            generator=generator,
        )
        n_steps, step, checkpoints = self.task.epochs * len(loader), 0, []
        head.train()
        for _ in range(self.task.epochs):
            for batch in loader:
                self._step(head, batch, steps)
                step += 1
                if on_step is not None:
                    on_step(head, step, n_steps)
            checkpoints.append(lora_weights(head))
        return Adapter(head.eval(), checkpoints, time.perf_counter() - started, True)

    def _step(self, head: nn.Module, batch: Any, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        # IVON takes its gradients at weights that it draws.
        sampled = getattr(optimizer, "sampled_params", None)
        with nullcontext() if sampled is None else sampled(train=True):
            logits = head(batch)
            F.cross_entropy(logits, batch["labels"].to(logits.device)).backward()
        optimizer.step()

    def cached(self, path: Path, seed: int, dropout: float = 0.0) -> Adapter:
        """Return the adapter kept at a path, trained first where there is none."""
        if not path.exists():
            adapter = self.train(seed, dropout)
            tensors = {
                f"{epoch}/{name}": tensor
                for epoch, weights in enumerate(adapter.checkpoints)
                for name, tensor in weights.items()
            }
            stored.save(path, tensors, {"seconds": str(adapter.seconds)})
            return adapter
        tensors, metadata = stored.load(path)
        head = self.untrained(seed, dropout)
        checkpoints: list[Weights] = [{} for _ in range(self.task.epochs)]
        for key, tensor in tensors.items():
            epoch, _, name = key.partition("/")
            checkpoints[int(epoch)][name] = tensor.to(self.device)
        load_lora_weights(head, checkpoints[-1])
        return Adapter(head, checkpoints, float(metadata["seconds"]), False)


def lora_weights(head: nn.Module) -> Weights:
    """Return copies of the trainable weights by name."""
    return {
        name: parameter.detach().clone()
        for name, parameter in head.named_parameters()
        if parameter.requires_grad
    }


def load_lora_weights(head: nn.Module, weights: Weights) -> None:
    """Write weights that `lora_weights` returned into a head of the same kind."""
    parameters = dict(head.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)
