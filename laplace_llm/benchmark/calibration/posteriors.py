"""The Laplace posteriors of a problem: each fitted once, and one pass over a batch for all."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from laplace import Laplace
from torch import Tensor

from laplace_llm.adapters import find_lora_tensors, resolve_adapter
from laplace_llm.benchmark.calibration.problem import Problem
from laplace_llm.benchmark.calibration.shared_pass import Member, Part, shared_pass
from laplace_llm.kernel import training_space
from laplace_llm.moments import Moments
from laplace_llm.tensors import LoraTensor
from laplace_llm.tuning.leave_one_out import leave_one_out
from laplace_llm.tuning.val_grad import NODES_PER_DECADE, descend

# Those of `optimize_prior_precision`, of its grids and of its interpolation.
GRID = torch.logspace(-4, 4, 100)
NODES = torch.logspace(-4, 4, 8 * NODES_PER_DECADE + 1)
GRIDS = {"gridsearch": GRID, "val_grad": NODES}


@dataclass(frozen=True)
class Variant:
    """A structure with its options.

    Attributes
    ----------
    name : str
    structure : str
        ``hessian_structure``.
    options : Callable, optional
        Maps the LoRA tensors to further arguments of `laplace.Laplace`; raises `NotApplicable`
        where the variant makes no sense for them.
    """

    name: str
    structure: str
    options: Callable[[list[LoraTensor]], dict[str, Any]] | None = None


class Choice(NamedTuple):
    """A variant, and how its prior precision and its probabilities come about."""

    variant: Variant
    rule: str
    link: str


class Posteriors:
    """All Laplace posteriors of a problem.

    The first method that needs a pass over validation or test batches has it made for all planned
    methods, aside; every method is charged with that pass and with its own part.

    Parameters
    ----------
    problem : Problem
    planned : Mapping[str, Choice]
        The choices of the methods that run on this problem, by name.
    """

    def __init__(self, problem: Problem, planned: Mapping[str, Choice]) -> None:
        self.problem = problem
        self.planned = dict(planned)
        self._validation: dict[tuple[Variant, str], Part] = {}
        self._test: dict[int, tuple[Any, dict[Variant, Part]]] = {}
        self._members: dict[Variant, dict[Choice, Tensor]] | None = None

    def fitted(self, variant: Variant) -> Any:
        """Return a variant's posterior."""

        def make() -> Any:
            head = self.problem.head
            tensors = find_lora_tensors(head, resolve_adapter(head, None), "AB")
            options = variant.options(tensors) if variant.options else {}
            la = Laplace(
                head,
                "classification",
                subset_of_weights="lora",
                hessian_structure=variant.structure,
                **options,
            )
            torch.manual_seed(self.problem.seed)  # of Monte-Carlo labels
            la.fit(self.problem.train)
            return la

        return self.problem.share(f"Laplace {variant.name}", make)

    def chosen(self, choice: Choice) -> Tensor:
        """Return the prior precision (1,) that a choice's rule chooses."""
        la = self.fitted(choice.variant)
        key = f"Laplace {choice.variant.name}, {choice.rule}, {choice.link}"
        value = self.problem.share(key, lambda: self._choose(la, choice))
        return value.reshape(1).to(la._device, la._dtype)

    def _choose(self, la: Any, choice: Choice) -> Tensor:
        problem, link = self.problem, choice.link
        if choice.rule == "loo":
            # What each example looks like from the others has nothing to do with the structure.
            space = problem.share("training space", lambda: training_space(la, problem.train))
            interval = GRID.to(la._device, la._dtype)
            return problem.share(f"loo, {link}", lambda: leave_one_out(la, space, interval, link))
        if choice.rule == "marglik":
            return _marginal_likelihood(la)
        moments = self._validation_moments(choice)
        labels = torch.cat([batch["labels"] for batch in problem.val]).to(la._device)

        def loss(covariance: Tensor) -> Tensor:
            probs = la(Moments(moments.mean, covariance), link_approx=link)
            return -probs.gather(1, labels[:, None]).clamp_min(1e-30).log().mean()

        if choice.rule == "val_grad":
            return descend(NODES, moments.covariance[:, None], loss)
        losses = torch.stack([loss(covariance) for covariance in moments.covariance])
        return GRID[int(losses.nan_to_num(torch.inf).argmin())]

    def _validation_moments(self, choice: Choice) -> Moments:
        """Return a variant's moments under all values of a rule's grid."""
        if (choice.variant, choice.rule) not in self._validation:
            with self.problem.aside():
                members = {}
                for variant, rule, _ in [choice, *self.planned.values()]:
                    la = _or_none(partial(self.fitted, variant)) if rule in GRIDS else None
                    if la is not None:
                        members[variant, rule] = Member(la, GRIDS[rule])
                self._validation |= shared_pass(members, self.problem.val, self.problem.meter)
        part = self._validation[choice.variant, choice.rule]
        self.problem.charge(part.cost)
        return part.moments

    def moments(self, choice: Choice, batch: Any) -> Moments:
        """Return the moments of a batch under the prior precision that was chosen."""
        if self._members is None:
            with self.problem.aside():
                self._members = self._all_members(choice)
        if id(batch) not in self._test:
            with self.problem.aside():
                members = {
                    variant: Member(self.fitted(variant), torch.cat(list(values.values())))
                    for variant, values in self._members.items()
                }
                self._test[id(batch)] = batch, shared_pass(members, [batch], self.problem.meter)
        part = self._test[id(batch)][1][choice.variant]
        self.problem.charge(part.cost)
        return part.moments.at(list(self._members[choice.variant]).index(choice))

    def _all_members(self, first: Choice) -> dict[Variant, dict[Choice, Tensor]]:
        members: dict[Variant, dict[Choice, Tensor]] = {}
        for choice in [first, *self.planned.values()]:
            value = _or_none(partial(self.chosen, choice))
            if value is not None:
                members.setdefault(choice.variant, {})[choice] = value
        return members


def _or_none(make: Callable[[], Any]) -> Any:
    """Return None where it fails: the error belongs to the method that it is made for."""
    try:
        return make()
    except Exception:
        return None


def _marginal_likelihood(la: Any) -> Tensor:
    before = la.prior_precision
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The marginal likelihood chose")
            la.optimize_prior_precision(method="marglik")
        return la.prior_precision.detach()
    finally:
        la.prior_precision = before
