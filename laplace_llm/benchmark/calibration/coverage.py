"""Conformal sets of a method's probabilities, where the module and its package are there."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from laplace_llm.benchmark.calibration.evaluation import Answers

_MODULE = "laplace_llm.benchmark.calibration.conformal"


def lacking() -> str:
    """Return what to install for conformal sets; empty if they can be made."""
    if find_spec(_MODULE) is None:
        return "a later version of laplace_llm"
    requires: dict[str, str] = import_module(_MODULE).REQUIRES
    return " ".join(f'"{pip}"' for name, pip in requires.items() if find_spec(name) is None)


def coverage(validation: Answers, test: Answers) -> dict[str, dict[str, float]]:
    """Return coverage and set size on the test questions, by kind of set.

    Raises
    ------
    ValueError
        If there are too few validation questions.
    """
    module, sets = import_module(_MODULE), {}
    for kind in module.METHODS:
        found = module.conformal_sets(
            kind, validation.probs, validation.labels, test.probs, test.labels
        )
        sets[kind] = {"coverage": found.coverage, "set size": found.size}
    return sets
