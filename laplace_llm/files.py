"""Nested states as files: tensors in safetensors, all else in JSON; written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from laplace_llm.errors import OptionError, StateError, StorageError


def flatten(state: Any, prefix: str = "") -> dict[str, Any]:
    """Return the tensors, numbers, strings and plain lists of a nested state under dotted names.

    Parameters
    ----------
    state : Any
        Dictionaries and lists of these. Keys hold no dots, and are not all numbers.
    prefix : str
        Comes before every name.
    """
    if isinstance(state, dict) and state:
        entries = state.items()
    elif isinstance(state, (list, tuple)) and any(_is_nested(entry) for entry in state):
        entries = {str(index): entry for index, entry in enumerate(state)}.items()
    else:
        return {prefix.removesuffix("."): state}
    return {
        name: value
        for key, entry in entries
        for name, value in flatten(entry, f"{prefix}{key}.").items()
    }


def _is_nested(entry: Any) -> bool:
    return isinstance(entry, (Tensor, dict, list, tuple))


def unflatten(flat: Mapping[str, Any]) -> Any:
    """Return the nested state that `flatten` took apart."""
    if set(flat) == {""}:
        return flat[""]
    groups: dict[str, dict[str, Any]] = {}
    for name, value in flat.items():
        key, _, rest = name.partition(".")
        groups.setdefault(key, {})[rest] = value
    state = {key: unflatten(group) for key, group in groups.items()}
    if all(key.isdigit() for key in state):
        return [state[key] for key in sorted(state, key=int)]
    return state


def split(flat: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a flat state, and all else."""
    tensors = {name: value for name, value in flat.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in flat.items() if name not in tensors}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Any = None) -> None:
    """Write a safetensors file, with JSON in its header.

    Raises
    ------
    StorageError
        If it cannot be written; what was there before stays.
    """
    own = {name: _own(value) for name, value in tensors.items()}
    header = None if metadata is None else {"json": json.dumps(metadata)}
    _replace(path, lambda temporary: save_file(own, temporary, header))


def _own(value: Tensor) -> Tensor:
    """Return a tensor that shares no memory with what else is written, as safetensors asks for."""
    value = value.detach().cpu().contiguous()
    whole = value.untyped_storage().nbytes() == value.nbytes
    return value if whole else value.clone()


def write_json(path: Path, content: Any) -> None:
    """Write JSON for people to read.

    Raises
    ------
    StorageError
        As `write_tensors`.
    """
    text = json.dumps(content, indent=2) + "\n"
    _replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Put a file in place at once, when all of it is on the disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        _synchronise(temporary)
        os.replace(temporary, path)
        _synchronise(path.parent)
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"Could not write {path}: {error}. What is in memory is as it was: free some space, "
            "or give another folder."
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _synchronise(place: Path) -> None:
    """Have the system put a file or the names in a folder on the disk."""
    handle = os.open(place, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_tensors(path: Path, device: torch.device) -> tuple[dict[str, Tensor], Any]:
    """Return the tensors and the JSON of a safetensors file.

    Raises
    ------
    StateError
        If it is no such file, or not the whole of one.
    """
    try:
        with safe_open(path, "pt") as file:
            # Copied, as how the bytes lie in the file would change the last digit of what is
            # computed from them.
            tensors = {name: file.get_tensor(name).clone().to(device) for name in file.keys()}  # noqa: SIM118
            metadata = (file.metadata() or {}).get("json", "null")
    except (OSError, SafetensorError) as error:
        raise StateError(
            f"Expected a whole safetensors file, but {path} cannot be read: {error}. It may be "
            "truncated; take it from where it was saved once more."
        ) from error
    return tensors, read_json(metadata, path)


def read_json(text: str, path: Path) -> Any:
    """Return what JSON says.

    Raises
    ------
    StateError
        If it is none.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise StateError(
            f"Expected JSON in {path}, but it breaks off or is something else ({error}). Take the "
            "file from where it was saved once more."
        ) from error


def plain_json(content: Any) -> Any:
    """Return what comes back of a content that is written as JSON.

    Raises
    ------
    OptionError
        If JSON cannot hold it.
    """
    try:
        return json.loads(json.dumps(content))
    except TypeError as error:
        raise OptionError(
            f"Expected options that JSON can hold (numbers, strings, lists), but: {error}. Leave "
            "such an option out of backend_kwargs, or save state_dict() with torch.save."
        ) from error


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def sha256_of_json(content: Any) -> str:
    """Return the SHA-256 of JSON, however it is laid out."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
