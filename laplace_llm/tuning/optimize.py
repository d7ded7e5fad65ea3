"""`optimize_prior_precision`: every method behind the parent's one call."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor

from laplace_llm._compat import default_loss, parent_marglik
from laplace_llm.errors import DataError, OptionError
from laplace_llm.kernel import joint_space
from laplace_llm.options import check_count, check_one_of, check_positive
from laplace_llm.prediction import LINKS, PREDICTIVES, LoraPredictive
from laplace_llm.prior import check_precision
from laplace_llm.shards import shared_by
from laplace_llm.taps import Batch
from laplace_llm.tuning.evidence import linear_mode_evidence, warn_if_unsure
from laplace_llm.tuning.gridsearch import gridsearch
from laplace_llm.tuning.leave_one_out import leave_one_out
from laplace_llm.tuning.val_grad import val_grad

Method = Literal["loo", "gridsearch", "val_grad", "marglik"]


class LoraTuned(LoraPredictive):
    """A posterior over LoRA weights whose prior precision can be chosen."""

    _train_loaders: list[Iterable[Any]] | None = None
    _train_sample: list[Batch]
    _warned = False

    def optimize_prior_precision(
        self,
        pred_type: str = "glm",
        method: Method | None = None,
        n_steps: int = 100,
        lr: float = 1e-1,
        init_prior_prec: float | Tensor = 1.0,
        prior_structure: str = "scalar",
        val_loader: Iterable[Any] | None = None,
        loss: Any = None,
        log_prior_prec_min: float = -4,
        log_prior_prec_max: float = 4,
        grid_size: int = 100,
        link_approx: str = "qmc",
        n_samples: int = 100,
        verbose: bool = False,
        progress_bar: bool = False,
        log_prior_prec_base: float = 10.0,
        *,
        train_loader: Iterable[Any] | None = None,
        evidence: Literal["trained", "linear_mode"] = "trained",
    ) -> None:
        """Choose the prior precision; the parent's arguments, and two more.

        Unlike in the parent, the default method is not the marginal likelihood, which makes
        models that have learnt something far too uncertain: it is ``'gridsearch'`` where there is
        a `val_loader`, and ``'loo'`` where there is none.

        Where several processes share the data (see `fit`), all call this with their shards, and
        all end with the value that the first one finds on the data of all.

        Parameters
        ----------
        pred_type : {'glm', 'nn'}, default='glm'
            The predictive that a grid search evaluates.
        method : {'loo', 'gridsearch', 'val_grad', 'marglik'}, optional
            ``'loo'``: leave-one-out on the training data, in one pass over it and without any
            other data (`laplace_llm.tuning.leave_one_out`). ``'gridsearch'``: the parent's, in one
            pass over `val_loader`. ``'val_grad'``: gradient descent on the validation loss, also
            from one pass; the way to a precision per tensor (``prior_structure='layerwise'``).
            ``'marglik'``: the parent's marginal likelihood; warns once if the chosen value takes
            away more than 0.2 of the mean confidence on training examples.
        n_steps, lr, init_prior_prec, prior_structure
            Of ``'marglik'``, as in the parent. ``'val_grad'`` takes `n_steps` and `lr` too, starts
            from the best scalar, and knows the structures ``'scalar'`` and ``'layerwise'``.
        val_loader, loss, n_samples, verbose, progress_bar
            As in the parent; ``'loo'`` takes no loss.
        log_prior_prec_min, log_prior_prec_max, grid_size, log_prior_prec_base
            The grid, as in the parent; ``'loo'`` takes about a third of 100 values, ``'val_grad'``
            stays between its bounds.
        link_approx : str, default='qmc'
            The link whose predictions are scored; see `__call__`. ``'loo'`` knows logits up to what
            they share, and gives the other links centred ones.
        train_loader : Iterable, optional
            Training data for ``'loo'`` and ``evidence='linear_mode'``; default: what `fit` was
            given, unless some of that was an iterator, which is used up by then.
        evidence : {'trained', 'linear_mode'}, default='trained'
            Of ``'marglik'``: the parent's formula at the trained weights, or the linearised
            model's evidence at its own mode (`laplace_llm.tuning.evidence`), over the grid.

        Raises
        ------
        NotFittedError
            Before `fit`.
        ValueError
            As in the parent. After any error the prior precision is what it was.
        """
        self._check_H_init()
        method = method or ("loo" if val_loader is None else "gridsearch")
        bounds = _bounds(log_prior_prec_base, log_prior_prec_min, log_prior_prec_max)
        check_count("grid_size", grid_size)
        check_one_of("pred_type", pred_type, PREDICTIVES)
        check_one_of("link_approx", link_approx, LINKS)
        check_count("n_samples", n_samples)
        check_count("n_steps", n_steps, least=0 if method == "val_grad" else 1)
        check_positive("lr", lr)
        if method == "val_grad" and not bounds[0] < bounds[1]:
            raise OptionError(
                f"Expected log_prior_prec_min < log_prior_prec_max for method='val_grad', but got "
                f"{log_prior_prec_min!r} and {log_prior_prec_max!r}."
            )
        interval = torch.logspace(
            log_prior_prec_min, log_prior_prec_max, grid_size, base=log_prior_prec_base
        )
        if method in ("gridsearch", "val_grad") and val_loader is None:
            raise OptionError(
                f"Expected a validation set in val_loader for method={method!r}, but got None. "
                "Use method='loo' without one."
            )
        scalar = method in ("gridsearch", "loo") or evidence == "linear_mode"
        if scalar and prior_structure != "scalar":
            raise OptionError(
                f"Expected prior_structure='scalar' for method={method!r} and evidence="
                f"{evidence!r}, but got {prior_structure!r}. Use method='val_grad' or 'marglik'."
            )
        if method in ("loo", "val_grad") and pred_type != "glm":
            raise OptionError(
                f"Expected pred_type='glm' for method={method!r}, but got {pred_type!r}. Use "
                "method='gridsearch' for sampled weights."
            )
        if method == "loo" and loss is not None:
            raise OptionError(
                "Expected no loss for method='loo', which scores the negative log likelihood. Use "
                "method='gridsearch' with a val_loader for another one."
            )
        if method == "gridsearch":
            self.prior_precision = gridsearch(
                self, default_loss(self) if loss is None else loss, interval, val_loader,
                pred_type, link_approx, n_samples, progress_bar,
            )  # fmt: skip
        elif method == "val_grad":
            assert val_loader is not None
            self.prior_precision = val_grad(
                self, val_loader, bounds, _is_layerwise(prior_structure), link_approx, loss,
                n_steps, lr, progress_bar,
            )  # fmt: skip
        elif method == "loo":
            loaders = self._training_loaders(train_loader)
            space = joint_space(self, loaders, progress_bar)
            self.prior_precision = shared_by(loaders).agreed(
                lambda: leave_one_out(self, space, interval, link_approx, n_samples)
            )
        elif method == "marglik" and evidence == "linear_mode":
            loaders = self._training_loaders(train_loader)
            space = joint_space(self, loaders, progress_bar)
            self.prior_precision = shared_by(loaders).agreed(
                lambda: linear_mode_evidence(space, interval)
            )
        elif method == "marglik" and evidence == "trained":
            check_precision(init_prior_prec, self._prior_lengths)
            parent_marglik(
                self, pred_type, n_steps, lr, init_prior_prec, prior_structure, val_loader,
                progress_bar,
            )  # fmt: skip
            self._warn_if_unsure()
        else:
            raise OptionError(
                "Expected method 'loo', 'gridsearch', 'val_grad' or 'marglik' (with evidence "
                f"'trained' or 'linear_mode'), but got {method!r} and {evidence!r}."
            )
        if verbose:
            print(f"Optimized prior precision is {self.prior_precision}.")

    def _training_loaders(self, loader: Iterable[Any] | None) -> list[Iterable[Any]]:
        if loader is not None:
            return [loader]
        if self._train_loaders is None:
            raise DataError(
                "Expected the training data in train_loader=..., as fit() was given an "
                "iterator or the posterior was loaded. Or use method='gridsearch'."
            )
        return self._train_loaders

    def _warn_if_unsure(self) -> None:
        sample = getattr(self, "_train_sample", [])
        if sample and not self._warned and self.likelihood == "classification":
            self._warned = warn_if_unsure(self, sample)


def _bounds(base: float, low: float, high: float) -> tuple[float, float]:
    """Return the smallest and the largest prior precision of a grid."""
    names = ("log_prior_prec_base", "log_prior_prec_min", "log_prior_prec_max")
    for name, value in zip(names, (base, low, high), strict=True):
        if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
            raise OptionError(f"Expected {name} to be a finite number, but got {value!r}.")
    if base <= 1:
        raise OptionError(f"Expected log_prior_prec_base > 1, but got {base!r}.")
    if low > high:
        raise OptionError(
            f"Expected log_prior_prec_min <= log_prior_prec_max, but got {low!r} and {high!r}."
        )
    # In float32, as the grid is.
    limits = torch.finfo(torch.float32)
    edges = low * math.log(base), high * math.log(base)
    if edges[0] < math.log(limits.tiny) or edges[1] > math.log(limits.max):
        raise OptionError(
            f"Expected prior precisions between {limits.tiny:.0e} and {limits.max:.0e}, but "
            f"log_prior_prec_min={low!r} and log_prior_prec_max={high!r} are beyond."
        )
    return base**low, base**high


def _is_layerwise(prior_structure: str) -> bool:
    if prior_structure not in ("scalar", "layerwise"):
        raise OptionError(
            f"Expected prior_structure='scalar' or 'layerwise' for method='val_grad', but got "
            f"{prior_structure!r}."
        )
    return prior_structure == "layerwise"
