"""Memory without memory: an operation run on the meta device, where tensors have only shapes.

For models too big for the machine. The real code runs, from construction to prediction; what its
checks ask of values that do not exist is answered as good data would (`LiveBytes`).
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, UntypedStorage
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

aten = torch.ops.aten


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of meta tensors that are alive.

    A storage counts from the operation that returned it until it is freed. What a kernel allocates
    and frees inside itself is not seen, but for one: bitsandbytes' product with a 4-bit weight,
    which on CUDA restores the weight first where there are as many tokens as here.

    - ``bool(x.any())`` is false and ``bool(x.all())`` true: batches and results are as expected.
    - A boolean mask keeps everything, so that ranks are at their largest.
    - What is moved off the device stays on it.

    Attributes
    ----------
    current, peak, largest : int
        Bytes alive now, their maximum since `reset`, and the largest allocation since then.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = self.largest = 0
        self._alive: dict[int, weakref.ref[UntypedStorage]] = {}

    def reset(self) -> None:
        """Start `peak` and `largest` anew."""
        self.peak, self.largest = self.current, 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        if isinstance(first, Tensor) and first.is_meta:
            if func is aten._local_scalar_dense.default:
                return _scalar(first)
            if func is aten._to_copy.default and "device" in kwargs:
                kwargs["device"] = torch.device("meta")
            if func is aten.index.Tensor:
                args = (first, [_kept(index) for index in args[1]], *args[2:])
        result = func(*args, **kwargs)
        if func in (aten.any.default, aten.any.dim):
            result.none_of_it = True
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self._track(tensor.untyped_storage())
        if func.name() == "bitsandbytes::gemm_4bit":
            weight = torch.empty(args[2], dtype=args[0].dtype, device="meta")
            self._track(weight.untyped_storage())
        return result

    def _track(self, storage: UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive or not size:
            return
        self._alive[key] = weakref.ref(storage, partial(self._free, key, size))
        self.current += size
        self.peak = max(self.peak, self.current)
        self.largest = max(self.largest, size)

    def _free(self, key: int, size: int, _: Any) -> None:
        del self._alive[key]
        self.current -= size


def _scalar(value: Tensor) -> bool | int | float:
    if value.dtype is torch.bool:
        return not hasattr(value, "none_of_it")
    return 1.0 if value.is_floating_point() else 1


def _kept(index: Tensor | None) -> Tensor | None:
    """Replace a mask by the indices of all that it is over."""
    if index is None or index.dtype is not torch.bool:
        return index
    return torch.empty(index.numel(), dtype=torch.long, device="meta")


class FusedAttention(TorchFunctionMode):
    """Attention without a mask keeps what the fused CUDA kernel keeps for its backward pass.

    On meta tensors torch would take the kernel that keeps T x T weights instead.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        unmasked = func is F.scaled_dot_product_attention and kwargs.get("attn_mask") is None
        if not unmasked or not args[0].is_meta:
            return func(*args, **kwargs)
        query, key, value = args[:3]
        return aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, bool(kwargs.get("is_causal")), scale=kwargs.get("scale")
        )[0]


class Account(NamedTuple):
    """What one operation needs, in bytes.

    Attributes
    ----------
    before, peak : int
        Alive before the operation, and at its peak.
    kept : int
        What its result keeps alive.
    largest : int
        Its largest single allocation.
    """

    before: int
    peak: int
    kept: int
    largest: int


def account(run: Callable[[], Any], live: LiveBytes) -> Account:
    """Run an operation whose tensors are on the meta device, inside `live`."""
    gc.collect()
    before = live.current
    live.reset()
    result = run()
    kept = live.current - before
    del result
    return Account(before, live.peak, kept, live.largest)
