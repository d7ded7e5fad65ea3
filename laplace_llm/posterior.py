"""What a posterior over LoRA weights is to the parent: its parameters, device, dtype and prior."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

from laplace_llm import prior
from laplace_llm._compat import CurvatureInterface, ParametricLaplace
from laplace_llm.adapters import (
    Sides,
    check_active,
    find_lora_tensors,
    lora_dtype,
    resolve_adapter,
)
from laplace_llm.backends import StreamingGGN
from laplace_llm.checkpoints import Checkpoints
from laplace_llm.curvature import BatchSummary, StreamingInterface, check_backend
from laplace_llm.errors import NotFittedError, OptionError
from laplace_llm.heads import as_classifier, check_module, undistributed
from laplace_llm.options import check_flag, check_positive
from laplace_llm.session import borrowed
from laplace_llm.shards import Shard
from laplace_llm.taps import Batch
from laplace_llm.tensors import LoraTensor


class LoraPosterior(ParametricLaplace):
    """What the ``"lora"`` structures share; abstract, and not registered with the parent.

    Differences to the parent, which are deliberate:

    - the parameters are one adapter's LoRA tensors, whatever ``requires_grad`` says;
    - everything is kept in the adapters' precision or float32, whichever is better, however low
      the base model's precision;
    - the number of data is counted from the batches, so the loader needs no length;
    - `fit`, tuning and prediction leave the model as it was, also after an exception;
    - the GLM predictive contracts layer by layer and never holds the (B, C, P) Jacobian;
    - a grid search resets its metric for every value, and makes one pass over the data.

    Parameters
    ----------
    model : torch.nn.Module
        Maps one batch to (B, C) logits: one of this package's heads, a PeftModel around a
        Hugging Face classifier (whose ``.logits`` are taken), or any module of yours with PEFT
        LoRA layers inside. Of DistributedDataParallel, the module inside is used.
    likelihood : {'classification', 'regression', 'reward_modeling'}, default='classification'
        As in the parent.
    sigma_noise, prior_precision, prior_mean, temperature, enable_backprop
        As in the parent.
    dict_key_x, dict_key_y : str
        As in the parent.
    backend : type[CurvatureInterface], optional
        Default: `StreamingGGN`. The parent's `CurvlinopsGGN`, `CurvlinopsEF` and `AsdlGGN` work
        too; prediction does not depend on it.
    backend_kwargs : dict, optional
        See `StreamingInterface` and `StreamingGGN`.
    asdl_fisher_kwargs : dict, optional
        As in the parent.
    adapter : str, optional
        The adapter to put the posterior over; default: the active one.
    tensors : {'AB', 'B'}, default='AB'
        Which weights are uncertain: all of the adapter's (with ``lora_bias``, its biases; with
        DoRA, its magnitudes), or ``lora_B`` alone (``lora_A`` then is a fixed feature map, and the
        posterior half the size). Of an adapter on ``lm_head`` under a `MultipleChoiceHead`, the
        posterior is over the choices' rows of ``lora_B`` alone: no output depends on the others.
    include_modules_to_save : bool, default=False
        Whether the weights that PEFT trains and saves besides the adapter (``modules_to_save``,
        such as a classification head) are uncertain too; they must be linear layers.

    Raises
    ------
    AdapterError
        If the model has no such LoRA tensors, or the adapter is inactive, merged or disabled.
    OptionError
        If an option has a value that is not allowed.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str = "classification",
        sigma_noise: float | Tensor = 1.0,
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | Tensor = 0.0,
        temperature: float = 1.0,
        enable_backprop: bool = False,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        backend: type[CurvatureInterface] | None = None,
        backend_kwargs: dict[str, Any] | None = None,
        asdl_fisher_kwargs: dict[str, Any] | None = None,
        adapter: str | None = None,
        tensors: Sides = "AB",
        include_modules_to_save: bool = False,
        **structure_kwargs: Any,
    ) -> None:
        check_module(model)
        check_backend(backend)
        check_positive("sigma_noise", sigma_noise)
        check_flag("enable_backprop", enable_backprop)
        check_flag("include_modules_to_save", include_modules_to_save)
        if not isinstance(backend_kwargs, (Mapping, NoneType)):
            raise OptionError(f"Expected backend_kwargs to be a dict, but got {backend_kwargs!r}.")
        model = undistributed(model)
        self.adapter = resolve_adapter(model, adapter)
        model = as_classifier(model)
        backend = StreamingGGN if backend is None else backend
        streaming = issubclass(backend, StreamingInterface)
        self.tensors = find_lora_tensors(
            model, self.adapter, tensors, streaming, include_modules_to_save
        )
        backend_kwargs = dict(backend_kwargs or {})
        self._given = {
            "dict_key_x": dict_key_x,
            "dict_key_y": dict_key_y,
            "backend": backend.__name__,
            "backend_kwargs": dict(backend_kwargs),
            "tensors": tensors,
            "include_modules_to_save": include_modules_to_save,
        }
        if streaming:
            backend_kwargs |= {"tensors": self.tensors}
        else:
            _check_plain(self.tensors, backend)
        with borrowed(model, [tensor.weight for tensor in self.tensors]):
            super().__init__(
                model,
                likelihood,
                sigma_noise,
                prior_precision,
                prior_mean,
                temperature,
                enable_backprop,
                dict_key_x,
                dict_key_y,
                backend,
                backend_kwargs=backend_kwargs,
                **structure_kwargs,
            )
            self._streaming = self._build_streaming()
        self.n_params = sum(tensor.numel for tensor in self.tensors)
        self.mean = self._values()
        self._asdl_fisher_kwargs = dict(asdl_fisher_kwargs or {})

    def _build_streaming(self) -> StreamingInterface:
        """Build the backend now, so that a wrong option is an error at construction.

        The parent's backends know nothing of LoRA tensors; Jacobians then come from a backend of
        ours beside them.
        """
        if isinstance(self.backend, StreamingInterface):
            return self.backend
        return StreamingGGN(self.model, self.backend.likelihood, tensors=self.tensors)

    # The parent's attributes, declared for the type checker.
    model: nn.Module
    likelihood: str
    n_layers: int
    n_params: int
    n_data: int
    n_outputs: int
    loss: Tensor
    mean: Tensor
    _prior_precision: Tensor
    _prior_mean: Tensor
    _sigma_noise: Tensor
    # The adapters that were active in fit.
    _fitted_under: list[str] | None = None

    def _values(self) -> Tensor:
        """Return the model's present weights as one vector (P,)."""
        return torch.cat([tensor.values().to(self._device, self._dtype) for tensor in self.tensors])

    # What the parent asks for -------------------------------------------------------------------

    @property
    def _device(self) -> torch.device:
        return self.tensors[0].weight.device

    @property
    def _dtype(self) -> torch.dtype:
        return lora_dtype(self.tensors)

    def _init_H(self) -> None:
        self.H: Any = None

    def _check_H_init(self) -> None:
        if self.H is None:
            raise NotFittedError("There is no posterior yet. Run fit() first.")

    @property
    def prior_precision(self) -> Tensor:
        """Prior precision, (1,), one value a LoRA tensor, or (except for kron) one a weight."""
        return self._prior_precision

    @prior_precision.setter
    def prior_precision(self, value: float | Tensor) -> None:
        prior.check_precision(value, self._prior_lengths)
        super(LoraPosterior, type(self)).prior_precision.fset(self, value)

    @property
    def prior_precision_diag(self) -> Tensor:
        """Prior precision of each weight, (P,)."""
        values = self.prior_precision.flatten()
        if len(values) == self.n_params:
            return values
        sizes = torch.tensor([tensor.numel for tensor in self.tensors], device=values.device)
        return values.expand(self.n_layers).repeat_interleave(sizes, output_size=self.n_params)

    @property
    def log_det_prior_precision(self) -> Tensor:
        """Log determinant of the prior precision."""
        return self.prior_precision_diag.double().log().sum().to(self._dtype)

    @property
    def log_det_posterior_precision(self) -> Tensor:
        """Log determinant of the posterior precision: the ratio's and the prior's."""
        return self.log_det_ratio + self.log_det_prior_precision

    @property
    def _prior_lengths(self) -> list[int]:
        return [1, self.n_layers, self.n_params]

    @property
    def prior_mean(self) -> Tensor:
        """Prior mean, a scalar or (P,)."""
        return self._prior_mean

    @prior_mean.setter
    def prior_mean(self, value: float | Tensor) -> None:
        prior.check_mean(value, self.n_params)
        super(LoraPosterior, type(self)).prior_mean.fset(self, value)
        if isinstance(value, Tensor) and value.ndim == 0:  # which the parent makes (1,)
            self._prior_mean = self._prior_mean.squeeze()

    @property
    def sigma_noise(self) -> Tensor:
        """Standard deviation of the noise of regression targets, a scalar."""
        return self._sigma_noise

    @sigma_noise.setter
    def sigma_noise(self, value: float | Tensor) -> None:
        check_positive("sigma_noise", value)
        if self.likelihood != "regression" and not bool(value == 1):
            raise OptionError(
                f"Expected sigma noise 1 for likelihood={str(self.likelihood)!r}, but got "
                f"{value!r}. Only regression has noise; the likelihood's weight is temperature=..."
            )
        super(LoraPosterior, type(self)).sigma_noise.fset(self, value)

    @property
    def temperature(self) -> float:
        """What the likelihood's curvature is divided by."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        check_positive("temperature", value)
        self._temperature = value

    # What a structure adds ----------------------------------------------------------------------

    @abstractmethod
    def _empty_curvature(self) -> Any:
        """Return running sums that have seen no data."""

    @abstractmethod
    def _accumulate(self, state: Any, x: Batch, y: Tensor) -> BatchSummary:
        """Add a batch to the running sums with a streaming backend."""

    @abstractmethod
    def _accumulate_parent(self, state: Any, x: Batch, y: Tensor) -> Tensor:
        """Add a batch with one of the parent's backends; return its loss."""

    def _over_all(self, state: Any, shard: Shard) -> Any:
        """Return the running sums over the data of all processes; `state` may be written to.

        For running sums that are one tensor.
        """
        shard.sum([state])
        return state

    @abstractmethod
    def _set_curvature(self, state: Any, merge: bool) -> None:
        """Make the posterior from running sums, adding to the present ones if `merge`."""

    def _completed(
        self,
        state: Any,
        merge: bool,
        loaders: list[Iterable[Any]],
        progress_bar: bool,
        checkpoints: Checkpoints | None,
    ) -> Any:
        """Return the running sums with what takes another pass over all data; none by default.

        `loaders` are those of the earlier fits (if `merge`) and of this one.
        """
        return state

    @abstractmethod
    def _variance(self, jacobians: Sequence[Tensor]) -> Tensor:
        """Return output covariances (B, C, C) from one Jacobian (B, C, out * in) a tensor."""

    def _tensor_variances(self, jacobians: Sequence[Tensor], values: Tensor) -> Tensor:
        """Return (G, L, B, C, C): what each tensor adds under each of G prior precisions.

        Only where tensors are independent, so that the output covariance is a sum over them.
        """
        raise NotImplementedError

    def _check_independent(self) -> None:
        """Raise OptionError unless there are `_tensor_variances`."""
        if type(self)._tensor_variances is LoraPosterior._tensor_variances:
            raise OptionError(
                f"Expected prior_structure='scalar', as in {type(self).__name__} the variances of "
                "the tensors do not add up. Use hessian_structure='kron', 'ekfac' or 'diag' for a "
                "prior precision per tensor."
            )

    def _variance_grid(self, jacobians: Sequence[Tensor], values: Tensor) -> Tensor:
        """Return (G, B, C, C): `_variance` for each of G scalar prior precisions."""
        covariances = []
        for value in values:
            self.prior_precision = value
            covariances.append(self._variance(jacobians))
        return torch.stack(covariances)

    def check_adapter(self, as_fitted: bool = True) -> None:
        """Raise AdapterError unless the adapter is active, with the others that `fit` saw."""
        resolve_adapter(self.model, self.adapter)
        if as_fitted and self._fitted_under is not None:
            check_active(self.model, self._fitted_under)

    @contextmanager
    def _borrowed(self, as_fitted: bool = True) -> Iterator[None]:
        self.check_adapter(as_fitted)
        with borrowed(self.model, [tensor.weight for tensor in self.tensors]):
            yield


def _check_plain(tensors: Sequence[LoraTensor], backend: type[CurvatureInterface]) -> None:
    other = next((tensor for tensor in tensors if not tensor.is_plain), None)
    if other is not None:
        raise OptionError(
            f"Expected LoRA tensors of linear layers for {backend.__name__}, but {other.name!r} is "
            "none. Use the default backend."
        )
