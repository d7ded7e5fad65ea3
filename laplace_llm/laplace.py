"""The life of a posterior over LoRA weights: fit and keep; tuning is in `laplace_llm.tuning`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from laplace_llm._compat import ParametricLaplace
from laplace_llm.adapters import active_adapters
from laplace_llm.curvature import BatchSummary, StreamingInterface
from laplace_llm.data import check_any, check_labels, check_outputs, labelled, numbered
from laplace_llm.errors import LaplaceLLMError, StateError
from laplace_llm.session import hosting_parent_backend
from laplace_llm.shards import Shard, as_shard
from laplace_llm.taps import Batch, check_logits
from laplace_llm.tuning import LoraTuned

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


class LoraLaplace(LoraTuned):
    """What the ``"lora"`` structures share; abstract, and not registered with the parent.

    Takes the arguments of `LoraPosterior`.
    """

    def fit(
        self,
        train_loader: DataLoader | Iterable[Any],
        override: bool = True,
        progress_bar: bool = False,
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

        Raises
        ------
        DataError
            If the loader is empty, labels are missing, out of range or of a choice that their row
            does not have, or batches have different numbers of outputs C.
        OutputError
            If the model does not return (B, C) logits that are finite, or -inf for choices that a
            row does not have. As with every error, an earlier posterior stays as it was.
        ShardError
            If another of the processes fails, which itself raises what went wrong.
        """
        shard = as_shard(train_loader)
        merge = not override and self.H is not None
        earlier = self._train_loaders if merge else []
        with self._borrowed(as_fitted=merge):
            sums = self._sums_over(
                shard, self._empty_curvature, self._fit_batch, "[Computing Hessian]", progress_bar,
                self.n_outputs if merge else None,
            )  # fmt: skip
            loaders = [*(earlier or []), train_loader]
            self._set_curvature(self._completed(sums.state, merge, loaders, progress_bar), merge)
            self.mean = self._values()
            self.loss = self.loss + sums.loss if merge else sums.loss
        self.n_data = self.n_data + sums.n_data if merge else sums.n_data
        self.n_outputs = sums.n_outputs
        self._fitted_under = active_adapters(self.model)
        self._train_sample = sums.sample
        # An iterator is used up now; and some of the data must not pass for all of them.
        gone = earlier is None or isinstance(shard.loader, Iterator)
        self._train_loaders = None if gone else loaders

    def _sums_over(
        self,
        shard: Shard,
        empty: Callable[[], Any],
        accumulate: Callable[[Any, Batch, Tensor], BatchSummary],
        description: str,
        progress_bar: bool,
        n_outputs: int | None = None,
    ) -> Sums:
        """Return the running sums over the data of all processes, from a pass over a shard.

        `empty` makes running sums that have seen no data, `accumulate` adds a batch to them, and
        `n_outputs` is C, where it is known.
        """
        with shard.in_step():
            own = self._own_sums(shard, empty(), accumulate, description, progress_bar, n_outputs)
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
        state: Any,
        accumulate: Callable[[Any, Batch, Tensor], BatchSummary],
        description: str,
        progress_bar: bool,
        n_outputs: int | None = None,
    ) -> Sums:
        """Return the running sums over this process's data alone."""
        sample: list[Batch] = []
        n_data = 0
        loss = torch.zeros((), dtype=torch.float64, device=self._device)
        batches = labelled(shard, self.dict_key_y, self._device, description, progress_bar)
        for index, (x, y) in enumerate(batches):
            try:
                summary = accumulate(state, x, y)
                n_outputs = check_outputs(summary.n_outputs, n_outputs)
            except LaplaceLLMError as error:
                raise numbered(error, index) from error
            loss += summary.loss.to(loss)
            if n_data < SAMPLE_SIZE:
                sample.append(x)
            n_data += len(y)
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

    # Keep ---------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the posterior as tensors, numbers and strings.

        The parent's keys, plus the names of the tensors, so that a state is only ever loaded over
        the adapter it belongs to.
        """
        self._check_H_init()
        return {
            **ParametricLaplace.state_dict(self),
            "H": self._curvature_state(),
            "likelihood": self._likelihood_name,
            "tensors": [tensor.name for tensor in self.tensors],
            "adapter": self.adapter,
        }

    @property
    def _likelihood_name(self) -> str:
        return str(getattr(self.likelihood, "value", self.likelihood))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, into the same kind of posterior over the same tensors.

        Raises
        ------
        StateError
            If the state belongs to another class, likelihood or adapter; nothing is changed then.
        """
        expected = {
            "cls_name": type(self).__name__,
            "likelihood": self._likelihood_name,
            "tensors": [tensor.name for tensor in self.tensors],
            "adapter": self.adapter,
        }
        for key, value in expected.items():
            if state_dict.get(key) != value:
                raise StateError(
                    f"Expected a state with {key}={_short(value)}, but it has "
                    f"{_short(state_dict.get(key))}. Load it into the posterior it came from."
                )
        if len(state_dict["mean"]) != self.n_params:
            raise StateError(
                f"Expected a state with {self.n_params} weights, but it has "
                f"{len(state_dict['mean'])}."
            )
        curvature = self._curvature_from_state(state_dict["H"])
        for key in ("temperature", "enable_backprop", "loss", "n_data", "n_outputs"):
            setattr(self, key, state_dict[key])
        self.mean = state_dict["mean"].to(self._device, self._dtype)
        for key in ("prior_mean", "prior_precision", "sigma_noise"):
            setattr(self, key, state_dict[key])
        self._set_curvature(curvature, merge=False)
        self._train_loaders, self._train_sample, self._fitted_under = None, [], None

    def _curvature_state(self) -> Any:
        return self.H

    def _curvature_from_state(self, state: Any) -> Any:
        return state.to(self._empty_curvature())


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
