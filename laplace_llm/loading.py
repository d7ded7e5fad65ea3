"""From the files beside an adapter to a posterior, after everything about them has been checked."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from laplace import curvature as parent_backends
from torch import nn

from laplace_llm import files, heads
from laplace_llm._compat import CurvatureInterface
from laplace_llm.adapters import active_adapters, check_active
from laplace_llm.backends import StreamingEF, StreamingGGN
from laplace_llm.causal_heads import MultipleChoiceHead
from laplace_llm.errors import StateError
from laplace_llm.fingerprint import fingerprint
from laplace_llm.layers import adapters_of, lora_layers
from laplace_llm.saving import (
    CONFIG,
    FORMAT_VERSION,
    NUMBERS,
    WEIGHTS,
    base_model_name,
    describe_head,
    described,
)
from laplace_llm.scoring_head import ChoiceScoringHead
from laplace_llm.structures import APPROXIMATIONS, STRUCTURES

# What a file may name. Nothing else that it says is ever imported or run.
POSTERIORS = {cls.__name__: cls for cls in (*STRUCTURES, *APPROXIMATIONS.values())}
BACKENDS = {cls.__name__: cls for cls in (StreamingGGN, StreamingEF)} | {
    name: getattr(parent_backends, name)
    for name in ("CurvlinopsGGN", "CurvlinopsEF", "AsdlGGN", "AsdlEF")
    if hasattr(parent_backends, name)
}
HEADS = {
    cls.__name__: cls
    for cls in (MultipleChoiceHead, ChoiceScoringHead, heads.SequenceClassificationHead)
}


def from_pretrained(
    model: nn.Module,
    pretrained_model_name_or_path: str | Path,
    adapter: str | None = None,
    *,
    backend: type[CurvatureInterface] | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    **options: Any,
) -> Any:
    """Return the posterior that `save_pretrained` or `push_to_hub` saved, ready to predict.

    Nothing of the model is changed, and no code comes from the files. What is checked before
    anything is built: that both files are whole and unchanged (by SHA-256), their format's version,
    the adapter's weights (by SHA-256), the tensors' names, shapes and precision, and the head.

    Parameters
    ----------
    model : torch.nn.Module
        The same head over the same model and adapter as when the posterior was saved, or the
        PeftModel alone: it then gets the head that was saved.
    pretrained_model_name_or_path : str or Path
        A folder, or a repository on the Hub.
    adapter : str, optional
        The name that the adapter has now. Default: the one it had, or if the model has no such
        adapter, the active one.
    backend : type[CurvatureInterface], optional
        Default: the one that was used. It matters for further fits alone.
    subfolder, revision, token, cache_dir, local_files_only, force_download
        Of a repository, as in Hugging Face's own `from_pretrained`; `subfolder` of a folder, too.
    **options
        The constructor's, where another one than before is wanted: ``factors_on="disk"``.

    Returns
    -------
    la : LoraLaplace
        Of the class that was saved.

    Raises
    ------
    StateError
        If a file is missing, truncated, changed, or of a newer format; or if it belongs to another
        adapter, other weights of it, another head, or another precision.
    """
    folder = _Folder(
        pretrained_model_name_or_path,
        subfolder=subfolder,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        force_download=force_download,
    )
    config = _config(folder[CONFIG])
    model = _with_head(heads.undistributed(model), config["head"])
    adapter = adapter or _adapter_of(model, config["adapter"])
    la = _built(model, config, adapter, backend, options)
    _check_adapter(la, config)
    _warn_of_base(base_model_name(la.model, la.adapter), config["base_model_name_or_path"])
    state = _state(folder[WEIGHTS], config, la)
    la.load_state_dict(state)
    la._fitted_under = active_adapters(la.model)  # as in fit, which has been checked
    return la


class _Folder:
    """The files of a folder or a repository, on this machine when they are asked for."""

    def __init__(self, place: str | Path, subfolder: str | None, **hub: Any) -> None:
        self.place, self.subfolder, self.hub = place, subfolder, hub

    def __getitem__(self, name: str) -> Path:
        local = Path(self.place, self.subfolder or "")
        if local.is_dir():
            if not (local / name).is_file():
                raise self._missing(name)
            return local / name
        if not isinstance(self.place, str):
            raise self._missing(name)
        try:
            found = hf_hub_download(self.place, name, subfolder=self.subfolder, **self.hub)
        except (OSError, ValueError, EntryNotFoundError) as error:
            raise self._missing(name) from error
        return Path(found)

    def _missing(self, name: str) -> StateError:
        place = "/".join(str(part) for part in (self.place, self.subfolder) if part)
        return StateError(
            f"Expected {name} in {place!r}, which is neither in such a folder nor can be had from "
            "the Hub. la.save_pretrained(folder) and la.push_to_hub(repo_id) write it; of an "
            "adapter that is not named 'default', into a subfolder."
        )


def _config(path: Path) -> dict[str, Any]:
    """Return the configuration, if it is one, is whole, and is of a version that is known."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StateError(f"Expected text in {path}, but it cannot be read: {error}.") from error
    config = files.read_json(text, path)
    version = config.get("format_version") if isinstance(config, dict) else None
    if not isinstance(version, int):
        raise StateError(
            f"Expected {path} to say its format_version, but it does not. It is not a file of "
            "laplace_llm, or was cut."
        )
    if version > FORMAT_VERSION:
        raise StateError(
            f"Expected format_version {FORMAT_VERSION} or older, but {path} has {version}, of a "
            "newer release. Run pip install -U laplace-llm."
        )
    missing = sorted(_EXPECTED - set(config))
    if missing:
        raise StateError(
            f"Expected {missing[0]!r} in {path}, but it is missing. Take the file from where it "
            "was saved once more."
        )
    checksum = config.pop("config_sha256")
    if files.sha256_of_json(config) != checksum:
        raise StateError(
            f"Expected {path} as it was saved, but it was changed afterwards. Change the posterior "
            "itself (la.prior_precision = ...) and save it anew."
        )
    return config


_EXPECTED = {
    "class", "likelihood", "options", "head", "adapter", "active_adapters", "dtype", "tensors",
    "adapter_sha256", "base_model_name_or_path", "state", "weights_sha256", "weights_bytes",
    "config_sha256",
}  # fmt: skip


def _with_head(model: nn.Module, saved: dict[str, Any] | None) -> nn.Module:
    """Return the model with the head that was saved, if it has none."""
    if saved is None or (isinstance(model, heads.Head) and describe_head(model) == saved):
        return model
    if isinstance(model, heads.Head):
        raise StateError(f"Expected the head {saved}, but the model has {describe_head(model)}.")
    arguments = {key: value for key, value in saved.items() if key != "class"}
    return _known(saved["class"], HEADS, "head")(model, **arguments)


def _adapter_of(model: nn.Module, saved: str) -> str | None:
    """Return the name that the adapter was saved with, None if the model has no such adapter."""
    return saved if any(saved in adapters_of(layer) for _, layer in lora_layers(model)) else None


def _known(name: str, known: dict[str, Any], what: str) -> Any:
    if name not in known:
        raise StateError(
            f"Expected a {what} out of {sorted(known)}, but the file names {name!r}. "
            + ("Pass it as backend=..." if what == "backend" else "Update laplace-llm.")
        )
    return known[name]


def _built(
    model: nn.Module,
    config: dict[str, Any],
    adapter: str | None,
    backend: type[CurvatureInterface] | None,
    others: dict[str, Any],
) -> Any:
    """Return the posterior before anything is loaded."""
    options = {**config["options"], "adapter": adapter, **others}
    if backend is None:
        backend = _known(options["backend"], BACKENDS, "backend")
    cls = _known(config["class"], POSTERIORS, "posterior")
    return cls(model, config["likelihood"], **{**options, "backend": backend})


def _check_adapter(la: Any, config: dict[str, Any]) -> None:
    """Raise StateError unless the posterior belongs to this adapter, with these weights."""
    expected, found = config["tensors"], described(la.tensors, la.adapter)
    for name in [*expected, *found]:
        if expected.get(name) != found.get(name):
            raise StateError(
                f"Expected an adapter whose {name!r} is {_shape(expected.get(name))}, but that of "
                f"the model is {_shape(found.get(name))}. Load the adapter that was saved beside "
                "this posterior."
            )
    dtype = str(la._dtype).removeprefix("torch.")
    if dtype != config["dtype"]:
        raise StateError(
            f"Expected an adapter in {config['dtype']}, but it is in {dtype}. Load it as it was "
            "saved (adapter.to(...) changes it)."
        )
    active = config["active_adapters"]
    check_active(la.model, [la.adapter if n == config["adapter"] else n for n in active])
    if fingerprint(la.model, la.adapter) != config["adapter_sha256"]:
        raise StateError(
            f"Expected the very weights that the posterior was fitted at, but adapter "
            f"{la.adapter!r} has others (by SHA-256). It was trained on, or is another one: load "
            "the adapter that was saved beside this posterior, or fit again."
        )


def _warn_of_base(found: str | None, saved: str | None) -> None:
    """Warn of another base model, which the same one in another folder also looks like."""
    if None not in (found, saved) and found != saved:
        warnings.warn(
            f"The posterior was fitted on the base model {saved!r}, and this one is {found!r}. If "
            "they are not the same, its predictions mean nothing.",
            stacklevel=3,
        )


def _shape(shape: list[int] | None) -> str:
    return "missing" if shape is None else f"of shape {tuple(shape)}"


def _state(path: Path, config: dict[str, Any], la: Any) -> dict[str, Any]:
    """Return the state, if the file of the tensors is the one that the configuration is about."""
    size = path.stat().st_size
    if size != config["weights_bytes"]:
        raise StateError(
            f"Expected {config['weights_bytes']:,} bytes in {path}, but it has {size:,}: it was "
            "truncated, or belongs to another configuration. Take both files from where they were "
            "saved once more."
        )
    if files.sha256_of(path) != config["weights_sha256"]:
        raise StateError(
            f"Expected {path} as it was saved, but it has been changed (by SHA-256). Take it from "
            "where it was saved once more."
        )
    tensors, _ = files.read_tensors(path, la._device)
    state = files.unflatten({**config["state"], **tensors})
    for key in NUMBERS & set(state):
        if isinstance(state[key], list):
            state[key] = torch.tensor(state[key], dtype=la._dtype, device=la._device)
    return {**state, **la._state_of_model()}
