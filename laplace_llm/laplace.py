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
from laplace_llm.data import check_labels, check_outputs, labelled, numbered
from laplace_llm.errors import LaplaceLLMError, StateError
from laplace_llm.session import hosting_parent_backend
from laplace_llm.taps import Batch, check_logits
from laplace_llm.tuning import LoraTuned

# So many training examples are kept (as the loader's batches) to look at the confidence on.
SAMPLE_SIZE = 32


class Seen(NamedTuple):
    """What a pass over a loader saw, besides the curvature.

    Attributes
    ----------
    loss : Tensor
        Negative log likelihood summed over the data.
    n_data : int
        Number of examples.
    n_outputs : int
        C.
    sample : list[Batch]
        The inputs of the first batches.
    """

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
        """
        merge = not override and self.H is not None
        earlier = self._train_loaders if merge else []
        with self._borrowed(as_fitted=merge):
            state = self._empty_curvature()
            seen = self._stream(
                train_loader, state, self._fit_batch, "[Computing Hessian]", progress_bar,
                self.n_outputs if merge else None,
            )  # fmt: skip
            loaders = [*(earlier or []), train_loader]
            self._set_curvature(self._completed(state, merge, loaders, progress_bar), merge)
            self.mean = self._values()
            self.loss = self.loss + seen.loss if merge else seen.loss
        self.n_data = self.n_data + seen.n_data if merge else seen.n_data
        self.n_outputs = seen.n_outputs
        self._fitted_under = active_adapters(self.model)
        self._train_sample = seen.sample
        # An iterator is used up now; and some of the data must not pass for all of them.
        gone = earlier is None or isinstance(train_loader, Iterator)
        self._train_loaders = None if gone else loaders

    def _stream(
        self,
        loader: Iterable[Any],
        state: Any,
        accumulate: Callable[[Any, Batch, Tensor], BatchSummary],
        description: str,
        progress_bar: bool,
        n_outputs: int | None = None,
    ) -> Seen:
        """Add every batch of a loader to running sums in place, and say what came by."""
        sample: list[Batch] = []
        n_data = 0
        loss = torch.zeros((), dtype=self._dtype, device=self._device)
        batches = labelled(loader, self.dict_key_y, self._device, description, progress_bar)
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
        assert n_outputs is not None  # an empty loader is an error
        return Seen(loss, n_data, n_outputs, sample)

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
        return state.to(self._device, self._dtype)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
