"""Fits that are interrupted, also by SIGKILL, and what they come to when they are started again."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from laplace.curvature import CurvlinopsGGN
from models import frozen, letter_batch, letter_head, mlp_batch, tiny_mlp

from laplace_llm import (
    DiagLoraLaplace,
    EkfacLoraLaplace,
    FullLoraLaplace,
    FunctionalLoraLaplace,
    KronLoraLaplace,
    LowRankLoraLaplace,
    StreamingEF,
    files,
)

BATCHES = 5
STRUCTURES: dict[str, tuple[Any, dict[str, Any]]] = {
    "kron": (KronLoraLaplace, {}),
    "kron, rank 2": (KronLoraLaplace, {"backend_kwargs": {"rank": 2}}),
    "kron, rank 2, float32": (KronLoraLaplace, {"backend_kwargs": {"rank": 2}}),
    "kron, sampled": (KronLoraLaplace, {"backend_kwargs": {"stochastic": True}}),
    "kron, empirical": (KronLoraLaplace, {"backend": StreamingEF}),
    "kron, curvlinops": (KronLoraLaplace, {"backend": CurvlinopsGGN}),
    "ekfac": (EkfacLoraLaplace, {}),
    "ekfac, rank 2": (EkfacLoraLaplace, {"backend_kwargs": {"rank": 2}}),
    "diag": (DiagLoraLaplace, {}),
    "full": (FullLoraLaplace, {"tensors": "B"}),
    "lowrank": (LowRankLoraLaplace, {}),
    "lowrank, truncated": (LowRankLoraLaplace, {"max_rank": 8}),
    "lowrank, disk": (LowRankLoraLaplace, {"factors_on": "disk"}),
    "gp": (FunctionalLoraLaplace, {}),
    "gp, independent subset": (
        FunctionalLoraLaplace,
        {"independent_outputs": True, "n_subset": 9},
    ),
}


def build(structure: str, head: str = "letters") -> Any:
    """Return a posterior before its fit."""
    cls, kwargs = STRUCTURES[structure]
    dtype = torch.float32 if structure.endswith("float32") else torch.float64
    model = letter_head(dtype=dtype) if head == "letters" else tiny_mlp(dtype)
    return cls(model, "classification", **kwargs)


def batches(head: str = "letters") -> list[Any]:
    """Return what a deterministic loader yields."""
    make: Callable[..., Any] = letter_batch if head == "letters" else mlp_batch
    return [make(2 + index % 2, seed=index) for index in range(BATCHES)]


class Loader:
    """Yields the batches, and does something before one of them, in one of the passes."""

    def __init__(self, act: Callable[[], Any], before: int, in_pass: int, head: str) -> None:
        self.act, self.before, self.in_pass, self.passes = act, before, in_pass, 0
        self.batches = batches(head)

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        for index, batch in enumerate(self.batches):
            if index == self.before and self.passes == self.in_pass:
                self.act()
            yield batch


def result(la: Any, head: str = "letters") -> Any:
    """Return all that a fit came to, to compare with ``==``, bit for bit."""
    test = letter_batch(3, seed=9) if head == "letters" else mlp_batch(3, seed=9)[0]
    return frozen({**la.state_dict(), "prediction": la(test)})


class Kill(NamedTuple):
    """Where SIGKILL comes."""

    place: str  # "loader", "write" (before a file is whole), or "replace" (before it is in place)
    at: int  # before which batch, or at which file
    in_pass: int = 1


def killed() -> None:
    """End this process as the system does when memory is short."""
    os.kill(os.getpid(), signal.SIGKILL)


def fit(structure: str, folder: str, kill: Kill | None, output: str) -> None:
    """Fit with a checkpoint a batch, die on the way, or save the result."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    la = build(structure)
    loader: Any = batches()
    if kill is not None and kill.place == "loader":
        loader = Loader(killed, kill.at, kill.in_pass, "letters")
    elif kill is not None:
        _kill_in_writing(kill)
    la.fit(loader, checkpoint_dir=folder, checkpoint_every=1)
    torch.save(result(la), output)


def _kill_in_writing(kill: Kill) -> None:
    count = 0

    def counted(original: Callable) -> Callable:
        def call(*args: Any) -> Any:
            nonlocal count
            count += 1
            if count == kill.at:
                if kill.place == "write":  # half of the file has reached the disk
                    half = Path(args[1])
                    half.write_bytes(b"\0" * 100)
                killed()
            return original(*args)

        return call

    if kill.place == "write":
        files.save_file = counted(files.save_file)
    else:
        files.os.replace = counted(os.replace)


def fit_with_little_room(structure: str, folder: str, output: str, limit: int) -> None:
    """Fit where no file can be larger than `limit` bytes, as on a full disk."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    torch.set_num_threads(1)
    la = build(structure)
    caught = "nothing"
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    try:
        la.fit(batches(), checkpoint_dir=folder, checkpoint_every=1)
    except Exception as error:
        caught = f"{type(error).__name__}: {error}"
    saved = "nothing"
    try:
        la.save_pretrained(folder)
    except Exception as error:
        saved = f"{type(error).__name__}: {error}"
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    torch.save((caught, saved, result(la)), output)
