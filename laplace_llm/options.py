"""What an option may be: each check names the option, what was expected and what came."""

from __future__ import annotations

from collections.abc import Collection
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from laplace_llm.errors import OptionError


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raise OptionError unless `value` is an integer of at least `least`."""
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < least:
        raise OptionError(f"Expected {name} to be an integer >= {least}, but got {value!r}.")


def check_optional_count(name: str, value: Any) -> None:
    """Raise OptionError unless `value` is None or an integer of at least 1."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise OptionError(f"Expected {name}=None or an integer >= 1, but got {value!r}.")


def check_positive(name: str, value: Any) -> None:
    """Raise OptionError unless `value` is a positive finite number, or a tensor of one."""
    number = value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, Real)
    if number and not isinstance(value, bool):
        tensor = torch.as_tensor(value).detach()
        number = not tensor.is_complex() and bool(((tensor > 0) & tensor.isfinite()).all())
    if not number or isinstance(value, bool):
        raise OptionError(f"Expected {name} to be a positive finite number, but got {value!r}.")


def check_flag(name: str, value: Any) -> None:
    """Raise OptionError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise OptionError(f"Expected {name} to be True or False, but got {value!r}.")


def check_one_of(name: str, value: Any, allowed: Collection[str]) -> None:
    """Raise OptionError unless `value` is one of the allowed strings."""
    if not isinstance(value, str) or value not in allowed:
        raise OptionError(f"Expected {name} to be one of {list(allowed)}, but got {value!r}.")
