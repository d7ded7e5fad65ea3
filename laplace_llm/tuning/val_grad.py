"""Choosing prior precisions by the gradient of the validation loss, from one pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from laplace_llm.data import check_any, check_labels, check_outputs, labelled
from laplace_llm.errors import OptionError, PriorError
from laplace_llm.links import CLOSED_FORMS
from laplace_llm.moments import Moments
from laplace_llm.shards import Shard, as_shard

if TYPE_CHECKING:
    from laplace_llm.prediction import LoraPredictive

Loss = Callable[[Tensor, Tensor], Tensor]
# Covariances are smooth in the logarithm of a prior precision: each is a sum of 1 / (l + delta).
NODES_PER_DECADE = 12


class Interpolation:
    """Covariances as a function of prior precisions, between those of a grid.

    Cubic (Lagrange) in the logarithm of the prior precision, with a relative error below 1e-3.

    Parameters
    ----------
    grid : Tensor
        (G,) prior precisions, evenly spaced in their logarithm.
    values : Tensor
        (G, L, B, C, C): each tensor's part, or (with L = 1) all of them together.
    """

    def __init__(self, grid: Tensor, values: Tensor) -> None:
        self.start = float(grid[0].log())
        self.step = float(grid[-1].log() - grid[0].log()) / (len(grid) - 1)
        self.values = values

    def __call__(self, log_delta: Tensor) -> Tensor:
        """Return the covariance (B, C, C) at L log prior precisions."""
        position = (log_delta - self.start) / self.step
        left = position.detach().floor().clamp(1, len(self.values) - 3).long()
        t = position - left  # in [0, 1) inside the grid
        weights = [
            -t * (t - 1) * (t - 2) / 6,
            (t + 1) * (t - 1) * (t - 2) / 2,
            -(t + 1) * t * (t - 2) / 2,
            (t + 1) * t * (t - 1) / 6,
        ]
        tensors = torch.arange(len(left), device=left.device)
        total: Tensor | float = 0.0
        for offset, weight in enumerate(weights, start=-1):
            nodes = self.values[left + offset, tensors]  # (L, B, C, C)
            total = total + torch.einsum("l,lbce->bce", weight, nodes)
        assert isinstance(total, Tensor)
        return total


def val_grad(
    la: LoraPredictive,
    val_loader: Iterable[Any],
    bounds: tuple[float, float],
    layerwise: bool,
    link_approx: str,
    loss: Loss | None = None,
    n_steps: int = 100,
    lr: float = 0.1,
    progress_bar: bool = False,
) -> Tensor:
    """Return the prior precision(s) that gradient descent on the validation loss ends at.

    One pass over the data gives the covariances under a grid of values (for each tensor, if
    layerwise), between which they are interpolated. Adam starts from the best scalar of that grid
    and the best iterate is returned, so the result is never worse than that scalar.

    Source: Yang et al., *Bayesian Low-rank Adaptation for Large Language Models*, ICLR 2024,
    section 4 (tuning by the validation log likelihood).

    Parameters
    ----------
    la : LoraPredictive
        A fitted posterior; its prior precision is left as it was.
    val_loader : Iterable
        Labelled batches. Of a shard (`laplace_llm.Shard`), those of all processes are used, and
        all of them return the same.
    bounds : tuple[float, float]
        Smallest and largest prior precision.
    layerwise : bool
        Whether each LoRA tensor gets a value of its own (only where tensors are independent).
    link_approx : {'qmc', 'mean_field', 'probit', 'mc'}
        'mc' is integrated as 'qmc', which has a gradient.
    loss : Callable, optional
        Differentiable function of probabilities (N, C) and labels (N,); for regression of means,
        covariances (N, C, C) and targets. Default: the negative log likelihood.
    n_steps, lr, progress_bar
        As in the parent.

    Raises
    ------
    OptionError
        If the loss or the link has no gradient, or tensors are not independent but are to be.
    PriorError
        If no value has a finite loss.
    DataError
        If the loader is empty or has no labels.
    """
    link = {**CLOSED_FORMS, "mc": CLOSED_FORMS["qmc"]}.get(link_approx)
    if link is None:
        raise OptionError(
            f"Expected a link_approx with a gradient ('qmc', 'mean_field' or 'probit') for "
            f"method='val_grad', but got {link_approx!r}."
        )
    if loss is not None and (not callable(loss) or hasattr(loss, "reset")):
        raise OptionError(
            f"Expected loss to be a differentiable function for method='val_grad', but got "
            f"{type(loss).__name__}. Metrics work with method='gridsearch'."
        )
    if layerwise:
        la._check_independent()
    regression = la.likelihood == "regression"
    low, high = (math.log10(bound) for bound in bounds)
    grid = torch.logspace(low, high, max(math.ceil(NODES_PER_DECADE * (high - low)), 4) + 1)
    centred = link_approx != "probit" and not regression
    shard = as_shard(val_loader)
    moments, labels = _pass(la, shard, grid, layerwise, centred, progress_bar)

    def objective(covariance: Tensor) -> Tensor:
        if regression:
            value = (loss or partial(_gaussian_nll, la))(moments.mean, covariance, labels)  # type: ignore[call-arg]
        else:
            value = (loss or _nll)(link(moments.mean, covariance), labels)
        if not isinstance(value, Tensor) or value.numel() != 1:
            came = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise OptionError(
                f"Expected loss to return a scalar tensor for method='val_grad', but got {came}."
            )
        return value.squeeze()

    return shard.agreed(lambda: descend(grid, moments.covariance, objective, n_steps, lr))


def descend(
    grid: Tensor,
    covariances: Tensor,
    objective: Callable[[Tensor], Tensor],
    n_steps: int = 100,
    lr: float = 0.1,
) -> Tensor:
    """Return the L prior precisions that Adam ends at, from the best scalar of the grid.

    Parameters
    ----------
    grid : Tensor
        (G,) prior precisions, evenly spaced in their logarithm.
    covariances : Tensor
        (G, L, N, C, C); see `Interpolation`.
    objective : Callable
        A differentiable loss of covariances (N, C, C).
    n_steps, lr
        Of Adam, on the logarithms.

    Raises
    ------
    OptionError
        If the objective has no gradient.
    PriorError
        If no value has a finite loss.
    """
    grid = grid.to(covariances)
    covariance_at, logs = Interpolation(grid, covariances), grid.log()
    with torch.no_grad():
        losses = torch.stack([objective(values.sum(0)) for values in covariances])
    losses = losses.where(losses.isfinite(), torch.inf)
    if bool(losses.isinf().all()):
        raise PriorError(
            f"Expected a finite loss for at least one of {len(grid)} prior precisions between "
            f"{float(grid[0]):g} and {float(grid[-1]):g}, but there is none. Check the labels and "
            "the loss."
        )
    best = logs[int(losses.argmin())].expand(covariances.shape[1]).clone()
    log_delta, lowest = best.clone().requires_grad_(), losses.min()
    optimizer = torch.optim.Adam([log_delta], lr=lr)
    with torch.enable_grad():
        for _ in range(n_steps):
            optimizer.zero_grad()
            value = objective(covariance_at(log_delta))
            if not value.requires_grad:
                raise OptionError(
                    "Expected loss to be a differentiable function for method='val_grad', but its "
                    "result has no gradient. Any loss works with method='gridsearch'."
                )
            value.backward()
            if log_delta.grad is None or not bool(log_delta.grad.isfinite().all()):
                break
            optimizer.step()
            with torch.no_grad():
                log_delta.clamp_(logs[0], logs[-1])
                value = objective(covariance_at(log_delta))
                if bool(value < lowest):
                    best, lowest = log_delta.detach().clone(), value
    return best.exp()


def _nll(probabilities: Tensor, labels: Tensor) -> Tensor:
    tiny = torch.finfo(probabilities.dtype).tiny
    return -probabilities.gather(1, labels[:, None]).clamp_min(tiny).log().mean()


def _gaussian_nll(la: LoraPredictive, mean: Tensor, covariance: Tensor, targets: Tensor) -> Tensor:
    variance = covariance.diagonal(dim1=-2, dim2=-1) + la.sigma_noise.square()
    return torch.nn.functional.gaussian_nll_loss(mean, targets, variance)


def _pass(
    la: LoraPredictive,
    shard: Shard,
    grid: Tensor,
    layerwise: bool,
    centred: bool,
    progress_bar: bool,
) -> tuple[Moments, Tensor]:
    """Return the mean (N, C), covariances (G, L, N, C, C) and labels of all processes' data."""
    results, regression, n_outputs = [], la.likelihood == "regression", None
    batches = labelled(
        shard, la.dict_key_y, la._device, "[Validation gradient: one pass]", progress_bar
    )
    with shard.in_step():
        for index, (x, y) in enumerate(batches):
            mean, covariance = la.moments_grid(x, grid, layerwise, centred)
            n_outputs = check_outputs(mean.shape[1], n_outputs, index)
            labels = check_labels(y, mean, regression, index)
            results.append((mean, covariance if layerwise else covariance[:, None], labels))
    found = list(shard.gather(results, la._device))
    check_any(found)
    for mean, *_ in found:
        n_outputs = check_outputs(mean.shape[1], n_outputs)
    means, covariances, all_labels = zip(*found, strict=True)
    return Moments(torch.cat(means), torch.cat(covariances, -3)), torch.cat(all_labels)
