"""The fit of a posterior over LoRA weights, in one pass over the data or several."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from laplace_llm.adapters import active_adapters
from laplace_llm.checkpoints import Checkpoints, Pass, Progress
from laplace_llm.curvature import BatchSummary, StreamingInterface
from laplace_llm.data import check_any, check_labels, check_outputs, labelled, numbered
from laplace_llm.errors import LaplaceLLMError, OptionError
from laplace_llm.keeping import LoraKept
from laplace_llm.seeds import default_generator
from laplace_llm.session import hosting_parent_backend
from laplace_llm.shards import Shard, as_shard
from laplace_llm.taps import Batch, check_logits

# So many training examples are kept (as the loader's batches) to look at the confidence on.
SAMPLE_SIZE = 32


class Sums(NamedTuple):
    """What one pass over the data adds up to.

    Attributes
    ----------
    state : Any
        The structure's running sums.
    loss : Tensor
        A scalar.
    n_data, n_outputs : int
        N and C (0 if there were no data).
    sample : list[Batch]
        Inputs of the first batches on this process.
    """

    state: Any
    loss: Tensor
    n_data: int
    n_outputs: int
    sample: list[Batch]


class LoraLaplace(LoraKept):
    """What the ``"lora"`` structures share; abstract, and not registered with the parent.

    Takes the arguments of `LoraPosterior`.
    """

    def fit(
        self,
        train_loader: DataLoader | Iterable[Any],
        override: bool = True,
        progress_bar: bool = False,
        *,
        checkpoint_dir: str | Path | None = None,
        checkpoint_every: int | None = None,
    ) -> None:
        """Fit the posterior at the model's present weights, in one pass over the data.

        Several processes fit together where each calls this with its shard of the data: a
        DataLoader with a `DistributedSampler`, one that ``accelerator.prepare`` returned, or
        any loader wrapped in `laplace_llm.Shard`. Their sums are added up, without the examples
        that are repeated to make the shards equally long, and all end with the posterior of a
        single process, to rounding. Any other loader is the whole data of the process that
        calls, and nothing is exchanged. Where a backend draws labels (``stochastic=True``), each
        process draws by its own random state.

        Parameters
        ----------
        train_loader : Iterable
            Yields mappings with labels under `dict_key_y`, or ``(X, y)`` pairs. No length needed:
            unlike in the parent, N is the number of examples seen (so ``drop_last`` is right).
            Also unlike there, targets (B,) are taken for regression with one output.
        override : bool, default=True
            Whether to start anew; False adds the data to those of earlier fits.
        progress_bar : bool, default=False
            Whether to show one.
        checkpoint_dir : str or Path, optional
            A folder to keep the running sums in. If the fit is interrupted, however that may be,
            the same call goes on where it was, and ends at the very posterior of a fit that was
            not, provided that the loader yields the same batches again and there are as many
            processes. (In float32, of one with the same checkpoints: sums are rounded where they
            are kept.) The files stay; delete the folder once the posterior is saved.
        checkpoint_every : int, optional
            So many batches apart. Default: 100.

        Raises
        ------
        DataError
            If the loader is empty, labels are missing, out of range or of a choice that their row
            does not have, or batches have different numbers of outputs C.
        OutputError
            If the model does not return (B, C) logits that are finite, or -inf for choices that a
            row does not have. As with every error, an earlier posterior stays as it was.
        StateError
            If `checkpoint_dir` belongs to another fit: of other weights, options or data.
        StorageError
            If `checkpoint_dir` cannot be written to; before the fit, or, where the disk becomes
            full, after it: the posterior then is fitted all the same, and in memory.
        ShardError
            If another of the processes fails, which itself raises what went wrong.
        """
        shard = as_shard(train_loader)
        merge = not override and self.H is not None
        earlier = self._train_loaders if merge else []
        with self._borrowed(as_fitted=merge):
            with shard.in_step():
                checkpoints = self._checkpoints(checkpoint_dir, checkpoint_every, shard, merge)
            sums = self._sums_over(
                shard, self._empty_curvature, self._fit_batch, "[Computing Hessian]", progress_bar,
                checkpoints, self.n_outputs if merge else None,
            )  # fmt: skip
            loaders = [*(earlier or []), train_loader]
            state = self._completed(sums.state, merge, loaders, progress_bar, checkpoints)
            self._set_curvature(state, merge)
            self.mean = self._values()
            self.loss = self.loss + sums.loss if merge else sums.loss
        self.n_data = self.n_data + sums.n_data if merge else sums.n_data
        self.n_outputs = sums.n_outputs
        self._fitted_under = active_adapters(self.model)
        self._train_sample = sums.sample
        # An iterator is used up now; and some of the data must not pass for all of them.
        gone = earlier is None or isinstance(shard.loader, Iterator)
        self._train_loaders = None if gone else loaders
        if checkpoints is not None:
            checkpoints.close()

    def _checkpoints(
        self, folder: str | Path | None, every: int | None, shard: Shard, merge: bool
    ) -> Checkpoints | None:
        if folder is None:
            if every is not None:
                raise OptionError("Expected a checkpoint_dir with checkpoint_every, but got none.")
            return None
        fit = {**self._description(), "added_to": self.n_data if merge else 0}
        drawn = getattr(self.backend, "stochastic", False)
        devices = dict.fromkeys((torch.device("cpu"), self._device)) if drawn else ()
        generators = [default_generator(device) for device in devices]
        return Checkpoints(folder, every, fit, shard, generators)

    def _sums_over(
        self,
        shard: Shard,
        empty: Callable[[], Any],
        accumulate: Callable[[Any, Batch, Tensor], BatchSummary],
        description: str,
        progress_bar: bool,
        checkpoints: Checkpoints | None,
        n_outputs: int | None = None,
    ) -> Sums:
        """Return the running sums over the data of all processes, from a pass over a shard.

        `empty` makes running sums that have seen no data, `accumulate` adds a batch to them, and
        `n_outputs` is C, where it is known.
        """
        with shard.in_step():
            kept = Pass() if checkpoints is None else checkpoints.next_pass()
            zero = torch.zeros((), dtype=torch.float64, device=self._device)
            progress = kept.start(Progress(empty(), zero, n_outputs))
            own = self._own_sums(shard, progress, accumulate, description, progress_bar, kept)
        if shard.size == 1:
            return own
        found = shard.exchange((own.n_data, own.n_outputs, float(own.loss)))
        for seen, outputs, _ in found:
            n_outputs = check_outputs(outputs, n_outputs) if seen else n_outputs
        n_data, loss = sum(n for n, _, _ in found), sum(value for _, _, value in found)
        check_any(n_data)
        state = self._over_all(own.state, shard)
        return Sums(state, own.loss.new_tensor(loss), n_data, n_outputs or 0, own.sample)

    def _own_sums(
        self,
        shard: Shard,
        progress: Progress,
        accumulate: Callable[[Any, Batch, Tensor], BatchSummary],
        description: str,
        progress_bar: bool,
        kept: Pass,
    ) -> Sums:
        """Return the running sums over this process's data alone."""
        sample: list[Batch] = []
        n_data = 0
        state, loss, n_outputs = progress
        batches = labelled(shard, self.dict_key_y, self._device, description, progress_bar)
        for index, (x, y) in enumerate(batches):
            if n_data < SAMPLE_SIZE:
                sample.append(x)
            n_data += len(y)
            if kept.has(x, y):
                continue
            try:
                summary = accumulate(state, x, y)
                n_outputs = check_outputs(summary.n_outputs, n_outputs)
            except LaplaceLLMError as error:
                raise numbered(error, index) from error
            loss += summary.loss.to(loss)
            kept.keep(Progress(state, loss, n_outputs))
        kept.finish(Progress(state, loss, n_outputs))
        return Sums(state, loss.to(self._dtype), n_data, n_outputs or 0, sample)

    def _fit_batch(self, state: Any, x: Batch, y: Tensor) -> BatchSummary:
        if isinstance(self.backend, StreamingInterface):
            return self._accumulate(state, x, y)
        with torch.no_grad():
            logits = self.model(x)
        check_logits(logits)
        y = check_labels(y, logits, self.backend.likelihood == "regression")
        with hosting_parent_backend(self.model, logits.shape[1]):
            return BatchSummary(self._accumulate_parent(state, x, y), logits.shape[1])
