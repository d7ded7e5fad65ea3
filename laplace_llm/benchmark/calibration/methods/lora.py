"""Several adapters instead of one: dropout, checkpoints, deep ensembles, SWAG and IVON.

All but dropout keep sets of LoRA weights and run the problem's own model with each of them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.func import functional_call

from laplace_llm.adapters import find_lora_tensors
from laplace_llm.benchmark.calibration.linear import seeded
from laplace_llm.benchmark.calibration.method import Method, NotApplicable, register
from laplace_llm.benchmark.calibration.swag import SwagMoments

if TYPE_CHECKING:
    from laplace_llm.benchmark.calibration.problem import Problem

Weights = Mapping[str, Tensor]


def lora_weights(head: nn.Module) -> dict[str, Tensor]:
    """Return copies of the active adapter's LoRA weights by their names in `head`."""
    return {t.name: t.weight.detach().clone() for t in find_lora_tensors(head)}


def flatten(weights: Weights) -> Tensor:
    """Return all weights as one vector (P,)."""
    return torch.cat([weight.flatten() for weight in weights.values()])


def unflatten(vector: Tensor, like: Weights) -> dict[str, Tensor]:
    """Return the weights that `flatten` made a vector of."""
    parts = vector.split([weight.numel() for weight in like.values()])
    return {
        name: part.view_as(weight).to(weight)
        for (name, weight), part in zip(like.items(), parts, strict=True)
    }


class AdapterEnsemble(Method):
    """Averages the problem's model over sets of LoRA weights; subclasses say which."""

    group: ClassVar[str] = "LoRA"

    @abstractmethod
    def members(self, problem: Problem) -> Sequence[Weights]:
        """Return the sets of weights."""

    def fit(self, problem: Problem) -> None:
        """Gather the members."""
        self._head = problem.head
        own = lora_weights(problem.head)
        device = next(iter(own.values())).device
        self._members = [
            {name: weight.to(device) for name, weight in member.items()}
            for member in self.members(problem)
        ]
        self.forward_passes = len(self._members)
        # A member with the model's own weights costs none.
        kept = [m for m in self._members if not all(torch.equal(m[name], own[name]) for name in m)]
        self.extra_parameters = sum(w.numel() for m in kept for w in m.values())

    @torch.no_grad()
    def predict(self, batch: Any) -> Tensor:
        """Return the members' probabilities (S, B, C)."""
        return torch.stack(
            [functional_call(self._head, dict(m), (batch,)).softmax(-1) for m in self._members]
        )


@register
class CheckpointEnsemble(AdapterEnsemble):
    """The adapter at the end of each epoch of its training (Chen, Lundberg and Lee, 2017)."""

    name = "checkpoint ensemble"

    def members(self, problem: Problem) -> Sequence[Weights]:
        """Return the checkpoints."""
        if not problem.checkpoints:
            raise NotApplicable("no checkpoints of the adapter's training were kept")
        return problem.checkpoints


@register
class DeepEnsemble(AdapterEnsemble):
    """Adapters trained from other seeds, and the problem's own (Lakshminarayanan et al., 2017)."""

    name = "deep ensemble"
    single_model: ClassVar[bool] = False
    quick: ClassVar[bool] = False
    n_members: ClassVar[int] = 3

    def members(self, problem: Problem) -> Sequence[Weights]:
        """Train all but the first."""
        seeds = [1000 * (k + 1) + problem.seed for k in range(self.n_members - 1)]
        others = [lora_weights(problem.train_adapter(seed=seed)) for seed in seeds]
        return [lora_weights(problem.head), *others]


@register
class LoraSWAG(AdapterEnsemble):
    """SWAG (Maddox et al., NeurIPS 2019) over the LoRA weights, as SWAG-LoRA (Onal et al., 2024).

    About twenty iterates of the second half of another training by the same recipe.
    """

    name = "SWAG over LoRA"
    single_model: ClassVar[bool] = False
    quick: ClassVar[bool] = False
    n_samples: ClassVar[int] = 10
    n_iterates: ClassVar[int] = 20

    def members(self, problem: Problem) -> Sequence[Weights]:
        """Train, collect and draw samples."""
        moments = SwagMoments(self.n_iterates)

        def collect(head: nn.Module, step: int, n_steps: int) -> None:
            every = max(1, n_steps // 2 // self.n_iterates)
            if 2 * step >= n_steps and (n_steps - step) % every == 0:
                moments.collect(flatten(lora_weights(head)))

        head = problem.train_adapter(seed=problem.seed, on_step=collect)
        like = lora_weights(head)
        return [unflatten(v, like) for v in moments.sample(self.n_samples, problem.seed)]


@register
class IVON(AdapterEnsemble):
    """Variational training by IVON (Shen et al., ICML 2024), as over LoRA by Cong et al. (2024).

    Their settings for ARC and OpenBookQA. They train AdamW with 5e-5 and IVON with 0.03 and steps
    clipped at 1e-3, hence the factor on the recipe's learning rate.
    """

    name = "IVON"
    single_model: ClassVar[bool] = False
    quick: ClassVar[bool] = False
    requires: ClassVar[dict[str, str]] = {"ivon": "ivon-opt>=0.1.3"}
    n_samples: ClassVar[int] = 10
    lr_factor: ClassVar[float] = 0.03 / 5e-5
    options: ClassVar[dict[str, Any]] = {
        "ess": 1e6,
        "hess_init": 1e-3,
        "clip_radius": 1e-3,
        "weight_decay": 0.0,
        "rescale_lr": False,
    }

    def members(self, problem: Problem) -> Sequence[Weights]:
        """Train and draw samples from the variational posterior."""
        import ivon

        made: list[Any] = []

        def optimizer(parameters: Any, lr: float) -> torch.optim.Optimizer:
            made.append(ivon.IVON(parameters, lr * self.lr_factor, **self.options))
            return made[-1]

        # The training loop draws weights around each gradient with the optimizer's own
        # `sampled_params`.
        head = problem.train_adapter(seed=problem.seed, optimizer=optimizer)
        samples = []
        with seeded(problem.seed, next(head.parameters()).device):
            for _ in range(self.n_samples):
                with made[-1].sampled_params(train=False):
                    samples.append(lora_weights(head))
        return samples


@register
class LoraDropout(Method):
    """MC dropout (Gal and Ghahramani, ICML 2016): PEFT's ``lora_dropout``, on at prediction too.

    Other dropout of the model stays off.
    """

    name = "MC dropout over LoRA"
    group: ClassVar[str] = "LoRA"
    single_model: ClassVar[bool] = False
    rate: ClassVar[float] = 0.1
    n_samples: ClassVar[int] = 10

    def fit(self, problem: Problem) -> None:
        """Train an adapter with dropout."""
        self._seed = problem.seed
        self._head = problem.train_adapter(seed=problem.seed, dropout=self.rate).eval()
        self._dropouts = [
            module
            for layer in self._head.modules()
            if isinstance(layer, LoraLayer)
            for module in layer.lora_dropout.modules()
            if isinstance(module, nn.Dropout)
        ]
        if not self._dropouts:
            raise RuntimeError(
                f"Expected train_adapter(dropout={self.rate}) to return a model with dropout "
                "before its LoRA layers, but it has none."
            )
        self.forward_passes = self.n_samples
        self.extra_parameters = sum(w.numel() for w in lora_weights(self._head).values())

    @torch.no_grad()
    def predict(self, batch: Any) -> Tensor:
        """Return probabilities under sampled masks (S, B, C)."""
        try:
            for dropout in self._dropouts:
                dropout.train()
            with seeded(self._seed, next(self._head.parameters()).device):
                samples = [self._head(batch).softmax(-1) for _ in range(self.n_samples)]
        finally:
            for dropout in self._dropouts:
                dropout.eval()
        return torch.stack(samples)
