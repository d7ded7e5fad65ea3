"""Sums of many terms that do not stall in single precision."""

from __future__ import annotations

import torch
from torch import Tensor

# As good as any for a million terms: BLOCK + n / BLOCK is smallest where BLOCK^2 = n.
BLOCK = 1024


class RunningSum:
    """A sum that grows in place, in two levels: of blocks, and of terms within a block.

    A float32 sum stops growing where a term is below 2^-24 of it. Here the first 1024 terms gather
    in a block; that is added to the earlier ones, and a new block begins. After n terms, rounding
    is that of 1024 + n / 1024 additions, and nothing stalls before 10^10 of them. There is one
    tensor for the first block, and two from then on; adding a term costs what it would without
    the levels. (Compensated and float64 sums need two tensors from the start, and several passes
    over them for a term.) In float64 there is one level.

    Parameters
    ----------
    start : Tensor
        What the sum starts from; written to.
    """

    def __init__(self, start: Tensor) -> None:
        self._levels = start.dtype != torch.float64
        self._block: Tensor | None = start
        self._earlier: Tensor | None = None
        self._terms = 0
        if self._levels and bool(start.any()):
            self.total()

    def open(self) -> Tensor:
        """Return the tensor that one more term is to be added to, in place."""
        if self._levels and self._terms == BLOCK:
            self._close()
        if self._block is None:
            assert self._earlier is not None
            self._block = torch.zeros_like(self._earlier)
        self._terms += 1
        return self._block

    def _close(self) -> None:
        assert self._block is not None
        if self._earlier is None:
            self._earlier, self._block = self._block, None
        else:
            self._earlier += self._block
            self._block.zero_()
        self._terms = 0

    def total(self) -> Tensor:
        """Return the sum; what is written to it counts."""
        if not self._levels:
            assert self._block is not None
            return self._block
        if self._block is not None:
            self._close()
            self._block = None
        assert self._earlier is not None
        return self._earlier

    def parts(self) -> list[Tensor]:
        """Return the tensors, one or two, whose sum it is."""
        return [part for part in (self._earlier, self._block) if part is not None]
