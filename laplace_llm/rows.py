"""The GGN over all LoRA weights at once, kept as rows: exact up to a rank, truncated beyond it.

The GGN of N examples is ``R^T R`` with N (C - 1) rows R (for softmax): one matrix of that size,
``R R^T``, holds all that the posterior over P weights needs, and no P x P matrix is ever made.
Unlike a Kronecker factorisation, it keeps the correlations between layers.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from laplace_llm.eigen import eigh
from laplace_llm.errors import StateError

# How many rows beyond the largest rank may wait for the next truncation, as a part of that rank.
SLACK = 0.25


def sum_of_squares(rows: Tensor) -> Tensor:
    """Return the sum of squares of rows (n, P), in float64, also where single ones overflow."""
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square().sum()


class RowStore:
    """A matrix of rows that grows, in the device's memory, the CPU's, or a temporary file.

    Parameters
    ----------
    columns : int
        P.
    dtype, device
        Of the rows as they come and go.
    factors_on : {'cpu', 'disk'}, optional
        Where they are kept; default: on their device. A file is in `tempfile`'s folder (set TMPDIR
        where that is small, or memory itself), and gone with the object.

    Raises
    ------
    OSError
        If the disk is full.
    """

    def __init__(
        self,
        columns: int,
        dtype: torch.dtype,
        device: torch.device,
        factors_on: Literal["cpu", "disk"] | None = None,
    ) -> None:
        self.columns, self.dtype, self.device, self.factors_on = columns, dtype, device, factors_on
        self._file: Path | None = None
        if factors_on == "disk":
            folder = tempfile.mkdtemp(prefix="laplace_llm-")
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            self._file = Path(folder) / "rows"
        self._buffer = self._allocate(0)
        self.count = 0

    def _allocate(self, rows: int) -> Tensor:
        if self._file is None or rows == 0:
            device = "cpu" if self.factors_on else self.device
            return torch.empty(rows, self.columns, dtype=self.dtype, device=device)
        # The file only ever grows, so that what is in it stays. It is made to grow here, as
        # from_file would write a zero over its first byte.
        size = rows * self.columns
        with self._file.open("ab") as file:
            file.truncate(size * self.dtype.itemsize)
            if hasattr(os, "posix_fallocate"):  # else a full disk is noticed too late, by a signal
                os.posix_fallocate(file.fileno(), 0, size * self.dtype.itemsize)
        mapped = torch.from_file(str(self._file), shared=True, size=size, dtype=self.dtype)
        return mapped.view(rows, self.columns)

    def reserve(self, rows: int, limit: int | None = None) -> None:
        """Make room for this many rows altogether, or half as many again, up to the limit."""
        if rows > len(self._buffer):
            before, grown = self._buffer, rows + rows // 2
            self._buffer = self._allocate(grown if limit is None else min(grown, limit))
            if self._file is None:
                self._buffer[: self.count] = before[: self.count]

    def append(self, rows: Tensor) -> None:
        """Add rows (n, P) at the end; room must have been reserved."""
        self._buffer[self.count : self.count + len(rows)] = rows
        self.count += len(rows)

    def extend(self, rows: int) -> Tensor:
        """Add so many rows at the end, and return them to be written to, where they are kept."""
        self.reserve(self.count + rows)
        self.count += rows
        return self._buffer[self.count - rows : self.count]

    def every(self, step: int, start: int) -> RowStore:
        """Return a view of every `step`-th row."""
        view = copy.copy(self)
        view._buffer = self._buffer[start : self.count : step]
        view.count = len(view._buffer)
        return view

    def parts(self, rows: int = 64) -> Iterator[Tensor]:
        """Yield the rows, a few at a time, where they are kept."""
        yield from self._buffer[: self.count].split(rows)

    def columns_of(self, start: int, stop: int) -> Tensor:
        """Return some columns of all rows, on the device."""
        return self._buffer[: self.count, start:stop].to(self.device)

    def set_columns(self, start: int, stop: int, values: Tensor) -> None:
        """Overwrite some columns of the first rows."""
        self._buffer[: len(values), start:stop] = values


class LowRankGGN:
    """Streaming ``sum G^T G`` over rows G of all tensors together.

    While no more than `max_rank` rows have come, it is exact. Beyond, it keeps the leading
    eigenpairs: every time a quarter more rows than that have gathered, and at the end of a fit.
    The order of batches then changes the result by no more than what the truncation lost.

    Parameters
    ----------
    sizes : Sequence[int]
        Number of weights of each tensor, together P.
    max_rank : int, optional
        Bounds the rows kept at 1.25 x `max_rank`, of P values each (while their buffer grows, its
        old and its new copy exist at once); None keeps all rows.
    dtype, device
        Of the rows.
    factors_on : {'cpu', 'disk'}, optional
        See `RowStore`.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        max_rank: int | None,
        dtype: torch.dtype,
        device: torch.device,
        factors_on: Literal["cpu", "disk"] | None = None,
    ) -> None:
        self.sizes = list(sizes)
        self.max_rank = max_rank
        self.store = RowStore(sum(self.sizes), dtype, device, factors_on)
        self.trace = torch.zeros((), dtype=torch.float64, device=device)
        self.lost_trace = torch.zeros((), dtype=torch.float64, device=device)

    @property
    def rank(self) -> int:
        """Number of rows kept."""
        return self.store.count

    def blocks(self) -> list[tuple[int, int]]:
        """Return the first and last column (exclusive) of each tensor."""
        ends = list(accumulate(self.sizes))
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def add(self, rows: Tensor) -> None:
        """Add the GGN of rows (n, P)."""
        self.trace += sum_of_squares(rows)
        self._append(rows)

    def _append(self, rows: Tensor) -> None:
        if self.max_rank is None:
            self.store.reserve(self.rank + len(rows))
            self.store.append(rows)
            return
        limit = self.max_rank + max(int(SLACK * self.max_rank), 1)
        for part in rows.split(limit - self.max_rank):
            if self.rank + len(part) > limit:
                self.truncate()
            self.store.reserve(self.rank + len(part), limit)
            self.store.append(part)

    def truncate(self) -> None:
        """Keep the `max_rank` leading eigenpairs, and count what is lost of the trace."""
        if self.max_rank is None or self.rank <= self.max_rank:
            return
        values, vectors = eigh(self.gram(), "the GGN of all tensors")
        kept = vectors[:, -self.max_rank :]
        self.lost_trace += values[: -self.max_rank].clamp_min(0).sum()
        for start, stop in self.blocks():
            columns = self.store.columns_of(start, stop)
            self.store.set_columns(start, stop, kept.T @ columns.double())
        self.store.count = self.max_rank

    def merge(self, other: LowRankGGN) -> None:
        """Add another GGN over the same tensors."""
        self.extend(other.store.parts(), other.trace, other.lost_trace)
        self.truncate()

    def extend(self, parts: Iterable[Tensor], trace: Tensor, lost_trace: Tensor) -> None:
        """Add the rows (n, P) that are left of another GGN, a few at a time, and its traces."""
        for part in parts:
            self._append(part)
        self.trace += trace.to(self.trace)
        self.lost_trace += lost_trace.to(self.trace)

    def gram(self) -> Tensor:
        """Return ``R R^T`` (m, m) in float64."""
        total = self.trace.new_zeros(self.rank, self.rank)
        for gram in self._grams():
            total += gram
        return total

    def grams(self) -> Tensor:
        """Return ``R_l R_l^T`` of every tensor, (L, m, m) in float64."""
        return torch.stack(list(self._grams()))

    def _grams(self) -> Iterator[Tensor]:
        for start, stop in self.blocks():
            # Single-precision products would drown the eigenvalues below 1e-7 of the largest.
            columns = self.store.columns_of(start, stop).double()
            yield columns @ columns.T

    def state(self) -> dict[str, Any]:
        """Return plain containers of tensors and numbers, for `torch.save`."""
        return {
            "rows": torch.cat([*self.store.parts()]),
            "trace": self.trace.clone(),
            "lost_trace": self.lost_trace.clone(),
        }

    def load(self, state: dict[str, Any]) -> LowRankGGN:
        """Return a new GGN with the contents of `state`, of this one's rank and place.

        It may be that of a fit that goes on, with more than `max_rank` rows until it ends.
        """
        rows = state.get("rows")
        if rows is None or rows.ndim != 2 or rows.shape[1] != self.store.columns:
            came = "none" if rows is None else f"shape {tuple(rows.shape)}"
            raise StateError(
                f"Expected rows of {self.store.columns} weights, but the state has {came}. Load it "
                "with the same adapter and tensors=... as it was saved."
            )
        store = self.store
        new = type(self)(self.sizes, self.max_rank, store.dtype, store.device, store.factors_on)
        new.extend([rows], state["trace"], state["lost_trace"])
        return new
