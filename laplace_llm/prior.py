"""What a prior precision, a grid of them, and a prior mean may be."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from laplace_llm.errors import PriorError


def check_precision(value: Any, lengths: list[int]) -> None:
    """Raise PriorError unless `value` is a positive number or a tensor of an allowed length.

    Parameters
    ----------
    value : float or Tensor
        The prior precision.
    lengths : list[int]
        Allowed numbers of values.
    """
    expected = f"Expected a positive prior precision with {' or '.join(map(str, lengths))} value(s)"
    if isinstance(value, bool) or not isinstance(value, (Real, Tensor)):
        raise PriorError(f"{expected}, but got a {type(value).__name__}. Pass a float or a tensor.")
    tensor = torch.as_tensor(value)
    _check_real(tensor, expected)
    if tensor.ndim > 1 or tensor.numel() not in lengths:
        raise PriorError(
            f"{expected}, but got shape {tuple(tensor.shape)}. One value is shared by all weights; "
            f"{lengths[-1]} values follow the order of la.tensors or of their weights."
        )
    _check_positive(tensor, expected)


def check_grid(values: Any) -> None:
    """Raise PriorError unless `values` is a tensor (G,) of positive prior precisions."""
    expected = "Expected a tensor (G,) of positive prior precisions"
    if not isinstance(values, Tensor):
        raise PriorError(f"{expected}, but got a {type(values).__name__}. Pass torch.tensor(...).")
    _check_real(values, expected)
    if values.ndim != 1 or not len(values):
        raise PriorError(f"{expected}, but got shape {tuple(values.shape)}.")
    _check_positive(values, expected)


def check_mean(value: Any, n_params: int) -> None:
    """Raise PriorError unless `value` is a finite number or a tensor of 1 or `n_params` values."""
    expected = f"Expected a prior mean that is a finite number or a tensor of {n_params} values"
    number = isinstance(value, Real) and not isinstance(value, bool)
    tensor = isinstance(value, Tensor) and value.ndim <= 1 and value.numel() in (1, n_params)
    if not (number or tensor) or not bool(torch.as_tensor(value).isfinite().all()):
        raise PriorError(f"{expected}, but got {value!r}.")


def _check_real(tensor: Tensor, expected: str) -> None:
    if tensor.is_complex() or tensor.dtype == torch.bool or tensor.is_meta:
        raise PriorError(f"{expected}, but got {tensor.dtype} on {tensor.device}.")


def _check_positive(tensor: Tensor, expected: str) -> None:
    values = tensor.detach()
    if not bool(((values > 0) & values.isfinite()).all()):
        raise PriorError(f"{expected}, but got {values.flatten()[:5].tolist()}.")
