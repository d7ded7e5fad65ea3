"""What several processes do with their shards: a script for torchrun, and its single-process twin.

``torchrun processes.py FOLDER [fail]``, or ``python processes.py FOLDER N`` for N forked processes,
saves what every rank got in FOLDER. `shared_work` runs in a single process too, with a `split` that
leaves the data whole: the results must be the same.
"""

import os
import socket
import sys
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from laplace.curvature import CurvlinopsGGN
from models import (
    chunks,
    inputs_of,
    labels_of,
    letter_batch,
    letter_head,
    mlp_batch,
    select,
    tiny_llama,
    tiny_mlp,
)
from torch import Tensor
from torch import distributed as dist
from torch.distributed import fsdp
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from laplace_llm import (
    DiagLoraLaplace,
    EkfacLoraLaplace,
    ELLALoraLaplace,
    FullLoraLaplace,
    FunctionalLoraLaplace,
    KronLoraLaplace,
    LowRankLoraLaplace,
    MultipleChoiceHead,
    Shard,
    StreamingEF,
)
from laplace_llm.kernel import training_space

N = 11  # a multiple of neither 2 nor 3
BAD = 7  # an example that the second of two or three processes has
TRAIN, MORE = letter_batch(N), letter_batch(5, seed=3)
VALIDATION, TEST = letter_batch(5, seed=1), letter_batch(5, seed=2)
STRUCTURES = {
    "kron": (KronLoraLaplace, {}),
    "kron, rank 2": (KronLoraLaplace, {"backend_kwargs": {"rank": 2}}),
    "kron, empirical": (KronLoraLaplace, {"backend": StreamingEF}),
    "ekfac": (EkfacLoraLaplace, {}),
    "ekfac, rank 2": (EkfacLoraLaplace, {"backend_kwargs": {"rank": 2}}),
    "diag": (DiagLoraLaplace, {}),
    "full": (FullLoraLaplace, {"tensors": "B"}),
    "lowrank": (LowRankLoraLaplace, {}),
    "lowrank, disk": (LowRankLoraLaplace, {"factors_on": "disk"}),
    "gp": (FunctionalLoraLaplace, {}),
    "gp, independent": (FunctionalLoraLaplace, {"independent_outputs": True}),
}
Split = Callable[..., Iterable[Any]]


def rows(batch: Any) -> list[Any]:
    """Return the examples of a batch, one by one; a list is those already."""
    if isinstance(batch, list):
        return batch
    if isinstance(batch, dict):
        return [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]
    return list(zip(*batch, strict=True))


def described(la: Any, batch: Any = TEST) -> dict[str, Any]:
    """Return what a posterior knows, in a form that does not depend on the order of the data."""
    return {
        "n_data": la.n_data,
        "n_outputs": la.n_outputs,
        "loss": la.loss,
        "prediction": la(inputs_of(batch)),
        "evidence": la.log_marginal_likelihood().detach(),
        "mean": la.mean,
    }


# The same in one process and in several ----------------------------------------------------------


def shared_work(split: Split) -> dict[str, Any]:
    """Return the results of fitting and tuning on loaders that `split` makes of a batch."""
    found: dict[str, Any] = {}
    for name, (cls, options) in STRUCTURES.items():
        la = cls(letter_head(), **options)
        la.fit(split(TRAIN, 2))
        found[f"fit, {name}"] = described(la)
        la.fit(split(MORE, 3), override=False)
        found[f"refit, {name}"] = described(la)
    x, y = mlp_batch(N, regression=True)
    la = DiagLoraLaplace(tiny_mlp(), "regression", sigma_noise=0.5)
    la.fit(split((x, y), 2))
    found["fit, regression"] = described(la, (x, y))
    la = KronLoraLaplace(tiny_mlp(), backend=CurvlinopsGGN)
    la.fit(split(mlp_batch(N), 3))
    found["fit, curvlinops"] = described(la, mlp_batch(3, seed=2))
    return {**found, **tuned(split)}


def tuned(split: Split) -> dict[str, Any]:
    """Return the prior precisions that every method chooses."""
    found: dict[str, Any] = {}
    la = KronLoraLaplace(letter_head())
    la.fit(split(TRAIN, 2))
    grid = {"log_prior_prec_min": -2, "log_prior_prec_max": 3, "grid_size": 20}

    def choose(name: str, la: Any = la, **options: Any) -> None:
        la.prior_precision = 1.0
        la.optimize_prior_precision(**grid, **options)
        found[f"prior, {name}"] = la.prior_precision.detach()

    choose("loo")
    choose("loo of another loader", train_loader=split(MORE, 2))
    choose("evidence", method="marglik", evidence="linear_mode")
    choose("marglik", method="marglik", n_steps=10)
    choose("grid", val_loader=split(VALIDATION, 2))
    choose("grid of a function", val_loader=split(VALIDATION, 3), loss=torch.nn.NLLLoss())
    choose("gradient", method="val_grad", val_loader=split(VALIDATION, 2), n_steps=8)
    choose(
        "gradient of every tensor", method="val_grad", prior_structure="layerwise", n_steps=8,
        val_loader=split(VALIDATION, 2),
    )  # fmt: skip
    found["prediction, tuned"] = la(TEST)
    mixed = DiagLoraLaplace(letter_head())
    mixed.fit(chunks(MORE, 2))  # the whole data everywhere, then a shard
    mixed.fit(split(TRAIN, 2), override=False)
    found["fit, the whole and a shard"] = described(mixed)
    choose("loo of both", la=mixed)
    mixed = EkfacLoraLaplace(letter_head())
    mixed.fit(split(MORE, 2))
    mixed.fit(chunks(TRAIN, 2), override=False)  # its second pass is over both
    found["fit, ekfac, a shard and the whole"] = described(mixed)
    return found


def alone() -> dict[str, Any]:
    """Return what the first process does alone, with the whole data."""
    la = KronLoraLaplace(letter_head())
    la.fit(DataLoader(rows(TRAIN), 2))
    fit = described(la)
    la.optimize_prior_precision(val_loader=chunks(VALIDATION, 2), log_prior_prec_min=-2)
    searched = la.prior_precision
    la.optimize_prior_precision()
    return {**fit, "grid": searched, "loo": la.prior_precision}


# Several processes -------------------------------------------------------------------------------


def by_sampler(batch: Any, size: int, **options: Any) -> DataLoader:
    """Return this process's part by torch's sampler, which repeats the first examples."""
    data = rows(batch)
    return DataLoader(data, size, sampler=DistributedSampler(data, **{"shuffle": False, **options}))


def by_hand(batch: Any, size: int, empty: int | None = None) -> Shard:
    """Return this process's part by unequal slices, of which one may be empty."""
    world = [r for r in range(dist.get_world_size()) if r != empty]
    if dist.get_rank() == empty:
        return Shard([])
    start = world.index(dist.get_rank())
    stop = start + 1 if start < len(world) - 1 else len(labels_of(batch))
    return Shard(chunks(select(batch, slice(start, stop)), size))


def prepared(data: Any, size: int, drop_last: bool = False, **options: Any) -> Any:
    """Return a loader prepared by accelerate."""
    config = DataLoaderConfiguration(**options)
    accelerator = Accelerator(cpu=True, dataloader_config=config)
    return accelerator.prepare(DataLoader(data, size, drop_last=drop_last))


class Stream(IterableDataset):
    """Examples that come one after another, without a length."""

    def __init__(self, examples: list[Any]) -> None:
        self.examples = examples

    def __iter__(self) -> Any:
        return iter(self.examples)


class SizedStream(Stream):
    def __len__(self) -> int:
        return len(self.examples)


class Breaking(list):
    """Examples of which one cannot be read."""

    def __init__(self, examples: list[Any], broken: int) -> None:
        super().__init__(examples)
        self.broken = broken

    def __getitem__(self, index: Any) -> Any:
        if index == self.broken:
            raise OSError(f"example {index} is gone")
        return super().__getitem__(index)


def other_loaders() -> dict[str, Any]:
    """Return the fits to the training examples by all loaders that are shards."""
    world, found = dist.get_world_size(), {}
    data = rows(TRAIN)
    loaders = {
        "shuffled": by_sampler(TRAIN, 3, shuffle=True),
        "batches by the loader's sampler": DataLoader(
            data, batch_sampler=BatchSampler(DistributedSampler(data), 2, False)
        ),
        "unequal": by_hand(TRAIN, 2),
        "accelerate": prepared(data, 2),
        "accelerate, batches of 3": prepared(data, 3),
        "accelerate, few data": prepared(data, 2 * N),
        "accelerate, shuffled": prepared_shuffled(data),
        "accelerate, uneven": prepared(data, 2, even_batches=False),
        "accelerate, split": prepared(data, 2 * world, split_batches=True),
        "accelerate, dispatched": prepared(Stream(data), 2),
        "accelerate, dispatched, few data": prepared(Stream(data), N),
        "accelerate, dispatched, split": prepared(
            Stream(data), 2 * world, dispatch_batches=True, split_batches=True
        ),
        "accelerate, a stream each": prepared(SizedStream(data), 2, dispatch_batches=False),
    }
    if find_spec("datasets"):
        loaders["accelerate, a Hugging Face stream"] = hugging_face_stream()
    for name, loader in loaders.items():
        la = DiagLoraLaplace(letter_head())
        for again in ("", ", again"):  # as the loaders keep states
            la.fit(loader)
            found[name + again] = {"n_data": la.n_data, "loss": la.loss, "H": la.H}
    in_ddp = DistributedDataParallel(letter_head())
    for name, la, loader in (
        ("an empty one, kron", KronLoraLaplace(letter_head()), by_hand(TRAIN, 2, empty=0)),
        ("an empty one, lowrank", LowRankLoraLaplace(letter_head()), by_hand(TRAIN, 2, empty=1)),
        ("an empty one, gp", FunctionalLoraLaplace(letter_head()), by_hand(TRAIN, 2, empty=0)),
        ("in DDP, kron", KronLoraLaplace(in_ddp), by_hand(TRAIN, 1)),
    ):
        la.fit(loader)
        found[name] = described(la)
    return found


def hugging_face_stream() -> Any:
    """Return a loader over a data set that accelerate leaves to its own way of splitting it."""
    from datasets import Dataset

    data = Dataset.from_dict({key: value.tolist() for key, value in TRAIN.items()})
    stream = data.to_iterable_dataset(num_shards=dist.get_world_size()).with_format("torch")
    return prepared(stream, 2, dispatch_batches=False)


def truncated() -> dict[str, Tensor]:
    """Return what is left of a low-rank GGN that has more rows than are kept."""
    la = LowRankLoraLaplace(letter_head(), max_rank=8)
    la.fit(by_sampler(TRAIN, 2))
    kept = torch.cat([*la.H.store.parts()])
    return {"rows": kept, "trace": la.H.trace, "lost": la.H.lost_trace, "prediction": la(TEST)}


def prepared_shuffled(data: Any) -> Any:
    torch.manual_seed(dist.get_rank())  # accelerate has the first process's order everywhere
    return Accelerator(cpu=True).prepare(DataLoader(data, 2, shuffle=True))


def dropped() -> dict[str, int]:
    """Return how many examples are seen where loaders drop the last ones."""
    data, counts = rows(TRAIN), {}
    for name, loader in {
        "sampler": by_sampler(TRAIN, 2, drop_last=True),
        "accelerate": prepared(data, 1, drop_last=True),
        "accelerate, dispatched": prepared(Stream(data), 1, drop_last=True),
    }.items():
        la = DiagLoraLaplace(letter_head())
        la.fit(loader)
        counts[name] = la.n_data
    return counts


def gathered_predictions() -> Tensor:
    """Return predictions of all test questions, each made by one process."""
    accelerator = Accelerator(cpu=True)
    la = KronLoraLaplace(letter_head())
    la.fit(by_sampler(TRAIN, 2))
    loader = accelerator.prepare(DataLoader(rows(TEST), 2))
    return torch.cat([accelerator.gather_for_metrics(la(batch)) for batch in loader])


def first_examples() -> dict[str, Tensor]:
    """Return the function space where each process's share of the outputs is a batch or less."""
    la = KronLoraLaplace(letter_head())
    with patch("laplace_llm.kernel.MAX_OUTPUTS", 2 * dist.get_world_size()):
        space = training_space(la, by_sampler(TRAIN, 2))
        dispatched = training_space(la, prepared(Stream(rows(TRAIN)), 1))
    return {"kernel": space.kernel, "labels": space.labels, "dispatched": dispatched.labels}


def by_chance() -> Tensor:
    """Return the prior precision that is chosen by random samples, which differ by process."""
    torch.manual_seed(dist.get_rank())
    la = KronLoraLaplace(letter_head())
    la.fit(by_sampler(TRAIN, 2))
    la.optimize_prior_precision(
        val_loader=by_sampler(VALIDATION, 2), link_approx="mc", n_samples=2, grid_size=100
    )
    return la.prior_precision


def dispatched_tuning() -> Tensor:
    """Return the prior precision from training data that the first process reads for all."""
    la = KronLoraLaplace(letter_head())
    la.fit(prepared(Stream(rows(TRAIN)), 2))
    la.optimize_prior_precision()
    return la.prior_precision


def in_a_group() -> dict[str, Any] | None:
    """Return the fit of the last two processes together."""
    ranks = [dist.get_world_size() - 2, dist.get_world_size() - 1]
    group = dist.new_group(ranks)
    if dist.get_rank() not in ranks:
        return None
    part = select(TRAIN, slice(ranks.index(dist.get_rank()), None, 2))
    la = LowRankLoraLaplace(letter_head())
    la.fit(Shard(chunks(part, 2), group))
    la.optimize_prior_precision(val_loader=Shard([VALIDATION], group))
    return described(la)


def errors() -> dict[str, str]:
    """Return the error of every case, of which all processes get one and go on."""
    rank, found = dist.get_rank(), {}
    bad = {**TRAIN, "labels": torch.where(torch.arange(N) == BAD, 9, TRAIN["labels"])}
    data, bad_data, broken = rows(TRAIN), rows(bad), Breaking(rows(TRAIN), BAD)
    fitted = KronLoraLaplace(letter_head())
    fitted.fit(by_sampler(TRAIN, 2))
    head, in_pairs = letter_head(), DataLoader(data, batch_sampler=Pairs(SequentialSampler(data)))

    def fit(loader: Any, model: Any = head) -> None:
        la = DiagLoraLaplace(model)
        try:
            la.fit(loader)
        finally:
            assert la.H is None

    def tune(**options: Any) -> None:
        fitted.optimize_prior_precision(**options)

    one_more = torch.ones(2, device="meta") if rank == 1 else torch.ones(2)
    cases: dict[str, Callable[[], Any]] = {
        "bad label": lambda: fit(by_sampler(bad, 2)),
        "bad label, by hand": lambda: fit(Shard([TRAIN, bad if rank == 1 else TRAIN])),
        "bad label, accelerate": lambda: fit(prepared(bad_data, 1)),
        "bad label, dispatched": lambda: fit(prepared(Stream(bad_data), 1)),
        "broken data": lambda: fit(by_sampler(broken, 1)),
        "broken data, accelerate": lambda: fit(prepared(broken, 1)),
        "before the first batch": lambda: fit_without_memory(prepared(data, 2)),
        "loo": lambda: tune(train_loader=by_sampler(bad, 2)),
        "grid": lambda: tune(val_loader=by_sampler(bad, 2)),
        "gradient": lambda: tune(method="val_grad", val_loader=by_sampler(bad, 2)),
        "loss": lambda: tune(val_loader=by_sampler(TRAIN, 2), loss=lambda *_: one_more.sum()),
        "outputs": lambda: fit(Shard([letter_batch(4, classes=2)]), letter_head(classes=2 + rank)),
        "nothing": lambda: fit(Shard([])),
        "nothing to tune on": lambda: tune(val_loader=Shard([])),
        "nn": lambda: tune(val_loader=by_sampler(TRAIN, 2), pred_type="nn"),
        "another group": lambda: fit(by_sampler(TRAIN, 2, num_replicas=8, rank=rank)),
        "own batches": lambda: fit(DataLoader(data, batch_sampler=Pairs(DistributedSampler(data)))),
        "own batches, accelerate": lambda: fit(Accelerator(cpu=True).prepare(in_pairs)),
        "a stream each": lambda: fit(prepared(Stream(data), 2, dispatch_batches=False)),
        "a subset": lambda: FunctionalLoraLaplace(head, n_subset=3).fit(by_sampler(TRAIN, 2)),
        "ELLA": lambda: ELLALoraLaplace(head, "classification", 3, 2).fit(by_sampler(TRAIN, 2)),
        "inner DDP": lambda: DiagLoraLaplace(InDDP()),
        "fully_shard": lambda: DiagLoraLaplace(fully_sharded()),
    }
    for name, case in cases.items():
        try:
            case()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
        else:
            found[name] = "none"
    assert float(fitted.prior_precision) == 1
    return found


def fit_without_memory(loader: Any) -> None:
    la = DiagLoraLaplace(letter_head())
    if dist.get_rank() == 1:
        la._empty_curvature = lambda: torch.empty(2**60)
    la.fit(loader)


class Pairs(BatchSampler):
    """Batches of a size of its own."""

    def __init__(self, sampler: Any) -> None:
        super().__init__(sampler, 2, drop_last=False)


class InDDP(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = DistributedDataParallel(letter_head())

    def forward(self, x: Any) -> Tensor:
        return self.head(x)


def fully_sharded() -> MultipleChoiceHead:
    head = letter_head(tiny_llama(torch.float32))
    fsdp.fully_shard(head, mesh=dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),)))
    return head


def main(folder: str, fail: str = "") -> None:
    """Do everything as one of torchrun's processes; with `fail`, the second one fails at last."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    results = {
        "shared": shared_work(by_sampler),
        "loaders": other_loaders(),
        "truncated": truncated(),
        "dropped": dropped(),
        "predictions": gathered_predictions(),
        "first": first_examples(),
        "chance": by_chance(),
        "dispatched": dispatched_tuning(),
        "group": in_a_group(),
        "errors": errors(),
        "alone": alone() if rank == 0 else None,
    }
    torch.save(results, Path(folder) / f"{rank}.pt")
    if fail:
        bad = {**TRAIN, "labels": TRAIN["labels"] + 9 * (rank == 1)}
        DiagLoraLaplace(letter_head()).fit(Shard([bad]))
    dist.barrier()
    dist.destroy_process_group()


def forked(rank: int, world: int, port: int, folder: str) -> None:
    """Be a process as torchrun starts it."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ |= {key: str(value) for key, value in {**place, **address}.items()}
    main(folder)


if __name__ == "__main__":
    if len(sys.argv) == 2 or sys.argv[2] == "fail":
        main(*sys.argv[1:])
    else:  # the imports take longest, and need not be done by every process
        with socket.create_server(("localhost", 0)) as server:
            port = server.getsockname()[1]
        world = int(sys.argv[2])
        start_processes(forked, (world, port, sys.argv[1]), world, start_method="fork")
