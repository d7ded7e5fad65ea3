"""An interrupted fit goes on where it was, and ends as if nothing had happened."""

import logging
import multiprocessing
import os
import random
import signal
import sys
import time
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest.mock import patch

import interrupted
import pytest
import torch
from interrupted import BATCHES, STRUCTURES, Kill, Loader, batches, build, result
from models import letter_batch, letter_head, snapshot, tiny_llama
from torch.utils.data import DataLoader

from laplace_llm import DiagLoraLaplace, KronLoraLaplace
from laplace_llm.errors import DataError, OptionError, StateError, StorageError

# Its children are forked from a process that has imported all there is to import, and has run
# nothing yet. Before Python 3.13 it finds modules through the environment alone.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["interrupted"])
with patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}):
    forkserver.ensure_running()


def interrupt() -> None:
    raise KeyboardInterrupt("bomb")


def uninterrupted(structure: str, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    la = build(structure)
    la.fit(batches(), **kwargs)
    return result(la)


def child(target: Any, *args: Any) -> int:
    """Run a function in a process of its own; return its exit code."""
    process = PROCESSES.Process(target=target, args=args)
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


def files_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Errors and Ctrl-C --------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [1, pytest.param(3, marks=pytest.mark.slow), BATCHES - 1])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_an_interrupted_fit_ends_as_one_that_was_not(structure, before, tmp_path):
    torch.manual_seed(0)
    la = build(structure)
    model = snapshot(la.model)
    loader = Loader(interrupt, before, 1, "letters")
    with pytest.raises(KeyboardInterrupt):
        la.fit(loader, checkpoint_dir=tmp_path, checkpoint_every=1)
    assert snapshot(la.model) == model
    torch.manual_seed(1)  # the checkpoint has the random state, where it matters
    again = build(structure)
    again.fit(batches(), checkpoint_dir=tmp_path, checkpoint_every=1)
    # In single precision, how sums are rounded depends on when they are kept.
    other = {"checkpoint_dir": tmp_path / "other", "checkpoint_every": 1}
    single = other if structure.endswith("float32") else {}
    assert result(again) == uninterrupted(structure, **single)


@pytest.mark.parametrize("structure", ["ekfac", "ekfac, rank 2"])
def test_the_second_pass_goes_on_too(structure, tmp_path):
    la = build(structure)
    with pytest.raises(KeyboardInterrupt):
        la.fit(Loader(interrupt, 2, 2, "letters"), checkpoint_dir=tmp_path, checkpoint_every=1)
    again = build(structure)
    again.fit(batches(), checkpoint_dir=tmp_path, checkpoint_every=1)
    assert result(again) == uninterrupted(structure)


def test_batches_that_the_checkpoint_holds_do_not_run_the_model(tmp_path):
    la = build("kron")
    with pytest.raises(KeyboardInterrupt):
        la.fit(Loader(interrupt, 4, 1, "letters"), checkpoint_dir=tmp_path, checkpoint_every=2)
    calls = []
    la.model.register_forward_pre_hook(lambda *args: calls.append(1))
    la.fit(batches(), checkpoint_dir=tmp_path, checkpoint_every=2)
    assert len(calls) == BATCHES - 4


@pytest.mark.parametrize("every", [1, 2, 100])
def test_checkpoints_change_nothing(every, tmp_path):
    la = build("kron")
    la.fit(batches(), checkpoint_dir=tmp_path, checkpoint_every=every)
    assert result(la) == uninterrupted("kron")


def test_a_fit_that_is_done_is_not_done_again(tmp_path):
    la = build("kron")
    la.fit(batches(), checkpoint_dir=tmp_path)
    again = build("kron")
    calls = []
    again.model.register_forward_pre_hook(lambda *args: calls.append(1))
    again.fit(batches(), checkpoint_dir=tmp_path)
    assert not calls
    assert result(again) == result(la)
    again.optimize_prior_precision()  # the data to tune on are known, too
    assert files_of(tmp_path) == ["rank-0-of-1-pass-0.safetensors", "rank-0-of-1.json"]


def test_more_data_go_on_too(tmp_path):
    def start() -> Any:
        la = build("kron")
        la.fit([letter_batch(4, seed=7)])
        return la

    whole = start()
    whole.fit(batches(), override=False)
    la = start()
    loader = Loader(interrupt, 3, 1, "letters")
    with pytest.raises(KeyboardInterrupt):
        la.fit(loader, override=False, checkpoint_dir=tmp_path, checkpoint_every=1)
    again = start()
    again.fit(batches(), override=False, checkpoint_dir=tmp_path, checkpoint_every=1)
    assert result(again) == result(whole)
    with pytest.raises(StateError, match="added_to"):
        start().fit(batches(), checkpoint_dir=tmp_path)


def test_pairs_of_tensors_and_seeded_shuffling(tmp_path):
    def loader() -> DataLoader:
        x, y = (torch.cat(parts) for parts in zip(*batches("mlp"), strict=True))
        data = torch.utils.data.TensorDataset(x, y)
        return DataLoader(
            data, batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(3)
        )

    def broken() -> Any:
        for index, batch in enumerate(loader()):
            if index == 2:
                interrupt()
            yield batch

    whole = build("diag", "mlp")
    whole.fit(loader())
    with pytest.raises(KeyboardInterrupt):
        build("diag", "mlp").fit(broken(), checkpoint_dir=tmp_path, checkpoint_every=1)
    again = build("diag", "mlp")
    again.fit(loader(), checkpoint_dir=tmp_path, checkpoint_every=1)
    assert result(again, "mlp") == result(whole, "mlp")


# SIGKILL ------------------------------------------------------------------------------------------

KILLS = [
    ("kron", Kill("loader", 3)),
    ("kron", Kill("write", 2)),
    ("kron", Kill("replace", 1)),
    ("kron", Kill("replace", 4)),
    ("kron, sampled", Kill("loader", 2)),
    ("ekfac", Kill("loader", 2, in_pass=2)),
    ("ekfac", Kill("write", 7)),
    ("lowrank, truncated", Kill("write", 4)),
    ("lowrank, disk", Kill("loader", 3)),
    ("diag", Kill("replace", 3)),
    ("gp", Kill("loader", 4)),
]


@pytest.mark.parametrize(("structure", "kill"), KILLS, ids=str)
def test_a_killed_fit_goes_on(structure, kill, tmp_path):
    folder, output = tmp_path / "checkpoints", tmp_path / "result.pt"
    code = child(interrupted.fit, structure, str(folder), kill, str(output))
    assert code == -signal.SIGKILL
    assert not output.exists()
    assert child(interrupted.fit, structure, str(folder), None, str(output)) == 0
    expected = tmp_path / "expected.pt"
    assert child(interrupted.fit, structure, str(tmp_path / "other"), None, str(expected)) == 0
    assert torch.load(output, weights_only=False) == torch.load(expected, weights_only=False)
    assert not [name for name in files_of(folder) if name.endswith(".tmp")]


def test_a_fit_that_is_killed_at_any_moment_goes_on(tmp_path):
    """Until it is done: each of its processes lives for a part of what a fit takes."""
    folder, output = tmp_path / "checkpoints", tmp_path / "result.pt"
    chance = random.Random(0)
    start = time.monotonic()
    expected = tmp_path / "expected.pt"
    assert child(interrupted.fit, "kron", str(tmp_path / "other"), None, str(expected)) == 0
    whole = time.monotonic() - start
    for _ in range(6):
        process = PROCESSES.Process(
            target=interrupted.fit, args=("kron", str(folder), None, str(output))
        )
        process.start()
        time.sleep(whole * chance.random())
        process.kill()
        process.join()
    assert child(interrupted.fit, "kron", str(folder), None, str(output)) == 0
    assert torch.load(output, weights_only=False) == torch.load(expected, weights_only=False)


# What cannot go on --------------------------------------------------------------------------------


@pytest.fixture
def started(tmp_path):
    """Return a folder with the checkpoints of a fit that was interrupted."""
    with pytest.raises(KeyboardInterrupt):
        build("kron").fit(
            Loader(interrupt, 3, 1, "letters"), checkpoint_dir=tmp_path, checkpoint_every=1
        )
    return tmp_path


@pytest.mark.parametrize(
    "loader",
    [
        pytest.param(lambda: batches()[::-1], id="another-order"),
        pytest.param(lambda: batches()[:2], id="too-few"),
        pytest.param(lambda: [letter_batch(7)], id="other-batches"),
        pytest.param(
            lambda: [{**b, "labels": 2 - b["labels"]} for b in batches()], id="other-labels"
        ),
    ],
)
def test_other_data_are_refused(loader, started):
    la, before = build("kron"), files_of(started)
    model = snapshot(la.model)
    with pytest.raises(DataError, match=r"same 3 batches as before the interruption.*Seed"):
        la.fit(loader(), checkpoint_dir=started, checkpoint_every=1)
    assert snapshot(la.model) == model
    assert files_of(started) == before
    la.fit(batches(), checkpoint_dir=started, checkpoint_every=1)
    assert result(la) == uninterrupted("kron")


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (lambda: DiagLoraLaplace(letter_head(), "classification"), "class='KronLoraLaplace'"),
        (lambda: build("kron, rank 2"), "options="),
        (lambda: build("kron, sampled"), "options="),
        (lambda: KronLoraLaplace(letter_head(tiny_llama(seed=1)), "classification"), "sha256="),
        (lambda: KronLoraLaplace(letter_head(rank=2), "classification"), "tensors="),
        (lambda: KronLoraLaplace(letter_head(classes=2), "classification"), "head="),
        (lambda: KronLoraLaplace(letter_head(dtype=torch.float32), "classification"), "dtype="),
    ],
)
def test_checkpoints_of_another_fit_are_refused(other, named, started):
    la = other()
    with pytest.raises(StateError, match=f"{named}.*another checkpoint_dir"):
        la.fit(batches(), checkpoint_dir=started, checkpoint_every=1)


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "2"])
def test_how_often_is_a_positive_number(every, tmp_path):
    with pytest.raises(OptionError, match="checkpoint_every"):
        build("kron").fit(batches(), checkpoint_dir=tmp_path / "new", checkpoint_every=every)
    assert not (tmp_path / "new").exists()


def test_how_often_needs_a_folder():
    with pytest.raises(OptionError, match="checkpoint_dir"):
        build("kron").fit(batches(), checkpoint_every=3)


def test_a_folder_that_cannot_be_written_to_is_an_error_before_the_fit(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    la = build("kron")
    la.fit(batches()[:1])
    earlier, calls = result(la), []
    la.model.register_forward_pre_hook(lambda *args: calls.append(1))
    with pytest.raises(StorageError, match=r"file/inside.*another folder"):
        la.fit(batches(), checkpoint_dir=tmp_path / "file" / "inside")
    assert not calls
    assert result(la) == earlier


def test_a_full_disk_is_an_error_that_keeps_the_fit_in_memory(tmp_path):
    """The system itself refuses files beyond a size: the JSON fits, the factors do not."""
    folder, output = tmp_path / "checkpoints", tmp_path / "result.pt"
    arguments = ("kron", str(folder), str(output), 8_000)
    assert child(interrupted.fit_with_little_room, *arguments) == 0
    caught, saved, found = torch.load(output, weights_only=False)
    assert caught.startswith("StorageError: The posterior is fitted and in memory")
    assert saved.startswith("StorageError: Could not write")
    assert "laplace_model.safetensors" in saved
    expected = tmp_path / "expected.pt"
    assert child(interrupted.fit, "kron", str(tmp_path / "other"), None, str(expected)) == 0
    assert found == torch.load(expected, weights_only=False)
    assert files_of(folder) == ["rank-0-of-1.json"]


def test_a_full_disk_is_told_once(tmp_path, caplog, monkeypatch):
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("laplace_llm.files.save_file", full)
    la = build("kron")
    with (
        caplog.at_level(logging.WARNING, "laplace_llm"),
        pytest.raises(StorageError, match=r"fitted and in memory.*No space left on device"),
    ):
        la.fit(batches(), checkpoint_dir=tmp_path, checkpoint_every=1)
    assert len(caplog.records) == 1
    assert result(la) == uninterrupted("kron")
