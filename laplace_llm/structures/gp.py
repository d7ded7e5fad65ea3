"""Functional Laplace over LoRA weights, ``("lora", "gp")``: a Gaussian process on training data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from laplace_llm._compat import CurvatureInterface
from laplace_llm.adapters import Sides
from laplace_llm.curvature import BatchSummary
from laplace_llm.eigen import decomposing, eigh
from laplace_llm.errors import OptionError
from laplace_llm.lowrank import LowRankPrecision
from laplace_llm.options import check_count, check_flag, check_optional_count
from laplace_llm.outputs import OutputRows
from laplace_llm.rows import LowRankGGN
from laplace_llm.session import undisturbed_calls
from laplace_llm.shards import Shard, as_shard
from laplace_llm.structures.lowrank import LowRankLoraLaplace
from laplace_llm.subset import subset_of_data
from laplace_llm.taps import Batch

# What the parent adds to the kernel of a classifier, for its marginal likelihood alone.
JITTER = 1e-5


@undisturbed_calls
class FunctionalLoraLaplace(LowRankLoraLaplace):
    """The parent's functional Laplace (subset-of-data GP) on LoRA weights, ``("lora", "gp")``.

    The Gaussian process has the kernel ``J P_0^-1 J^T`` of the LoRA weights' Jacobians at M of the
    N training examples, the prior precision times N / M, and noise from the diagonal of the
    likelihood's Hessian, all as in the parent. For regression with all data it is the exact GGN's
    posterior; for classification it is not, as the diagonal leaves out that probabilities sum to
    one (``'lowrank'`` has the whole Hessian, for less). The subset's Jacobians are kept, M x C
    rows of P values, where the parent computes them anew for every test batch.
    Source: Immer, Korzepa, Bauer, *Improving Predictions of Bayesian Neural Nets via Local
    Linearization*, AISTATS 2021.

    Unlike in the parent,

    - test inputs with several outputs get the right covariance: the parent transposes the C x C
      blocks of the kernel between training and test examples, which is symmetric for C = 1 only;
    - an output whose probability has rounded to 0 or 1 says nothing; the parent gives it a noise
      variance of 10;
    - for regression the log marginal likelihood is the Gaussian log density of the targets; the
      parent adds the log likelihood of the trained weights to it, a second time;
    - the prior precision may also have one value a tensor, or one a weight;
    - ``pred_type='glm'`` is another name for ``'gp'``, and as this Gaussian process is a posterior
      over the weights too, it can be sampled (``'nn'``), unless ``independent_outputs``;
    - batches may be mappings, ``fit(override=False)`` adds data, and `n_subset` may exceed N.

    Parameters
    ----------
    n_subset : int, optional
        M, the number of training examples, drawn without replacement; default: all. The parent's
        examples where the loader is a `DataLoader` that reads all of a sized dataset.
    independent_outputs : bool, default=False
        One Gaussian process an output, as if outputs were independent.
    seed : int, default=0
        Of the subset.
    factors_on : {'cpu', 'disk'}, optional
        Where the subset's Jacobians are kept; default: on the model's device.
    *args, **kwargs
        See `LoraPosterior`; the backend must be one of the streaming ones.

    Raises
    ------
    OptionError
        If `n_subset`, `factors_on` or the backend is not one of these.
    """

    _key = ("lora", "gp")

    def __init__(
        self,
        model: nn.Module,
        likelihood: str = "classification",
        n_subset: int | None = None,
        sigma_noise: float | Tensor = 1.0,
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | Tensor = 0.0,
        temperature: float = 1.0,
        enable_backprop: bool = False,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        backend: type[CurvatureInterface] | None = None,
        backend_kwargs: dict[str, Any] | None = None,
        independent_outputs: bool = False,
        seed: int = 0,
        asdl_fisher_kwargs: dict[str, Any] | None = None,
        adapter: str | None = None,
        tensors: Sides = "AB",
        include_modules_to_save: bool = False,
        factors_on: Literal["cpu", "disk"] | None = None,
    ) -> None:
        check_optional_count("n_subset", n_subset)
        check_flag("independent_outputs", independent_outputs)
        check_count("seed", seed, 0)
        self.n_subset, self.independent_outputs, self.seed = n_subset, independent_outputs, seed
        super().__init__(
            model, likelihood, sigma_noise, prior_precision, prior_mean, temperature,
            enable_backprop, dict_key_x, dict_key_y, backend, backend_kwargs, asdl_fisher_kwargs,
            adapter, tensors, include_modules_to_save, max_rank=None, factors_on=factors_on,
        )  # fmt: skip

    def fit(
        self,
        train_loader: Iterable[Any],
        override: bool = True,
        progress_bar: bool = False,
        **checkpoints: Any,
    ) -> None:
        """Fit the posterior to `n_subset` of the data; see `LoraLaplace.fit`.

        N is the number of examples that the loader has. For a subset, it is read as a whole before,
        unless it is a `DataLoader` that reads all of a sized dataset. Several processes with a
        shard each fit to all their data together.

        Raises
        ------
        OptionError
            If `n_subset` is given and the loader is a shard.
        """
        shard = as_shard(train_loader)
        if shard.size > 1 and self.n_subset is not None:
            raise OptionError(
                f"Expected n_subset=None for training data that {shard.size} processes share, but "
                f"got {self.n_subset}. Leave it out, or give each process the whole data."
            )
        subset, left_out = subset_of_data(train_loader, self.n_subset, self.seed, self.dict_key_y)
        super().fit(subset, override, progress_bar, **checkpoints)
        self.n_data += left_out
        if self._train_loaders is not None:
            # Tuning on the training data looks at all of them.
            *earlier, _ = self._train_loaders
            gone = isinstance(shard.loader, Iterator)
            self._train_loaders = None if gone else [*earlier, train_loader]

    def _empty_curvature(self) -> OutputRows:
        rows = super()._empty_curvature()
        return OutputRows(rows.sizes, None, self._dtype, self._device, self.factors_on)

    def _accumulate(self, state: LowRankGGN, x: Batch, y: Tensor) -> BatchSummary:
        assert isinstance(state, OutputRows)
        return self._streaming.accumulate_outputs(state, x, y)

    def _over_all(self, state: LowRankGGN, shard: Shard) -> LowRankGGN:
        total = super()._over_all(state, shard)
        assert isinstance(total, OutputRows)
        assert isinstance(state, OutputRows)
        own = [(state.weights, state.residuals)] if state.rank else []
        for weights, residuals in shard.gather(own, self._device):
            total.join(weights, residuals)
        return total

    def _set_curvature(self, state: LowRankGGN, merge: bool) -> None:
        assert isinstance(state, OutputRows)
        if merge and self.H is not None:
            state.merge(self.H)
        parts = state.separate() if self.independent_outputs else [state]
        self._spectra = [eigh(part.gram(), "the training kernel") for part in parts]
        self._parts: list[OutputRows] = parts
        self._part_grams: list[Tensor] | None = None
        self._shifts: tuple[Tensor, list[Tensor]] | None = None
        self.H = state

    # The prior -----------------------------------------------------------------------------------

    @property
    def _prior_factor_sod(self) -> float:
        """M / N, or 1 before `fit`."""
        return len(self.H.weights) / self.n_data if isinstance(self.H, OutputRows) else 1.0

    @property
    def gp_kernel_prior_variance(self) -> Tensor:
        """What the kernel ``J J^T`` is multiplied by: M / N over the prior precision."""
        return self._prior_factor_sod / self.prior_precision

    @property
    def prior_precision_diag(self) -> Tensor:
        """Prior precision of each weight in the posterior, (P,): times N / M."""
        return super().prior_precision_diag / self._prior_factor_sod

    # The processes -------------------------------------------------------------------------------

    def _processes(self, deltas: Tensor) -> list[LowRankPrecision]:
        """Return the posterior under these prior precisions, or one an independent output."""
        self._check_H_init()
        if len(deltas) == self.n_layers > 1 and self._part_grams is None:
            self._part_grams = [part.grams() for part in self._parts]
        grams: Sequence[Tensor | None] = self._part_grams or [None] * len(self._parts)
        deltas = deltas / self._prior_factor_sod
        return [
            LowRankPrecision(part, self._H_factor, deltas, spectrum, gram)
            for part, spectrum, gram in zip(self._parts, self._spectra, grams, strict=True)
        ]

    def _precision(self, deltas: Tensor) -> LowRankPrecision:
        processes = self._processes(deltas)
        if self.independent_outputs:
            raise OptionError(
                "Expected independent_outputs=False, as Gaussian processes that are independent "
                "have no common posterior over the weights. Predict with pred_type='gp'."
            )
        return processes[0]

    def _variance(self, jacobians: Sequence[Tensor]) -> Tensor:
        precision = self.prior_precision
        return self._covariances(precision, precision.new_ones(1), jacobians)[0]

    def _variance_grid(self, jacobians: Sequence[Tensor], values: Tensor) -> Tensor:
        return self._covariances(values.new_ones(1), values, jacobians)

    def _covariances(self, deltas: Tensor, scales: Tensor, jacobians: Sequence[Tensor]) -> Tensor:
        processes = self._processes(deltas)
        if len(processes) == 1:
            return processes[0].variance_grid(jacobians, scales)
        batch, outputs = jacobians[0].shape[:2]  # of several examples, if they are joint
        result = jacobians[0].new_zeros(len(scales), batch, outputs, outputs)
        for index, process in enumerate(processes):
            own = slice(index, None, len(processes))
            result[..., own, own] = process.variance_grid([j[:, own] for j in jacobians], scales)
        return result

    @property
    def _knows_contrasts(self) -> bool:
        return not self.independent_outputs

    # The evidence --------------------------------------------------------------------------------

    @property
    def log_det_ratio(self) -> Tensor:
        """``log det(I + W^1/2 K W^1/2)``, for regression too (the parent: ``log det(K + 1 / W)``).

        Equals ``log det P - log det P_0`` of the weights.
        """
        processes = self._processes(self.prior_precision)
        return torch.stack([process.logdet_ratio() for process in processes]).sum().to(self._dtype)

    @property
    def log_det_posterior_precision(self) -> Tensor:
        """Log determinant of the weights' posterior precision."""
        self._precision(self.prior_precision)
        return super().log_det_posterior_precision

    @property
    def scatter(self) -> Tensor:
        """``mu^T (K + s)^-1 mu``, the parent's formula.

        For regression ``mu`` is what the targets are away from the prior's mean outputs, and s the
        noise variance; for classification ``mu = J (mean - prior_mean)``, and s is `JITTER`.
        """
        noise = torch.as_tensor(JITTER)
        if self.likelihood == "regression":
            noise = 1 / torch.as_tensor(self._H_factor)
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for process, part, mu in zip(
            self._processes(self.prior_precision), self._parts, self._prior_shifts(), strict=True
        ):
            kernel = process.whitened_gram() / part.scale / part.scale[:, None]
            kernel = kernel + noise.to(kernel) * torch.eye(len(kernel)).to(kernel)
            with decomposing("the training kernel"):
                total = total + mu @ torch.linalg.solve(kernel, mu)
        return total.to(self._dtype)

    def _prior_shifts(self) -> list[Tensor]:
        """Return mu of each process; made once, as it takes a pass over the rows."""
        if self._shifts is None or self._shifts[0] is not self._prior_mean:
            difference = (self.mean - self.prior_mean).expand(self.n_params)
            shifts = [part.residuals.flatten().double() for part in self._parts]
            shifts = [
                shift + part.project(difference)
                for part, shift in zip(self._parts, shifts, strict=True)
            ]
            self._shifts = self._prior_mean, shifts
        return self._shifts[1]

    def log_marginal_likelihood(
        self, prior_precision: Tensor | None = None, sigma_noise: Tensor | None = None
    ) -> Tensor:
        """Return the Gaussian process's log marginal likelihood of the subset.

        For classification the parent's formula; for regression the log density of the targets.

        Parameters
        ----------
        prior_precision, sigma_noise : Tensor, optional
            Take the place of the present values.
        """
        self._check_H_init()
        evidence = super().log_marginal_likelihood(prior_precision, sigma_noise)
        if self.likelihood != "regression":
            return evidence
        noise = 2 * math.pi / torch.as_tensor(self._H_factor)
        assert isinstance(self.H, OutputRows)
        return evidence - self.log_likelihood - 0.5 * self.H.weights.numel() * noise.log()

    # Names of the parent's -----------------------------------------------------------------------

    def __call__(self, x: Any, pred_type: str = "gp", *args: Any, **kwargs: Any) -> Any:
        """See `LoraPredictive.__call__`; ``pred_type='gp'`` and ``'glm'`` are one."""
        return super().__call__(x, _glm(pred_type), *args, **kwargs)

    def functional_samples(
        self, x: Any, pred_type: str = "gp", *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return draws of the outputs, (n_samples, B, C), as in the parent."""
        return super().functional_samples(x, _glm(pred_type), *args, **kwargs)

    def predictive_samples(
        self, x: Any, pred_type: str = "gp", *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return draws of the predictions, (n_samples, B, C), as in the parent."""
        return super().predictive_samples(x, _glm(pred_type), *args, **kwargs)

    def optimize_prior_precision(self, pred_type: str = "gp", *args: Any, **kwargs: Any) -> None:
        """Choose the prior precision; see `LoraTuned.optimize_prior_precision`."""
        super().optimize_prior_precision(_glm(pred_type), *args, **kwargs)

    # Keep ----------------------------------------------------------------------------------------

    def _own_options(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ("n_subset", "independent_outputs", "seed")}

    def _options(self) -> dict[str, Any]:
        options = {**super()._options(), **self._own_options()}
        del options["max_rank"]
        return options

    def _curvature_state(self) -> dict[str, Any]:
        return {**super()._curvature_state(), "options": self._own_options()}

    def _curvature_from_state(self, state: dict[str, Any]) -> OutputRows:
        rows = self._empty_curvature().load(state)
        for key, value in state["options"].items():
            setattr(self, key, value)
        return rows


def _glm(pred_type: str) -> str:
    return "glm" if pred_type == "gp" else pred_type
