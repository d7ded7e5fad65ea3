"""What is to be run: tasks x seeds x protocols x methods, and what of it is done."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch

from laplace_llm.benchmark.calibration.method import Method, registered
from laplace_llm.benchmark.calibration.methods.point import MAP_NAME
from laplace_llm.benchmark.calibration.results import PROTOCOLS, Key
from laplace_llm.benchmark.calibration.tasks import Recipe, registered_recipes
from laplace_llm.errors import OptionError


@dataclass(frozen=True)
class Options:
    """The command line's options; see ``--help``."""

    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    model: str
    data_dir: Path | None
    device: str
    train: int
    val: int
    test: int
    rank: int
    targets: tuple[str, ...]
    out: Path
    all_data: bool = True
    quick: bool = False
    save_predictions: bool = False
    command: str = ""

    @property
    def protocols(self) -> tuple[str, ...]:
        """The protocols to run."""
        return PROTOCOLS if self.all_data else PROTOCOLS[:1]

    def settings(self, task: Recipe) -> dict[str, Any]:
        """Return what makes a run another one, as it comes back from a file."""
        names = ("model", "train", "val", "test", "rank", "targets")
        chosen = {name: getattr(self, name) for name in names} | {"recipe": asdict(task)}
        chosen["data_dir"] = self.data_dir and str(self.data_dir.resolve())
        # Costs are part of a result, so another device makes another run.
        return json.loads(json.dumps(chosen | {"device": hardware(self.device)}))


def hardware(device: str) -> str:
    """Return a device's name: of the GPU, or 'cpu'."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return device


def load_plugin(path: Path) -> None:
    """Import a user's file, which registers methods or tasks.

    Raises
    ------
    OptionError
        If there is no such file.
    """
    if not path.is_file():
        raise OptionError(f"Expected --plugin to be a Python file, but there is no {str(path)!r}.")
    spec = spec_from_file_location(f"plugin_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(module_from_spec(spec))


def select_methods(patterns: Iterable[str], quick: bool = False) -> dict[str, type[Method]]:
    """Return the methods whose name has, or matches, one of the patterns; MAP always.

    Parameters
    ----------
    patterns : Iterable[str]
        Parts of a name that start with a word ("point" is not in "checkpoint"), groups, or globs of
        a whole name; upper and lower case are the same.
        None of them means all methods.
    quick : bool, default=False
        Whether, without patterns, to leave out those that are not `quick`.

    Raises
    ------
    OptionError
        If a pattern has no method.
    """
    every, patterns = registered(), [pattern.lower() for pattern in patterns]
    if not patterns:
        return {name: cls for name, cls in every.items() if cls.quick or not quick}
    chosen = {MAP_NAME}
    for pattern in patterns:
        found = {
            name
            for name, cls in every.items()
            if re.search(rf"(?<!\w){re.escape(pattern)}", name.lower())
            or fnmatch(name.lower(), pattern)
            or pattern == cls.group.lower()
        }
        if not found:
            raise OptionError(
                f"Expected --methods to be parts of names, but {pattern!r} is in none of: "
                f"{'; '.join(every)}."
            )
        chosen |= found
    return {name: cls for name, cls in every.items() if name in chosen}


def select_tasks(names: Iterable[str]) -> list[Recipe]:
    """Return the tasks of these names.

    Raises
    ------
    OptionError
        If there is no such task.
    """
    every = registered_recipes()
    unknown = [name for name in names if name not in every]
    if unknown:
        raise OptionError(f"Expected --tasks to be of {sorted(every)}, but got {unknown[0]!r}.")
    return [every[name] for name in names]


def keys(task: Recipe, seed: int, protocol: str, methods: dict[str, type[Method]]) -> list[Key]:
    """Return the runs of one problem: tuned methods need the held-out questions."""
    return [
        Key(task.name, seed, protocol, name)
        for name, method in methods.items()
        if protocol == PROTOCOLS[0] or not method.tuned
    ]


def fingerprint(*parts: Any) -> str:
    """Return a short name for what an adapter depends on."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
