"""Posteriors in a folder beside their adapter, in the Hugging Face way: what is written there.

``laplace_model.safetensors`` holds the tensors, ``laplace_config.json`` all else: how to build the
posterior, what it belongs to, and checksums. No pickle anywhere. `laplace_llm.loading` reads both.
"""

from __future__ import annotations

from abc import abstractmethod
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import PushToHubMixin

from laplace_llm import files
from laplace_llm.adapters import active_adapters
from laplace_llm.errors import OptionError
from laplace_llm.fingerprint import fingerprint, portable_name
from laplace_llm.heads import Head
from laplace_llm.tensors import LoraTensor

WEIGHTS, CONFIG = "laplace_model.safetensors", "laplace_config.json"
# Raised when files change in a way that earlier releases would misread. CHANGELOG has the history;
# every release reads all versions up to its own.
FORMAT_VERSION = 1
# What people may want to read in the JSON.
NUMBERS = {"loss", "prior_mean", "prior_precision", "sigma_noise"}
PACKAGES = ("laplace-llm", "laplace-torch", "torch", "transformers", "peft")


class SavedPosterior(PushToHubMixin):
    """A posterior that can be saved beside its adapter; mixed into all of them."""

    model: nn.Module
    adapter: str
    tensors: list[LoraTensor]
    likelihood: str

    @property
    @abstractmethod
    def _dtype(self) -> torch.dtype: ...

    def state_dict(self) -> dict[str, Any]:
        """Return the posterior as tensors, numbers and strings."""
        raise NotImplementedError

    @abstractmethod
    def _options(self) -> dict[str, Any]:
        """Return the constructor's arguments that `state_dict` does not hold."""

    @abstractmethod
    def _state_of_model(self) -> dict[str, Any]:
        """Return what the state holds of the adapter itself, and a file need not repeat."""

    @property
    def _likelihood_name(self) -> str:
        return str(getattr(self.likelihood, "value", self.likelihood))

    def _check_unchanged(self) -> None:
        """Raise StateError if the adapter is not the one that was fitted."""

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save the posterior beside its adapter, for `laplace_llm.from_pretrained`.

        Writes ``laplace_model.safetensors`` and ``laplace_config.json`` where PEFT's own
        `save_pretrained` writes the adapter: into the folder, or a subfolder named like the
        adapter if that is not ``"default"``. Both are as large as the factors (rank x d). Each is
        replaced at once, and only when all of it is on the disk.

        Parameters
        ----------
        save_directory : str or Path
            The folder; made where it is missing.
        is_main_process : bool, default=True
            Whether to write; of several processes, one should.
        push_to_hub : bool, default=False
            Whether to upload it afterwards, as `push_to_hub` does.
        **kwargs
            ``repo_id`` and what else `push_to_hub` takes. (What that method passes on itself,
            ``max_shard_size`` and ``safe_serialization``, has no effect.)

        Raises
        ------
        NotFittedError
            Before `fit`.
        StateError
            If the adapter's weights are no longer those of `fit`.
        StorageError
            If the folder cannot be written to, or the disk is full. The posterior stays in memory,
            and what was saved there before stays on the disk.
        """
        for key in ("max_shard_size", "safe_serialization"):
            kwargs.pop(key, None)
        if kwargs and not push_to_hub:
            raise OptionError(
                f"Expected {sorted(kwargs)} with push_to_hub=True only. Leave them out, or set it."
            )
        state = self.state_dict()
        self._check_unchanged()
        for key in self._state_of_model():
            del state[key]
        if is_main_process:
            folder = Path(save_directory)
            folder = folder if self.adapter == "default" else folder / self.adapter
            for key in NUMBERS & set(state):
                state[key] = _readable(state[key], len(self.tensors))
            tensors, rest = files.split(files.flatten(state))
            config = files.plain_json({**self._description(), "state": rest})
            files.write_tensors(folder / WEIGHTS, tensors, metadata={"format": FORMAT_VERSION})
            config["weights_sha256"] = files.sha256_of(folder / WEIGHTS)
            config["weights_bytes"] = (folder / WEIGHTS).stat().st_size
            config["config_sha256"] = files.sha256_of_json(config)
            files.write_json(folder / CONFIG, config)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)

    def _description(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "class": type(self).__name__,
            "hessian_structure": getattr(self, "_key", ("lora", "gp"))[1],
            "likelihood": self._likelihood_name,
            "options": self._options(),
            "head": describe_head(self.model),
            "adapter": self.adapter,
            "active_adapters": active_adapters(self.model),
            "base_model_name_or_path": base_model_name(self.model, self.adapter),
            "dtype": str(self._dtype).removeprefix("torch."),
            "tensors": described(self.tensors, self.adapter),
            "adapter_sha256": fingerprint(self.model, self.adapter),
            "versions": {name: _version(name) for name in PACKAGES},
        }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # run from its sources
        return "unknown"


def described(tensors: list[LoraTensor], adapter: str) -> dict[str, list[int]]:
    """Return the weights that a posterior is over: their portable names and shapes."""
    return {portable_name(t.name, adapter): list(t.shape) for t in tensors}


def describe_head(model: nn.Module) -> dict[str, Any] | None:
    """Return a head's class and arguments, None for a module that is no head."""
    return {"class": type(model).__name__, **model.config()} if isinstance(model, Head) else None


def base_model_name(model: nn.Module, adapter: str) -> str | None:
    """Return the base model's name on the Hub, or its folder, as PEFT keeps it."""
    configs = (getattr(module, "peft_config", {}).get(adapter) for module in model.modules())
    config = next((config for config in configs if config is not None), None)
    return getattr(config, "base_model_name_or_path", None)


def _readable(value: Any, length: int) -> Any:
    """Return up to `length` values as numbers, which JSON keeps to the last bit."""
    short = isinstance(value, Tensor) and value.ndim <= 1 and value.numel() <= length
    return value.tolist() if short else value
