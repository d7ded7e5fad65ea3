"""The kernel of training examples: one pass over the data, from taps to a `FunctionSpace`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.func import functional_call

from laplace_llm import taps
from laplace_llm.adapters import find_lora_tensors
from laplace_llm.contrasts import choice_contrasts
from laplace_llm.data import check_any, check_labels, check_outputs, labelled
from laplace_llm.function_space import FunctionSpace
from laplace_llm.session import borrowed
from laplace_llm.shards import Shard, as_shard
from laplace_llm.sketch import test_matrix
from laplace_llm.taps import Batch, Taps, gathered

if TYPE_CHECKING:
    from laplace_llm.posterior import LoraPosterior

# The output side of lora_B is projected to this many random directions where it is longer, so
# that a feature vector takes L * width * r numbers however wide the model is.
FEATURE_WIDTH = 64
# Newton's method is cubic in the number of outputs N (C - 1); beyond this many, the first
# examples of the loader (of each of W shards, the first for a W-th of them) stand for all.
MAX_OUTPUTS = 3000

# Of a batch: outputs (B, K) with and without the adapter, labels, features (B, K, F) and which
# choices (B, C) there are.
Piece = tuple[Tensor, ...]


def training_space(
    la: LoraPosterior, train_loader: Iterable[Any], progress_bar: bool = False
) -> FunctionSpace:
    """Return the function space of the training examples, from one pass over them.

    Costs one forward pass without the adapter, one with it and C - 1 backward passes a batch. Of
    a shard (`laplace_llm.Shard`), all processes return the space of all examples.

    The kernel is exact where ``lora_B`` has no more than 64 outputs; beyond, each tensor's
    features are projected by a fixed Gaussian matrix (Johnson and Lindenstrauss), which leaves
    the kernel unbiased, with an error of about ``sqrt(k_ii k_jj / (64 L))`` for L tensors.

    Parameters
    ----------
    la : LoraPosterior
        Its model, adapter and likelihood are used, not its curvature.
    train_loader : Iterable
        Labelled batches.
    progress_bar : bool, default=False
        Whether to show one.

    Raises
    ------
    DataError
        As in `fit`.
    """
    return joint_space(la, [train_loader], progress_bar)


def joint_space(
    la: LoraPosterior, train_loaders: Iterable[Iterable[Any]], progress_bar: bool = False
) -> FunctionSpace:
    """Return the `training_space` of the examples of several loaders together."""
    pieces: list[Piece] = []
    classes: int | None = None
    for loader in train_loaders:
        shard, left = as_shard(loader), MAX_OUTPUTS - sum(p[0].numel() for p in pieces)
        if left <= 0:
            break
        with shard.in_step():
            own = _pieces(la, shard, left / shard.size, progress_bar)
        found = list(shard.gather(own, la._device))
        check_any(found)
        for piece in found:
            classes = check_outputs(piece[-1].shape[1], classes)
        pieces += found
    trained, initial, labels, features, present = (
        torch.cat(parts) for parts in zip(*pieces, strict=True)
    )
    return FunctionSpace(
        trained,
        initial,
        labels,
        _gram(features.flatten(0, 1)),
        float(la._H_factor),
        None if bool(present.all()) else present,
    )


def _pieces(la: LoraPosterior, shard: Shard, limit: float, progress_bar: bool) -> list[Piece]:
    """Return what `FunctionSpace` is made of, for batches with `limit` outputs or a few more."""
    tensors = find_lora_tensors(la.model, la.adapter, "B", choice_rows=True)
    regression = la.likelihood == "regression"
    la.check_adapter()
    others = find_lora_tensors(la.model, la.adapter)
    off = {tensor.name: tensor.without() for tensor in others if tensor.role != "A"}
    pieces: list[Piece] = []
    count, classes = 0, None
    with borrowed(la.model, [tensor.weight for tensor in tensors]):
        batches = labelled(shard, la.dict_key_y, la._device, "[Training kernel]", progress_bar)
        for index, (x, y) in enumerate(batches):
            run = taps.forward(la.model, tensors, x)
            logits = run.logits.detach().to(la._device, torch.float64)
            labels = check_labels(y, logits, regression, index)
            classes = check_outputs(logits.shape[1], classes, index)
            here = logits.isfinite()
            basis = torch.eye(classes).to(logits) if regression else choice_contrasts(here, logits)
            untrained = _without_adapter(la.model, off, x).to(logits)
            trained, initial = (
                (outputs.where(here, 0)[:, None] @ basis)[:, 0] for outputs in (logits, untrained)
            )
            pieces.append((trained, initial, labels, _features(run, basis, la._dtype), here))
            count += basis.shape[-1] * len(logits)
            if count >= limit:
                break
    return pieces


def _without_adapter(model: torch.nn.Module, off: dict[str, Tensor], x: Batch) -> Tensor:
    """Return the outputs under weights with which the adapter does nothing, as ``lora_B = 0``."""
    with torch.no_grad():
        return functional_call(model, off, (x,))


def _features(run: Taps, basis: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the features (B, K, F) of a batch."""

    def features(index: int, gradient: Tensor) -> Tensor:
        gradient = gradient.to(dtype)
        if gradient.shape[-1] > FEATURE_WIDTH:
            omega = test_matrix(gradient.shape[-1], FEATURE_WIDTH, dtype, gradient.device)
            gradient = gradient @ omega / math.sqrt(FEATURE_WIDTH)
        return run.tensors[index].outer(gradient, run.inputs(index)).flatten(1)

    columns = run.sweep(basis.to(run.logits), features)
    return torch.stack([gathered(parts, 1) for parts in columns], 1)


def _gram(features: Tensor, columns: int = 8192) -> Tensor:
    """Return ``F F^T`` in float64, a few columns at a time: its small eigenvalues matter."""
    total = torch.zeros(len(features), len(features), dtype=torch.float64, device=features.device)
    for part in features.split(columns, 1):
        total += part.double() @ part.double().T
    return total
