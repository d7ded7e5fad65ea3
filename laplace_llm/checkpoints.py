"""Where an interrupted fit goes on: the running sums of each pass, in files replaced at once.

A fit that is started again passes over the data as before, but leaves out the model for the batches
that its checkpoint already holds. It recognises them, so a loader that shuffles anew is an error.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from laplace_llm import files
from laplace_llm.errors import DataError, StateError, StorageError
from laplace_llm.options import check_optional_count
from laplace_llm.shards import Shard
from laplace_llm.taps import Batch

logger = logging.getLogger(__name__)

DEFAULT_EVERY = 100


class Progress(NamedTuple):
    """What a pass has come to.

    Attributes
    ----------
    state : Any
        Running sums: a tensor, or an object with ``state()`` and ``load(state)``.
    loss : Tensor
        A scalar.
    n_outputs : int, optional
        C, once it is known.
    """

    state: Any
    loss: Tensor
    n_outputs: int | None


class Pass:
    """One pass over the data that keeps nothing: what `Checkpoints` follows, and fits without."""

    def start(self, progress: Progress) -> Progress:
        """Return where the pass goes on from."""
        return progress

    def has(self, x: Batch, y: Tensor) -> bool:
        """Return whether the running sums already hold this batch, the next one of the loader."""
        return False

    def keep(self, progress: Progress) -> None:
        """Take note that the running sums now hold another batch."""

    def finish(self, progress: Progress) -> None:
        """Take note that there are no more batches."""


class Checkpoints:
    """The files of one fit, of one of the processes that share its data.

    ``rank-0-of-1.json`` says what the fit is, ``rank-0-of-1-pass-0.safetensors`` how far its first
    pass has come. They stay when the fit is done, so that it is not lost either where the process
    ends before the posterior is saved.

    Parameters
    ----------
    folder : str or Path
        Made where it is missing.
    every : int, optional
        Number of batches between two checkpoints. Default: 100.
    fit : Mapping
        What distinguishes this fit from all others, as JSON can hold it.
    shard : Shard
        This process's part of the data.
    generators : list[torch.Generator]
        What the backend draws labels from, to be put back where it was.

    Raises
    ------
    OptionError
        If `every` is no positive number.
    StateError
        If the folder has the checkpoints of another fit.
    StorageError
        If the folder cannot be written to.
    """

    def __init__(
        self,
        folder: str | Path,
        every: int | None,
        fit: Mapping[str, Any],
        shard: Shard,
        generators: list[torch.Generator],
    ) -> None:
        check_optional_count("checkpoint_every", every)
        self.every = DEFAULT_EVERY if every is None else every
        self.stem = Path(folder) / f"rank-{shard.rank}-of-{shard.size}"
        self.generators = generators
        self.failure: StorageError | None = None
        self._passes = 0
        self._check(files.plain_json(fit))

    def _check(self, fit: dict[str, Any]) -> None:
        path = self.stem.with_name(f"{self.stem.name}.json")
        if path.is_file():
            earlier = files.read_json(path.read_text(encoding="utf-8"), path)
            for key in fit:
                if fit[key] != earlier.get(key):
                    raise StateError(
                        f"Expected checkpoints of this fit in {path.parent}, but they are of one "
                        f"with {key}={earlier.get(key)!r} instead of {fit[key]!r}. Give another "
                        "checkpoint_dir, or delete this one."
                    )
            return
        for stale in path.parent.glob(f"{self.stem.name}-pass-*.safetensors"):
            stale.unlink()
        files.write_json(path, fit)

    def next_pass(self) -> Pass:
        """Return the next pass over the data."""
        self._passes += 1
        name = f"{self.stem.name}-pass-{self._passes - 1}.safetensors"
        return _KeptPass(self, self.stem.with_name(name))

    def close(self) -> None:
        """Raise the StorageError that came up on the way, if any; the fit went on without."""
        if self.failure is not None:
            raise StorageError(
                f"The posterior is fitted and in memory (save it elsewhere), but its checkpoints "
                f"could not be written: {self.failure}"
            ) from self.failure


class _KeptPass(Pass):
    """One pass over the data, with its file."""

    def __init__(self, checkpoints: Checkpoints, path: Path) -> None:
        self.checkpoints, self.path = checkpoints, path
        self._kept = 0  # batches in the file
        self._seen = 0  # batches of the loader
        self._expected = ""  # digest of the data in the file
        self._random: list[Tensor] = []
        self._digest = hashlib.sha256()

    def start(self, progress: Progress) -> Progress:
        """Return what the file holds, if there is one."""
        if not self.path.is_file():
            return progress
        tensors, plain = files.read_tensors(self.path, progress.loss.device)
        saved = files.unflatten({**plain, **tensors})
        self._kept, self._expected = saved["n_batches"], saved["data_sha256"]
        self._random = [state.cpu() for state in saved["random"]]
        state, loss = progress.state, saved["loss"].to(progress.loss)
        if isinstance(state, Tensor):
            return Progress(saved["state"].to(state), loss, saved["n_outputs"])
        return Progress(state.load(saved["state"]), loss, saved["n_outputs"])

    def has(self, x: Batch, y: Tensor) -> bool:
        """Return whether the file holds this batch.

        Raises
        ------
        DataError
            If the batches that it holds were others.
        """
        _add(self._digest, x)
        _add(self._digest, y)
        self._seen += 1
        if self._seen == self._kept:
            self._check_same()
            for generator, state in zip(self.checkpoints.generators, self._random, strict=True):
                generator.set_state(state)
        return self._seen <= self._kept

    def _check_same(self) -> None:
        if self._seen != self._kept or self._digest.hexdigest() != self._expected:
            raise DataError(
                f"Expected the loader to yield the same {self._kept} batches as before the "
                f"interruption, but they are others. Seed its shuffling (generator=...), or "
                f"delete {self.path.parent} to start anew."
            )

    def keep(self, progress: Progress) -> None:
        """Write the file, if it is time."""
        if self._seen % self.checkpoints.every == 0:
            self._write(progress)

    def finish(self, progress: Progress) -> None:
        """Write the file for the last time.

        Raises
        ------
        DataError
            If there were fewer batches than the file holds.
        """
        if self._seen < self._kept:
            self._check_same()
        if self._seen > self._kept:
            self._write(progress)

    def _write(self, progress: Progress) -> None:
        state = progress.state
        content = {
            "state": state if isinstance(state, Tensor) else state.state(),
            "loss": progress.loss,
            "n_outputs": progress.n_outputs,
            "n_batches": self._seen,
            "data_sha256": self._digest.hexdigest(),
            "random": [generator.get_state() for generator in self.checkpoints.generators],
        }
        tensors, plain = files.split(files.flatten(content))
        try:
            files.write_tensors(self.path, tensors, plain)
        except StorageError as error:
            # Hours of work are worth more than a checkpoint of it: the fit goes on.
            if self.checkpoints.failure is None:
                logger.warning("%s The fit goes on.", error)
            self.checkpoints.failure = error
        else:
            self._kept = self._seen


def _add(digest: Any, values: Any) -> None:
    """Add the tensors of a batch to a digest."""
    if isinstance(values, Tensor):
        digest.update(f"{values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    elif isinstance(values, Mapping):
        for key in sorted(values, key=str):
            digest.update(str(key).encode())
            _add(digest, values[key])
