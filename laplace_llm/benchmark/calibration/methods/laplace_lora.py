"""Laplace-LoRA, the package's own: every structure, by rule of the prior precision and by link."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from laplace_llm.benchmark.calibration.method import (
    Method,
    NotApplicable,
    Prediction,
    register,
)
from laplace_llm.benchmark.calibration.posteriors import Choice, Posteriors, Variant
from laplace_llm.benchmark.calibration.problem import Problem
from laplace_llm.links import _normal_points
from laplace_llm.moments import Moments
from laplace_llm.sketch import DEFAULT_RANK
from laplace_llm.structures import STRUCTURES
from laplace_llm.tensors import LoraTensor

MAX_DENSE = 5_000  # weights of which all pairs are kept
MAX_SUBSET = 256  # questions whose Jacobians are kept
SLOW = ("ekfac", "gp")  # a second pass, and a Jacobian of every question
RULES_THAT_VALIDATE = ("gridsearch", "val_grad")
# What `optimize_prior_precision` does by default, without validation data and with it.
DEFAULT, DEFAULT_VALIDATED = "Laplace-LoRA kron, loo", "Laplace-LoRA kron, gridsearch"

_choices: dict[str, Choice] = {}


class LaplaceLora(Method):
    """A Laplace approximation over the LoRA weights, linearised."""

    group = "LoRA Laplace"
    choice: ClassVar[Choice]

    def fit(self, problem: Problem) -> None:
        """Fit the posterior and choose its prior precision."""

        def make() -> Posteriors:
            planned = problem.planned & _choices.keys()
            return Posteriors(problem, {name: _choices[name] for name in sorted(planned)})

        self.posteriors = problem.share("Laplace posteriors", make)
        self.la = self.posteriors.fitted(self.choice.variant)
        self.extra_parameters = numbers_kept(self.la)
        # The softmax does not see what logits share, unless the link is `probit`.
        self.forward_passes = problem.n_classes + (self.choice.link == "probit")
        value = self.posteriors.chosen(self.choice)
        self.note = f"prior precision {float(value):.3g}"

    def predict(self, batch: Any) -> Tensor | Prediction:
        """Return probabilities (B, C) and the mutual information, or samples for link 'mc'."""
        moments = self.posteriors.moments(self.choice, batch)
        if self.choice.link == "mc":
            return self.la.predictive_samples(moments, "glm", 100)
        probs = self.la(moments, link_approx=self.choice.link)
        return Prediction(probs, mutual_information(moments))


def register_laplace(
    variant: Variant,
    rule: str,
    link: str = "qmc",
    quick: bool = True,
    name: str | None = None,
    requires: dict[str, str] | None = None,
) -> type[LaplaceLora]:
    """Make and register the method of a variant, a rule and a link."""
    ending = "" if link == "qmc" else f", {link}"
    name = name or f"Laplace-LoRA {variant.name}, {rule}{ending}"
    _choices[name] = choice = Choice(variant, rule, link)
    body = {
        "__doc__": f"{name}.",
        "name": name,
        "tuned": rule in RULES_THAT_VALIDATE,
        "choice": choice,
        "quick": quick,
        "requires": requires or {},
    }
    return register(type("LaplaceLora", (LaplaceLora,), body))


def mutual_information(moments: Moments) -> Tensor:
    """Return ``H[E softmax(f)] - E H[softmax(f)]`` (B,) for Gaussian logits f, by quasi-MC."""
    mean, covariance = moments
    values, vectors = torch.linalg.eigh(covariance.double())
    root = vectors * values.clamp_min(0).sqrt()[:, None, :]
    noise = _normal_points(mean.shape[1], 256).to(root)
    probs = torch.softmax(mean.double()[:, None] + noise @ root.mT, -1)  # (B, S, C)
    total, within = entropy(probs.mean(1)), entropy(probs).mean(1)
    return (total - within).clamp_min(0).to(mean.dtype)


def entropy(probs: Tensor) -> Tensor:
    """Return the entropy over the last dimension, in nats."""
    return torch.special.entr(probs).sum(-1)


def numbers_kept(la: Any) -> int:
    """Return how many numbers a posterior keeps beside the model."""
    if hasattr(la.H, "store"):  # may be on disk
        return la.H.store.count * la.H.store.columns
    return sum(math.prod(tensor.shape) for tensor in _tensors(la.state_dict()["H"]))


def _tensors(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, (dict, list, tuple)):
        for entry in state.values() if isinstance(state, dict) else state:
            yield from _tensors(entry)


# Which there are --------------------------------------------------------------------------------


def _dense(tensors: list[LoraTensor]) -> dict[str, Any]:
    longest = max(max(tensor.shape) for tensor in tensors)
    if longest <= 2 * DEFAULT_RANK:
        raise NotApplicable(f"no side is longer than {2 * DEFAULT_RANK}: the same as kron")
    return {"backend_kwargs": {"rank": longest}}


def _asdl(tensors: list[LoraTensor]) -> dict[str, Any]:
    from laplace.curvature.asdl import AsdlGGN

    return {"backend": AsdlGGN}


def _all_pairs(tensors: list[LoraTensor]) -> dict[str, Any]:
    weights = sum(tensor.numel for tensor in tensors)
    if weights > MAX_DENSE:
        raise NotApplicable(f"a matrix of {weights:,} x {weights:,} (at most {MAX_DENSE:,})")
    return {}


def _register_all() -> None:
    kron = Variant("kron", "kron")
    for rule in ("loo", "gridsearch", "val_grad", "marglik"):
        register_laplace(kron, rule)
    for link in ("probit", "mean_field", "mc"):
        register_laplace(kron, "loo", link)
    backends = {
        "kron dense": _dense,
        "kron MC": lambda _: {"backend_kwargs": {"stochastic": True}},
        "kron expand": lambda _: {"backend_kwargs": {"kfac_approx": "expand"}},
    }
    for name, options in backends.items():
        for rule in ("loo", "gridsearch"):
            register_laplace(Variant(name, "kron", options), rule, quick=False)
    # Yang et al., ICLR 2024: this convention, with the marginal likelihood and Monte Carlo.
    asdl, needs = Variant("kron ASDL", "kron", _asdl), {"asdl": "asdfghjkl"}
    for rule, link in (("loo", "qmc"), ("gridsearch", "qmc"), ("marglik", "mc")):
        register_laplace(asdl, rule, link, quick=False, requires=needs)
    limits = {"full": _all_pairs, "gp": lambda _: {"n_subset": MAX_SUBSET}}
    for structure in (cls._key[1] for cls in STRUCTURES):
        if structure != "kron":
            variant = Variant(structure, structure, limits.get(structure))
            for rule in ("loo", "gridsearch"):
                register_laplace(variant, rule, quick=structure not in SLOW)


_register_all()
