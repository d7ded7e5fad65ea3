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
from laplace_llm.data import check_labels, check_outputs, labelled
from laplace_llm.function_space import FunctionSpace
from laplace_llm.session import borrowed
from laplace_llm.sketch import test_matrix
from laplace_llm.taps import Batch, Taps

if TYPE_CHECKING:
    from laplace_llm.posterior import LoraPosterior

# The output side of lora_B is projected to this many random directions where it is longer, so
# that a feature vector takes L * width * r numbers however wide the model is.
FEATURE_WIDTH = 64
# Newton's method is cubic in the number of outputs N (C - 1); beyond this many, the first
# examples of the loader stand for all.
MAX_OUTPUTS = 3000


def training_space(
    la: LoraPosterior, train_loader: Iterable[Any], progress_bar: bool = False
) -> FunctionSpace:
    """Return the function space of the training examples, from one pass over them.

    Costs one forward pass without the adapter, one with it and C - 1 backward passes a batch.
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
    tensors = find_lora_tensors(la.model, la.adapter, "B", choice_rows=True)
    regression = la.likelihood == "regression"
    la.check_adapter()
    others = find_lora_tensors(la.model, la.adapter)
    off = {tensor.name: tensor.without() for tensor in others if tensor.role != "A"}
    labels, features, present = [], [], []
    trained, initial = list[Tensor](), list[Tensor]()
    count, classes = 0, None
    with borrowed(la.model, [tensor.weight for tensor in tensors]):
        batches = labelled(
            train_loader, la.dict_key_y, la._device, "[Training kernel]", progress_bar
        )
        for index, (x, y) in enumerate(batches):
            run = taps.forward(la.model, tensors, x)
            logits = run.logits.detach().double()
            labels.append(check_labels(y, logits, regression, index))
            classes = check_outputs(logits.shape[1], classes, index)
            here = logits.isfinite()
            basis = torch.eye(classes).to(logits) if regression else choice_contrasts(here, logits)
            untrained = _without_adapter(la.model, off, x).double()
            for outputs, parts in ((logits, trained), (untrained, initial)):
                parts.append((outputs.where(here, 0)[:, None] @ basis)[:, 0])
            features.append(_features(run, basis, la._dtype))
            present.append(here)
            count += basis.shape[-1] * len(logits)
            if count >= MAX_OUTPUTS:
                break
    everywhere = all(bool(here.all()) for here in present)
    return FunctionSpace(
        torch.cat(trained),
        torch.cat(initial),
        torch.cat(labels),
        _gram(torch.cat(features).flatten(0, 1)),
        float(la._H_factor),
        None if everywhere else torch.cat(present),
    )


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
    return torch.stack([torch.cat(parts, 1) for parts in columns], 1)


def _gram(features: Tensor, columns: int = 8192) -> Tensor:
    """Return ``F F^T`` in float64, a few columns at a time: its small eigenvalues matter."""
    total = torch.zeros(len(features), len(features), dtype=torch.float64, device=features.device)
    for part in features.split(columns, 1):
        total += part.double() @ part.double().T
    return total
