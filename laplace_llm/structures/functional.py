"""The parent's ELLA and VaLLA on LoRA weights (laplace-torch 0.3): which weights, which Jacobians.

The algebra is the parent's. What is ours: the parameters are one adapter's LoRA tensors, Jacobians
come from the streaming backend, and the model is only borrowed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from laplace_llm._compat import (
    ELLA,
    BaseFunctionalLaplace,
    CurvatureInterface,
    VaLLA,
    model_fingerprint,
)
from laplace_llm.adapters import Sides, find_lora_tensors, lora_dtype, resolve_adapter
from laplace_llm.backends import StreamingGGN
from laplace_llm.curvature import StreamingInterface, check_streaming
from laplace_llm.eigen import decomposing
from laplace_llm.errors import DataError, OptionError
from laplace_llm.heads import as_classifier
from laplace_llm.links import CLOSED_FORMS, OF_DIFFERENCES
from laplace_llm.moments import glm_moments
from laplace_llm.saving import SavedPosterior
from laplace_llm.session import borrowed, undisturbed_calls
from laplace_llm.shards import as_shard
from laplace_llm.taps import Batch

# The key of outputs that were computed before, in a batch whose inputs are features.
OUTPUTS = "laplace_llm_outputs"


class FunctionSpaceOfLora(BaseFunctionalLaplace, SavedPosterior):
    """What `ELLALoraLaplace` and `VaLLALoraLaplace` share; mixed into the parent's classes.

    Unlike in the parent, the default link is ``'qmc'`` (see `LoraPredictive.__call__`), the model
    is left as it was, and a state holds the adapter's weights instead of the whole model's.

    Parameters
    ----------
    model, likelihood
        As in `LoraPosterior`.
    *args, **kwargs
        Those of the parent's class. The backend must be one of the streaming ones.
    adapter, tensors, include_modules_to_save
        As in `LoraPosterior`.

    Raises
    ------
    AdapterError
        If the model has no such LoRA tensors, or the adapter is inactive, merged or disabled.
    OptionError
        If the backend is not one of the streaming ones, or laplace-torch is older than 0.3.
    """

    # The parent's attributes, declared for the type checker.
    model: nn.Module
    likelihood: str
    backend: StreamingInterface
    enable_backprop: bool
    n_outputs: int
    _backend_kwargs: dict[str, Any]

    def __init__(
        self,
        model: nn.Module,
        likelihood: str = "classification",
        *args: Any,
        backend: type[CurvatureInterface] | None = None,
        backend_kwargs: dict[str, Any] | None = None,
        adapter: str | None = None,
        tensors: Sides = "AB",
        include_modules_to_save: bool = False,
        **kwargs: Any,
    ) -> None:
        check_streaming(backend, "the Jacobians of LoRA tensors")
        backend = StreamingGGN if backend is None else backend
        self._given = {
            "backend": backend.__name__,
            "backend_kwargs": dict(backend_kwargs or {}),
            "tensors": tensors,
            "include_modules_to_save": include_modules_to_save,
        }
        self.adapter = resolve_adapter(model, adapter)
        model = as_classifier(model)
        self.tensors = find_lora_tensors(
            model, self.adapter, tensors, True, include_modules_to_save
        )
        with borrowed(model, [tensor.weight for tensor in self.tensors]):
            super().__init__(
                model,
                likelihood,
                *args,
                backend=backend,
                backend_kwargs=backend_kwargs,
                **kwargs,
            )
            given: dict[str, Any] = self._backend_kwargs
            self._backend_kwargs = {**given, "tensors": self.tensors}
            _ = self.backend  # built now, while these tensors alone are trainable
            self._backend_kwargs = given  # which the parent copies into a state
        self.n_params = sum(tensor.numel for tensor in self.tensors)

    @property
    def _device(self) -> torch.device:
        return self.tensors[0].weight.device

    @property
    def _dtype(self) -> torch.dtype:
        return lora_dtype(self.tensors)

    # The model is borrowed -----------------------------------------------------------------------

    @contextmanager
    def _borrowed(self) -> Iterator[None]:
        resolve_adapter(self.model, self.adapter)
        before = vars(self.model).get("output_size")
        try:
            with borrowed(self.model, [tensor.weight for tensor in self.tensors]):
                yield
        finally:
            if before is not None:
                self.model.output_size = before
            elif "output_size" in vars(self.model):
                del self.model.output_size

    @contextmanager
    def _adapter_for_model(self) -> Iterator[None]:
        """Let the parent take the adapter for the model, whose every weight it saves."""
        model = self.model
        weights = {tensor.name.replace(".", "/"): tensor.weight for tensor in self.tensors}
        try:
            with borrowed(model, list(weights.values())):
                self.model = nn.ParameterDict(weights)
                yield
        finally:
            self.model = model

    def fit(self, train_loader: DataLoader, **kwargs: Any) -> None:
        """Fit as the parent's `fit`, whose arguments it takes.

        Raises
        ------
        DataError
            If `train_loader` is no `DataLoader`: the parent draws from its dataset.
        OptionError
            If it is a shard of the data.
        """
        if not isinstance(train_loader, DataLoader):
            raise DataError(
                f"Expected a DataLoader over a sized dataset, but got a "
                f"{type(train_loader).__name__}. Make one, or use FunctionalLoraLaplace."
            )
        if as_shard(train_loader).size > 1:
            raise OptionError(
                f"Expected the whole training data, as {type(self).__name__} is fitted by one "
                "process, but got a shard. Give it the whole data, or use FunctionalLoraLaplace."
            )
        # The parent's steps write into these, so that the present ones are kept from it for the
        # case of an error.
        for key, value in list(vars(self).items()):
            if isinstance(value, (nn.Parameter, torch.Generator)) or key == "fit_history_":
                setattr(self, key, copy.deepcopy(value))
        with self._borrowed(), decomposing("the Nystrom features"):
            super().fit(train_loader, **kwargs)

    def functional_variance(self, jacobians: Tensor) -> Tensor:
        """Return covariances (B, C, C) from Jacobians (B, C, P)."""
        with self._borrowed():
            return super().functional_variance(jacobians)

    def functional_covariance(self, jacobians: Tensor) -> Tensor:
        """Return the joint covariance (B C, B C) from Jacobians (B, C, P)."""
        with self._borrowed():
            return super().functional_covariance(jacobians)

    def _glm_predictive_distribution(self, x: Batch, joint: bool = False) -> tuple[Tensor, Tensor]:
        with self._borrowed():
            return super()._glm_predictive_distribution(x, joint)

    def state_dict(self) -> dict[str, Any]:
        """Return the parent's state, with the adapter's weights to be recognised by."""
        with self._adapter_for_model():
            return super().state_dict()

    def _options(self) -> dict[str, Any]:
        keys = {key: getattr(self, key) for key in ("dict_key_x", "dict_key_y")}
        return {**self._given, **keys, "seed": self.seed}

    def _state_of_model(self) -> dict[str, Any]:
        with self._adapter_for_model():
            return {"model_fingerprint": model_fingerprint(self.model)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned.

        Raises
        ------
        ValueError
            As in the parent; if the adapter has other weights than when the state was saved.
        """
        with self._adapter_for_model():
            super().load_state_dict(state_dict)

    # Links ---------------------------------------------------------------------------------------

    def __call__(
        self,
        x: Batch,
        pred_type: str = "gp",
        joint: bool = False,
        link_approx: str = "qmc",
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
        fitting: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the predictive of a batch; the parent's arguments and results, and two links."""
        if link_approx in OF_DIFFERENCES:
            if self.likelihood == "classification" or (
                self.likelihood == "reward_modeling" and fitting
            ):
                mean, covariance = self.predictive_moments(x)
                if diagonal_output:
                    covariance = torch.diag_embed(covariance.diagonal(dim1=-2, dim2=-1))
                return CLOSED_FORMS[link_approx](mean, covariance)
            link_approx = "probit"  # what the parent expects where there is no link to take
        return super().__call__(
            x, pred_type, joint, link_approx, n_samples, diagonal_output, generator, fitting
        )


@undisturbed_calls
class ELLALoraLaplace(FunctionSpaceOfLora, ELLA):
    """The parent's ELLA on LoRA weights: the linearised model in K Nystrom features.

    ``subsample_size`` training examples, one output of each, span a space of weights of which
    ``n_eigenvalues`` directions are kept; everything outside has no variance. A prediction costs C
    backward passes and no Jacobian of a batch is held, and a grid search passes over the validation
    data once. Source: Deng, Zhou, Zhu, *Accelerated Linearized Laplace Approximation for Bayesian
    Deep Learning*, NeurIPS 2022. See `FunctionSpaceOfLora`; needs laplace-torch 0.3.
    """

    dual_directions: Tensor

    def _options(self) -> dict[str, Any]:
        sizes = {key: getattr(self, key) for key in ("subsample_size", "n_eigenvalues")}
        return {**super()._options(), **sizes}

    def _features(self, x: Batch) -> tuple[Tensor, Tensor]:
        if not isinstance(x, Tensor) and OUTPUTS in x:
            return x[self.dict_key_x], x[OUTPUTS]
        sizes = [tensor.numel for tensor in self.tensors]
        directions = self.dual_directions.split(sizes)

        def project(jacobians: Sequence[Tensor]) -> Tensor:
            return torch.stack([j @ d for j, d in zip(jacobians, directions, strict=True)]).sum(0)

        with torch.enable_grad():
            outputs, features = glm_moments(
                self.backend, x, project, self.n_outputs, self.enable_backprop
            )
        return features, outputs

    def optimize_hyperparameters(self, val_loader: Iterable[Any], grid: Iterable[Any]) -> None:
        """Choose from a grid as the parent does, with one pass over the validation data."""
        self._check_fitted()
        batches = []
        with self._borrowed():
            for batch in val_loader:
                x, y = self._batch(batch)
                features, outputs = (values.detach() for values in self._features(x))
                batches.append({self.dict_key_x: features, OUTPUTS: outputs, self.dict_key_y: y})
        super().optimize_hyperparameters(batches, grid)


@undisturbed_calls
class VaLLALoraLaplace(FunctionSpaceOfLora, VaLLA):
    """The parent's VaLLA on LoRA weights: a variational posterior on inducing outputs.

    `fit` optimises the posterior, the prior precision and the noise by Adam. Every step computes
    the Jacobians of the inducing inputs (one backward pass for all) and of a batch, (B, C, P), and
    takes a QR decomposition of P x ``num_inducing``: for small adapters or few steps. Inducing
    inputs that are mappings stay fixed. Source: Ortega, Rodriguez Santana, Hernandez-Lobato,
    *Variational Linearized Laplace Approximation for Bayesian Deep Learning*, ICML 2024. See
    `FunctionSpaceOfLora`; needs laplace-torch 0.3.
    """

    def _options(self) -> dict[str, Any]:
        # The state has the inducing inputs; any of so many are replaced by them.
        return {
            **super()._options(), "inducing_locations": "random", "num_inducing": self.num_inducing
        }  # fmt: skip

    def _latent_distribution(self, x: Batch, joint: bool = False) -> tuple[Tensor, ...]:
        # Of a choice that a row does not have the objective would have no derivative at -inf.
        mean, *others = super()._latent_distribution(x, joint)
        return (mean.clamp_min(torch.finfo(mean.dtype).min / 4), *others)

    def _glm_predictive_distribution(self, x: Batch, joint: bool = False) -> tuple[Tensor, Tensor]:
        mean, covariance = super()._glm_predictive_distribution(x, joint)
        return mean.masked_fill(mean <= torch.finfo(mean.dtype).min / 4, -torch.inf), covariance
