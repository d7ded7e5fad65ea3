"""Every private or version-dependent symbol of `laplace-torch` that this package touches."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from laplace.baselaplace import (
    BaseLaplace,
    DiagLaplace,
    FullLaplace,
    KronLaplace,
    ParametricLaplace,
)
from laplace.curvature.asdl import AsdlInterface
from laplace.curvature.curvature import CurvatureInterface, EFInterface, GGNInterface
from laplace.laplace import Laplace as parent_factory
from laplace.utils.matrix import Kron
from laplace.utils.subnetmask import SubnetMask
from laplace.utils.utils import validate

__all__ = [
    "AsdlInterface",
    "BaseLaplace",
    "CurvatureInterface",
    "DiagLaplace",
    "EFInterface",
    "FullLaplace",
    "GGNInterface",
    "Kron",
    "KronLaplace",
    "ParametricLaplace",
    "SubnetMask",
    "parent_factory",
    "quiet_about_link",
    "validate",
]


@contextmanager
def quiet_about_link() -> Iterator[None]:
    """Silence the reminder that tuning defaults to probit: it is unconditional in the parent."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="By default `link_approx` is `probit`")
        yield
