"""The file of results: a line a run, appended whole, read back after a kill."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

OK, FAILED, SKIPPED, NOT_APPLICABLE = "ok", "failed", "skipped", "not applicable"
PROTOCOLS = ("held out", "all data")


class Key(NamedTuple):
    """Which run: a method on a task, a seed and a protocol.

    The protocol is 'held out' (every method; the validation questions are not trained on) or
    'all data' (methods that need none; their adapter is trained on those questions, too).
    """

    task: str
    seed: int
    protocol: str
    method: str


@dataclass
class Run:
    """A line of the file.

    Attributes
    ----------
    task, seed, protocol, method
        See `Key`.
    group, tuned, single_model
        Of the method.
    settings : dict
        What must be the same for a run to count as done.
    status : {'ok', 'failed', 'skipped', 'not applicable'}
    reason : str
        Of the status, unless it is ok; one line.
    traceback : str
        Of a failed run.
    tests : dict
        For every test set, the task's own first: ``metrics``, and ``questions`` with each
        question's ``nll``, ``confidence``, ``correct``, and so on, as lists.
    coverage : dict
        Of conformal sets, by kind.
    coverage_reason : str
        Why there are none.
    costs : dict
        Seconds to fit, milliseconds and passes a question, bytes, numbers kept.
    note : str
        Of the method.
    absent : dict[str, str]
        Out-of-distribution sets that there are no questions of, and why.
    command : str
        What it came from.
    """

    task: str
    seed: int
    protocol: str
    method: str
    group: str
    tuned: bool
    single_model: bool
    settings: dict[str, Any]
    status: str = OK
    reason: str = ""
    traceback: str = ""
    tests: dict[str, Any] = field(default_factory=dict)
    coverage: dict[str, Any] = field(default_factory=dict)
    costs: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    coverage_reason: str = ""
    absent: dict[str, str] = field(default_factory=dict)
    command: str = ""

    @property
    def key(self) -> Key:
        """Which run it is."""
        return Key(self.task, self.seed, self.protocol, self.method)


class Results:
    """The runs in a file; the last one of each key counts.

    Parameters
    ----------
    path : Path
        ``results.jsonl``; need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, run: Run) -> None:
        """Add a run, in one write."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        entry = _rounded(asdict(run)) | {"settings": run.settings}
        line = json.dumps(entry, separators=(",", ":")) + "\n"
        # After a kill in the middle of a line, the next one must not continue it.
        start = "" if self._ends_whole() else "\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, (start + line).encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _ends_whole(self) -> bool:
        if not self.path.exists() or self.path.stat().st_size == 0:
            return True
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"

    def read(self, settings: dict[str, Any] | None = None) -> dict[Key, Run]:
        """Return the runs; broken lines are left out.

        Parameters
        ----------
        settings : dict, optional
            The settings that count, by task; default: each task's last ones.
        """
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        everything = []
        for line in lines:
            try:
                everything.append(Run(**json.loads(line)))
            except (json.JSONDecodeError, TypeError):
                continue
        if settings is None:
            settings = {run.task: run.settings for run in everything}
        return {run.key: run for run in everything if settings.get(run.task) == run.settings}

    def done(self, settings: dict[str, Any]) -> set[Key]:
        """Return the keys that need not run again; what failed or was skipped is tried anew."""
        runs = self.read(settings).values()
        return {run.key for run in runs if run.status in (OK, NOT_APPLICABLE)}


def _rounded(value: Any) -> Any:
    """Round numbers to six digits, so that a prediction for every question stays small."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(entry) for entry in value]
    return value
