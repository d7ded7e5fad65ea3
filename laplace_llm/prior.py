"""What a prior precision may be."""

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
    if tensor.ndim > 1 or tensor.numel() not in lengths:
        raise PriorError(
            f"{expected}, but got shape {tuple(tensor.shape)}. One value is shared by all weights; "
            f"{lengths[-1]} values follow the order of la.tensors or of their weights."
        )
    detached = tensor.detach()
    if not bool(((detached > 0) & detached.isfinite()).all()):
        raise PriorError(f"{expected}, but got {detached.flatten()[:5].tolist()}.")
