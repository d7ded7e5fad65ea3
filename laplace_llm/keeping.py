"""A posterior over LoRA weights as a state: out of the object, and into another one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from laplace_llm._compat import ParametricLaplace
from laplace_llm.curvature import StreamingInterface
from laplace_llm.errors import StateError
from laplace_llm.saving import SavedPosterior
from laplace_llm.tuning import LoraTuned


class LoraKept(LoraTuned, SavedPosterior):
    """A posterior over LoRA weights that can be kept, as a state or in files."""

    _asdl_fisher_kwargs: dict[str, Any]

    def state_dict(self) -> dict[str, Any]:
        """Return the posterior as tensors, numbers and strings; `torch.load` needs no pickle.

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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, into the same kind of posterior over the same tensors.

        Raises
        ------
        StateError
            If the state belongs to another class, likelihood or adapter, or something is missing
            in it or of another shape; nothing is changed then.
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
        with _naming_what_is_missing():
            if len(state_dict["mean"]) != self.n_params:
                raise StateError(
                    f"Expected a state with {self.n_params} weights, but it has "
                    f"{len(state_dict['mean'])}."
                )
            curvature = self._curvature_from_state(state_dict["H"])
            for key in ("temperature", "enable_backprop", "n_data", "n_outputs"):
                setattr(self, key, state_dict[key])
            for key in ("mean", "loss"):
                given = state_dict[key]
                setattr(self, key, torch.as_tensor(given, dtype=self._dtype, device=self._device))
            for key in ("prior_mean", "prior_precision", "sigma_noise"):
                setattr(self, key, state_dict[key])
            self._set_curvature(curvature, merge=False)
            self._train_loaders, self._train_sample, self._fitted_under = None, [], None

    def _curvature_state(self) -> Any:
        """Return the curvature as nested dictionaries and lists of tensors and numbers."""
        return self.H

    def _curvature_from_state(self, state: Any) -> Any:
        """Return the running sums that `_set_curvature` takes, checked against this posterior.

        For running sums that are one tensor.
        """
        expected = self._empty_curvature()
        if state.shape != expected.shape:
            raise StateError(
                f"Expected a curvature of shape {tuple(expected.shape)}, but the state has "
                f"{tuple(state.shape)}. Load it into the posterior it came from."
            )
        return state.to(expected)

    # For `SavedPosterior` -------------------------------------------------------------------------

    def _options(self) -> dict[str, Any]:
        options = {**self._given, "asdl_fisher_kwargs": self._asdl_fisher_kwargs}
        if isinstance(self.backend, StreamingInterface):
            options["backend_kwargs"] = self.backend.options()  # their defaults may change
        return options

    def _state_of_model(self) -> dict[str, Any]:
        names = [tensor.name for tensor in self.tensors]
        return {"mean": self._values(), "tensors": names, "adapter": self.adapter}

    def _check_unchanged(self) -> None:
        self.check_adapter()
        if not torch.equal(self.mean, self._values()):
            raise StateError(
                f"Expected adapter {self.adapter!r} to have the weights that it had in fit(), but "
                "they are others now. Fit again, or load the adapter that was fitted."
            )


@contextmanager
def _naming_what_is_missing() -> Iterator[None]:
    try:
        yield
    except (KeyError, IndexError) as error:
        raise StateError(
            f"Expected a state with {error.args[0]!r}, but it has none. It was cut, or comes from "
            "another release of laplace_llm."
        ) from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
