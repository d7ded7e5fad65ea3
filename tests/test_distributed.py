"""Several processes with a shard each end with what a single one gets: real ones, on gloo."""

import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from models import chunks, letter_head, select
from processes import TEST, TRAIN, VALIDATION, N, alone, described, shared_work
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel

from laplace_llm import (
    DiagLoraLaplace,
    FunctionalLoraLaplace,
    KronLoraLaplace,
    LowRankLoraLaplace,
    Shard,
)
from laplace_llm.errors import OptionError, UnsupportedLayerError
from laplace_llm.kernel import training_space
from laplace_llm.splits import dealt

WORLDS = pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])


@lru_cache
def launched(world):
    """Return the results of each rank, the exit code and stderr; of two, rank 1 fails at last."""
    script, torchrun = Path(__file__).with_name("processes.py"), ["-m", "torch.distributed.run"]
    with TemporaryDirectory() as folder:
        arguments = [script, folder, "3"]
        if world == 2:
            arguments = [*torchrun, "--standalone", "--nproc_per_node=2", script, folder, "fail"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            timeout=500,
            env=environment,
        )
        files = [Path(folder) / f"{rank}.pt" for rank in range(world)]
        assert all(file.exists() for file in files), done.stderr[-6000:]
        return [torch.load(file) for file in files], done


def ranks(world, key):
    return [result[key] for result in launched(world)[0]]


@lru_cache
def single():
    return shared_work(lambda batch, size: chunks(batch, size))


def assert_same(found, expected, name=""):
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), name
        for key, value in expected.items():
            assert_same(found[key], value, f"{name}, {key}")
    elif isinstance(expected, (list, tuple)):
        for index, value in enumerate(expected):
            assert_same(found[index], value, f"{name}, {index}")
    elif isinstance(expected, Tensor):
        torch.testing.assert_close(
            found, expected, rtol=1e-8, atol=1e-11, msg=lambda text: f"{name}: {text}"
        )
    else:
        assert found == expected, name


# As a single process -----------------------------------------------------------------------------


@WORLDS
def test_every_structure_and_tuning_method_equals_the_single_process(world):
    for found in ranks(world, "shared"):
        assert_same(found, single())


@WORLDS
def test_all_processes_have_the_same_posterior_to_the_last_bit(world):
    first, *others = ranks(world, "shared")
    for name in (
        key
        for key in first
        if key.startswith(("fit, lowrank", "fit, kron", "fit, ekfac", "fit, gp", "prior"))
    ):
        for other in others:
            torch.testing.assert_close(other[name], first[name], rtol=0, atol=0)


@WORLDS
def test_every_loader_that_is_a_shard_counts_each_example_once(world):
    expected = {}
    classes = {"": DiagLoraLaplace, "kron": KronLoraLaplace, "lowrank": LowRankLoraLaplace}
    classes["gp"] = FunctionalLoraLaplace
    for name, cls in classes.items():
        la = cls(letter_head())
        la.fit(chunks(TRAIN, 2))
        expected[name] = described(la) if name else {"n_data": N, "loss": la.loss, "H": la.H}
    for found in ranks(world, "loaders"):
        for name, posterior in found.items():
            kind = name.rpartition(", ")[2]
            assert_same(posterior, expected.get(kind, expected[""]), name)


@WORLDS
def test_a_truncated_posterior_is_the_same_everywhere_and_knows_what_it_lost(world):
    la = LowRankLoraLaplace(letter_head())
    la.fit([TRAIN])
    first, *others = ranks(world, "truncated")
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=0)
    assert len(first["rows"]) == 8
    assert_same(first["trace"], la.H.trace)
    assert first["lost"] > 0
    assert_same(first["rows"].square().sum() + first["lost"], first["trace"])


@WORLDS
def test_dropped_examples_stay_dropped(world):
    for counts in ranks(world, "dropped"):
        assert len(counts) == 3
        assert set(counts.values()) == {N // world * world}


@WORLDS
def test_leave_one_out_takes_what_the_first_process_hands_out(world):
    la = KronLoraLaplace(letter_head())
    la.fit(chunks(TRAIN, 2))
    la.optimize_prior_precision()
    assert all(torch.equal(prior, la.prior_precision) for prior in ranks(world, "dispatched"))


@WORLDS
def test_processes_predict_what_one_does(world):
    la = KronLoraLaplace(letter_head())
    la.fit([TRAIN])
    for predictions in ranks(world, "predictions"):
        assert_same(predictions, la(TEST))


@WORLDS
def test_of_many_examples_the_first_of_each_process_are_tuned_on(world):
    chosen = [index for rank in range(world) for index in range(rank, N, world)[:2]]
    whole = training_space(KronLoraLaplace(letter_head()), [select(TRAIN, chosen)])
    for found in ranks(world, "first"):
        assert_same(found["kernel"], whole.kernel)
        assert_same(found["labels"], TRAIN["labels"][chosen])
        assert_same(found["dispatched"], TRAIN["labels"][:world])


@WORLDS
def test_chance_leaves_all_processes_with_one_prior_precision(world):
    first, *others = ranks(world, "chance")
    assert all(torch.equal(other, first) for other in others)


@WORLDS
def test_a_group_of_processes_fits_without_the_others(world):
    la = LowRankLoraLaplace(letter_head())
    la.fit([TRAIN])
    la.optimize_prior_precision(val_loader=[VALIDATION, VALIDATION])
    *outside, first, second = ranks(world, "group")
    assert outside == [None] * (world - 2)
    assert_same(first, described(la))
    assert_same(second, described(la))


@WORLDS
def test_one_process_can_work_alone_on_the_whole_data(world):
    first, *others = ranks(world, "alone")
    assert_same(first, alone())
    assert others == [None] * (world - 1)


# Failures ----------------------------------------------------------------------------------------

OF_RANK_1 = {
    "bad label": "DataError: Expected labels from 0 to 2",
    "bad label, by hand": "DataError: Expected labels from 0 to 2",
    "bad label, accelerate": "DataError: Expected labels from 0 to 2",
    "bad label, dispatched": "DataError: Expected labels from 0 to 2",
    "broken data": "OSError: example 7 is gone",
    "broken data, accelerate": "OSError: example 7 is gone",
    "before the first batch": "RuntimeError: ",
    "loo": "DataError: Expected labels from 0 to 2",
    "grid": "DataError: Expected labels from 0 to 2",
    "gradient": "DataError: Expected labels from 0 to 2",
    "loss": "RuntimeError: ",
}
OF_ALL = {
    "outputs": "DataError: Expected the same number of outputs",
    "nothing": "DataError: Expected a loader with at least one batch",
    "nothing to tune on": "DataError: Expected a loader with at least one batch",
    "nn": "OptionError: Expected pred_type='glm'",
    "another group": "OptionError: Expected a loader that is split for rank",
    "own batches": "OptionError: Expected a loader whose repeated examples are known",
    "own batches, accelerate": "OptionError: Expected a loader whose repeated examples are known",
    "a stream each": "OptionError: Expected a loader whose repeated examples are known",
    "a subset": "OptionError: Expected n_subset=None for training data that",
    "ELLA": "OptionError: Expected ",
    "inner DDP": "AdapterError: Expected DistributedDataParallel around the whole model",
    "fully_shard": "UnsupportedLayerError: Expected all weights on this process",
}


@WORLDS
@pytest.mark.parametrize("case", OF_RANK_1)
def test_where_one_process_fails_all_raise_and_name_it(world, case):
    found = [errors[case] for errors in ranks(world, "errors")]
    own = found.pop(1)
    assert own.startswith(OF_RANK_1[case])
    for error in found:
        assert error.startswith("ShardError: ")
        assert f"rank 1 failed (see its own traceback): {own}" in error


@WORLDS
def test_what_cannot_be_done_is_refused_on_all_processes(world):
    for errors in ranks(world, "errors"):
        assert errors.keys() == OF_RANK_1.keys() | OF_ALL.keys()
        for case, start in OF_ALL.items():
            assert errors[case].startswith(start), f"{case}: {errors[case]}"


def test_a_process_that_fails_ends_the_job_with_its_error():
    _, done = launched(2)
    assert done.returncode != 0
    assert "laplace_llm.errors.DataError: Expected labels from 0 to 2" in done.stderr


@pytest.mark.slow
def test_processes_that_meet_errors_in_turn_end_well():
    _, done = launched(3)
    assert done.returncode == 0


def test_what_fsdp_wraps_is_refused():
    wrapper = object.__new__(FullyShardedDataParallel)  # its constructor needs an accelerator
    torch.nn.Module.__init__(wrapper)
    wrapper.head = letter_head()
    with pytest.raises(UnsupportedLayerError, match="wrapped by FSDP"):
        KronLoraLaplace(wrapper)


# In one process ----------------------------------------------------------------------------------


def test_a_shard_in_one_process_is_the_whole_data():
    la, expected = KronLoraLaplace(letter_head()), KronLoraLaplace(letter_head())
    la.fit(Shard(chunks(TRAIN, 2)))
    expected.fit(chunks(TRAIN, 2))
    assert_same(described(la), described(expected))
    la.optimize_prior_precision()  # the loader is kept
    la.fit(Shard(iter(chunks(TRAIN, 2))))
    with pytest.raises(ValueError, match="fit\\(\\) was given an iterator"):
        la.optimize_prior_precision()


def test_a_shard_needs_a_process_group_where_there_are_several_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(OptionError, match="Expected a process group"):
        Shard([TRAIN])


@pytest.mark.parametrize(("total", "turn", "size"), [(7, 1, 3), (7, 2, 2), (12, 4, 2), (2, 4, 3)])
def test_every_example_is_dealt_once(total, turn, size):
    hands = [total_of(rank, total, turn, size) for rank in range(size)]
    assert [dealt(total, turn, rank, size) for rank in range(size)] == hands
    assert sum(hands) == total


def total_of(rank, total, turn, size):
    return sum(index // turn % size == rank for index in range(total))
