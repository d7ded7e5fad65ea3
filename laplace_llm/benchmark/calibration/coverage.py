"""Conformal sets of a method's probabilities, where `conformal` is there."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from laplace_llm.benchmark.calibration.evaluation import Answers

_MODULE = "laplace_llm.benchmark.calibration.conformal"


def available() -> bool:
    """Return whether there is a module of conformal sets."""
    return find_spec(_MODULE) is not None


def coverage(validation: Answers, test: Answers) -> dict[str, Any]:
    """Return coverage and set size on test questions, by kind of set."""
    module = import_module(_MODULE)
    return module.conformal(validation.probs, validation.labels, test.probs, test.labels)
