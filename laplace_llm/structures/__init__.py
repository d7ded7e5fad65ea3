"""The structures behind ``subset_of_weights="lora"``, one a module, and the factory."""

from __future__ import annotations

from typing import Any

from torch import nn

from laplace_llm._compat import parent_factory
from laplace_llm.errors import OptionError
from laplace_llm.structures.diag import DiagLoraLaplace
from laplace_llm.structures.ekfac import EkfacLoraLaplace
from laplace_llm.structures.full import FullLoraLaplace
from laplace_llm.structures.functional import ELLALoraLaplace, VaLLALoraLaplace
from laplace_llm.structures.gp import FunctionalLoraLaplace
from laplace_llm.structures.kron import KronLoraLaplace
from laplace_llm.structures.lowrank import LowRankLoraLaplace

STRUCTURES = (
    KronLoraLaplace,
    EkfacLoraLaplace,
    LowRankLoraLaplace,
    DiagLoraLaplace,
    FullLoraLaplace,
    FunctionalLoraLaplace,
)

# The parent's function-space methods that have no key of their own.
APPROXIMATIONS = {"nystrom": ELLALoraLaplace, "variational": VaLLALoraLaplace}

__all__ = [
    "STRUCTURES",
    "DiagLoraLaplace",
    "ELLALoraLaplace",
    "EkfacLoraLaplace",
    "FullLoraLaplace",
    "FunctionalLoraLaplace",
    "KronLoraLaplace",
    "Laplace",
    "LowRankLoraLaplace",
    "VaLLALoraLaplace",
]


def Laplace(
    model: nn.Module,
    likelihood: str = "classification",
    subset_of_weights: str = "lora",
    hessian_structure: str = "kron",
    *args: Any,
    functional_approximation: str = "sod",
    **kwargs: Any,
) -> Any:
    """`laplace.Laplace` with defaults for LoRA; other combinations go to the parent unchanged.

    Parameters
    ----------
    model : torch.nn.Module
        See `LoraLaplace`.
    likelihood : str, default='classification'
    subset_of_weights : str, default='lora'
    hessian_structure : {'kron', 'ekfac', 'lowrank', 'diag', 'full', 'gp'}, default='kron'
        For ``subset_of_weights='lora'``; all of the parent's otherwise.
    functional_approximation : {'sod', 'nystrom', 'variational'}, default='sod'
        Of ``hessian_structure='gp'``: `FunctionalLoraLaplace`, `ELLALoraLaplace` or
        `VaLLALoraLaplace`. (`laplace.Laplace` knows the last two for ``'all'`` weights only.)
    *args, **kwargs
        See `LoraLaplace`, `KronLoraLaplace` or the parent's classes.

    Raises
    ------
    OptionError
        If there is no such structure for ``"lora"``.
    """
    structures = sorted(cls._key[1] for cls in STRUCTURES)
    if subset_of_weights == "lora" and hessian_structure not in structures:
        raise OptionError(
            f"Expected hessian_structure to be one of {structures} for subset_of_weights='lora', "
            f"but got {hessian_structure!r}."
        )
    if subset_of_weights != "lora" and functional_approximation != "sod":
        kwargs["functional_approximation"] = functional_approximation
    elif functional_approximation != "sod":
        if hessian_structure != "gp" or functional_approximation not in APPROXIMATIONS:
            raise OptionError(
                "Expected functional_approximation 'sod', 'nystrom' or 'variational', the last two "
                f"with hessian_structure='gp', but got {functional_approximation!r} with "
                f"{hessian_structure!r}."
            )
        return APPROXIMATIONS[functional_approximation](model, likelihood, *args, **kwargs)
    return parent_factory(model, likelihood, subset_of_weights, hessian_structure, *args, **kwargs)
