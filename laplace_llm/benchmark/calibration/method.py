"""What a method is to the calibration benchmark, and the registry that users add theirs to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

from torch import Tensor

if TYPE_CHECKING:
    from laplace_llm.benchmark.calibration.problem import Problem

GROUPS = ("point", "last layer", "LoRA", "LoRA Laplace")


class NotApplicable(Exception):  # not an error: the table shows the reason
    """Raised by `Method.fit` where a method makes no sense on a problem, with the reason."""


class Prediction(NamedTuple):
    """What `Method.predict` may return in place of probabilities alone.

    Attributes
    ----------
    probabilities : Tensor
        (B, C).
    mutual_information : Tensor, optional
        (B,) between prediction and weights, in nats.
    """

    probabilities: Tensor
    mutual_information: Tensor | None = None


class Method(ABC):
    """One way to get probabilities out of a fine-tuned model.

    A method is made anew for every problem (a task and a seed): `fit` once, then `predict` on
    every batch of every test set. The model, and all that is in the problem, stays as it is.

    Attributes
    ----------
    name : str
        Its row in the tables.
    group : {'point', 'last layer', 'LoRA', 'LoRA Laplace'}
        Where in the tables.
    tuned : bool
        Whether `fit` reads the validation split.
    single_model : bool
        Whether it takes one trained adapter, unlike an ensemble or training of its own.
    requires : dict[str, str]
        Optional modules it imports, and what to pip install for them.
    extra_parameters : int
        What it keeps beside the model, in numbers; known after `fit`.
    forward_passes : float
        Passes over the model that a prediction takes, forward and backward; known after `fit`.
    quick : bool
        Whether ``--quick`` runs it.
    note : str
        A remark for the table of costs, such as the value that tuning chose; known after `fit`.
    """

    name: ClassVar[str]
    group: ClassVar[str]
    tuned: ClassVar[bool] = False
    single_model: ClassVar[bool] = True
    requires: ClassVar[dict[str, str]] = {}
    quick: ClassVar[bool] = True
    note: str = ""
    extra_parameters: int = 0
    forward_passes: float = 1

    @abstractmethod
    def fit(self, problem: Problem) -> None:
        """Do all that comes before the first prediction."""

    @abstractmethod
    def predict(self, batch: Any) -> Tensor | Prediction:
        """Return probabilities (B, C), or (S, B, C) of S samples, which are averaged.

        Samples also give the mutual information between prediction and weights; a method that
        has it without samples returns a `Prediction`.
        """


M = TypeVar("M", bound=type[Method])
_REGISTRY: dict[str, type[Method]] = {}


def register(method: M) -> M:
    """Class decorator: add a method to the benchmark."""
    if method.group not in GROUPS:
        raise ValueError(f"Expected group to be one of {GROUPS}, but got {method.group!r}.")
    _REGISTRY[method.name] = method
    return method


def registered() -> dict[str, type[Method]]:
    """Return all methods by name, in the order of the groups and of their registration."""
    methods = sorted(_REGISTRY.values(), key=lambda method: GROUPS.index(method.group))
    return {method.name: method for method in methods}


def missing(
    method: type[Method], find: Callable[[str], Any] = find_spec
) -> Iterable[tuple[str, str]]:
    """Return the (module, pip requirement) pairs that a method needs and that are not installed."""
    return [(module, pip) for module, pip in method.requires.items() if find(module) is None]
