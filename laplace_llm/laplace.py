"""Laplace approximations over LoRA weights, registered with `laplace.Laplace` as ``"lora"``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader

from laplace_llm import prior
from laplace_llm._compat import (
    AsdlInterface,
    CurvatureInterface,
    DiagLaplace,
    EFInterface,
    FullLaplace,
    KronLaplace,
    ParametricLaplace,
    parent_factory,
    quiet_about_link,
)
from laplace_llm.adapters import find_lora_tensors, lora_dtype, resolve_adapter
from laplace_llm.curvature import BatchSummary, StreamingGGN, StreamingInterface
from laplace_llm.data import check_labels, labelled, numbered
from laplace_llm.errors import (
    LaplaceLLMError,
    NotFittedError,
    OptionError,
    PriorError,
    StateError,
)
from laplace_llm.heads import as_classifier
from laplace_llm.kronecker import LoraKron, LoraKronDecomposed
from laplace_llm.predictive import Moments, glm_moments
from laplace_llm.session import borrowed, hosting_parent_backend
from laplace_llm.taps import Batch, check_logits


class LoraLaplace(ParametricLaplace):
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
        LoRA layers inside.
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
        **structure_kwargs: Any,
    ) -> None:
        self.adapter = resolve_adapter(model, adapter)
        model = as_classifier(model)
        self.tensors = find_lora_tensors(model, self.adapter)
        backend = StreamingGGN if backend is None else backend
        backend_kwargs = dict(backend_kwargs or {})
        if issubclass(backend, StreamingInterface):
            backend_kwargs["adapter"] = self.adapter
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
        self._asdl_fisher_kwargs = dict(asdl_fisher_kwargs or {})

    def _build_streaming(self) -> StreamingInterface:
        """Build the backend now, so that a wrong option is an error at construction.

        The parent's backends know nothing of LoRA tensors; Jacobians then come from a backend of
        ours beside them.
        """
        if isinstance(self.backend, StreamingInterface):
            return self.backend
        return StreamingGGN(self.model, self.backend.likelihood, adapter=self.adapter)

    # The parent's attributes, declared for the type checker.
    model: nn.Module
    n_layers: int
    n_params: int
    n_data: int
    n_outputs: int
    loss: Tensor
    mean: Tensor
    _prior_precision: Tensor
    _prior_mean: Tensor

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
        super(LoraLaplace, type(self)).prior_precision.fset(self, value)

    @property
    def _prior_lengths(self) -> list[int]:
        return [1, self.n_layers, self.n_params]

    @property
    def prior_mean(self) -> Tensor:
        """Prior mean, a scalar or (P,)."""
        return self._prior_mean

    @prior_mean.setter
    def prior_mean(self, value: float | Tensor) -> None:
        try:
            super(LoraLaplace, type(self)).prior_mean.fset(self, value)
        except ValueError as error:
            raise PriorError(
                f"Expected a prior mean that is a number or a tensor of {self.n_params} values, "
                f"but got {value!r}."
            ) from error

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

    @abstractmethod
    def _set_curvature(self, state: Any, merge: bool) -> None:
        """Make the posterior from running sums, adding to the present ones if `merge`."""

    @abstractmethod
    def _variance(self, jacobians: Sequence[Tensor]) -> Tensor:
        """Return output covariances (B, C, C) from one Jacobian (B, C, out * in) a tensor."""

    def _variance_grid(self, jacobians: Sequence[Tensor], values: Tensor) -> Tensor:
        """Return (G, B, C, C): `_variance` for each of G scalar prior precisions."""
        covariances = []
        for value in values:
            self.prior_precision = value
            covariances.append(self._variance(jacobians))
        return torch.stack(covariances)

    # Fit ----------------------------------------------------------------------------------------

    @contextmanager
    def _borrowed(self) -> Iterator[None]:
        with borrowed(self.model, [tensor.weight for tensor in self.tensors]):
            yield

    def fit(
        self,
        train_loader: DataLoader | Iterable[Any],
        override: bool = True,
        progress_bar: bool = False,
    ) -> None:
        """Fit the posterior at the model's present weights, in one pass over the data.

        Parameters
        ----------
        train_loader : Iterable
            Yields mappings with labels under `dict_key_y`, or ``(X, y)`` pairs. No length needed:
            unlike in the parent, N is the number of examples seen (so ``drop_last`` is right).
        override : bool, default=True
            Whether to start anew; False adds the data to those of earlier fits.
        progress_bar : bool, default=False
            Whether to show one.

        Raises
        ------
        DataError
            If the loader is empty, or labels are missing or out of range.
        OutputError
            If the model does not return finite (B, C) logits. As with every error, an earlier
            posterior stays as it was.
        """
        merge = not override and self.H is not None
        state, n_data, n_outputs = self._empty_curvature(), 0, 0
        loss = torch.zeros((), dtype=self._dtype, device=self._device)
        with self._borrowed():
            batches = labelled(
                train_loader, self.dict_key_y, self._device, "[Computing Hessian]", progress_bar
            )
            for index, (x, y) in enumerate(batches):
                try:
                    summary = self._fit_batch(state, x, y)
                except LaplaceLLMError as error:
                    raise numbered(error, index) from error
                loss += summary.loss.to(loss)
                n_data, n_outputs = n_data + len(y), summary.n_outputs
        self._set_curvature(state, merge)
        self.mean = parameters_to_vector([t.weight.detach().to(self._dtype) for t in self.tensors])
        self.loss = self.loss + loss if merge else loss
        self.n_data = self.n_data + n_data if merge else n_data
        self.n_outputs = n_outputs

    def _fit_batch(self, state: Any, x: Batch, y: Tensor) -> BatchSummary:
        if isinstance(self.backend, StreamingInterface):
            return self._accumulate(state, x, y)
        with torch.no_grad():
            logits = self.model(x)
        check_logits(logits)
        y = check_labels(y, logits, self.backend.likelihood == "regression")
        with hosting_parent_backend(self.model, logits.shape[1]):
            return BatchSummary(self._accumulate_parent(state, x, y), logits.shape[1])

    # Tune ---------------------------------------------------------------------------------------

    def optimize_prior_precision(self, *args: Any, **kwargs: Any) -> None:
        """Tune the prior precision; the parent's arguments and defaults.

        ``method='marglik'`` maximises the marginal likelihood (``prior_structure='scalar'`` or
        ``'layerwise'``). ``method='gridsearch'`` needs a `val_loader`, makes one pass over it,
        resets the metric for every value (the parent does not) and lets Monte-Carlo links use the
        same random numbers for every value.

        Raises
        ------
        NotFittedError
            Before `fit`.
        ValueError
            As in the parent. After any error the prior precision is what it was.
        """
        self._check_H_init()
        before = self._prior_precision
        try:
            with quiet_about_link():
                super().optimize_prior_precision(*args, **kwargs)
        except BaseException:
            self._prior_precision = before
            raise

    def _gridsearch(self, loss: Any, interval: Tensor, val_loader: Any, **kwargs: Any) -> Tensor:
        return prior.gridsearch(self, loss, interval, val_loader, **kwargs)

    def moments_grid(self, batch: Batch, values: Tensor) -> Moments:
        """Return the latent moments of a batch under G scalar prior precisions, in one pass.

        Parameters
        ----------
        batch : Tensor or MutableMapping
            Model inputs.
        values : Tensor
            (G,) prior precisions.

        Returns
        -------
        moments : Moments
            Mean (B, C) and covariances (G, B, C, C).
        """
        self._check_H_init()
        before, values = self._prior_precision, values.to(self._device, self._dtype)
        try:
            with self._borrowed():
                moments = glm_moments(
                    self._streaming, batch, lambda j: self._variance_grid(j, values), self.n_outputs
                )
        finally:
            self._prior_precision = before
        return Moments(moments.mean, moments.covariance.detach())

    # Predict ------------------------------------------------------------------------------------

    def __call__(
        self,
        x: Batch | Moments,
        pred_type: str = "glm",
        joint: bool = False,
        link_approx: str = "probit",
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
        fitting: bool = False,
        **model_kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the posterior predictive of a batch; the parent's arguments and results.

        `x` may also be `Moments`, from `moments_grid`; the link is then all there is to do.
        Unlike in the parent, `generator` also drives ``link_approx='mc'`` and ``pred_type='nn'``.

        Raises
        ------
        NotFittedError
            Before `fit`.
        ValueError
            As in the parent.
        """
        self._check_H_init()
        if generator is not None and pred_type == "nn":
            model_kwargs["generator"] = generator
        elif generator is not None and link_approx == "mc" and self._predicts_classes(fitting):
            samples = self.predictive_samples(x, "glm", n_samples, diagonal_output, generator)
            return samples.mean(0)
        return super().__call__(
            x, pred_type, joint, link_approx, n_samples, diagonal_output, generator, fitting,
            **model_kwargs,
        )  # fmt: skip

    def _predicts_classes(self, fitting: bool) -> bool:
        return self.likelihood == "classification" or (
            self.likelihood == "reward_modeling" and fitting
        )

    def _glm_predictive_distribution(
        self, X: Batch | Moments, joint: bool = False, diagonal_output: bool = False
    ) -> tuple[Tensor, Tensor]:
        if isinstance(X, Moments):  # already computed; cloned, as the bridge links write into them
            return X.mean.clone(), X.covariance.clone()
        self._check_H_init()
        X = X.to(self._device) if isinstance(X, Tensor) else X
        with self._borrowed():
            if joint:
                blocks, outputs = self._streaming.jacobian_blocks(X, self.enable_backprop)
                mean = outputs.flatten()
                covariance = self._variance([j.flatten(0, 1)[None] for j in blocks])[0]
            else:
                mean, covariance = glm_moments(
                    self._streaming, X, self._variance, self.n_outputs, self.enable_backprop
                )
        if diagonal_output and not joint:
            covariance = covariance.diagonal(dim1=-2, dim2=-1)
        return (mean, covariance) if self.enable_backprop else (mean.detach(), covariance.detach())

    def _glm_functional_samples(
        self,
        f_mu: Tensor,
        f_var: Tensor,
        n_samples: int,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        try:
            return super()._glm_functional_samples(
                f_mu, f_var, n_samples, diagonal_output, generator
            )
        except torch.linalg.LinAlgError:
            # Outputs that move together have a singular covariance, which has no Cholesky factor
            # but a symmetric root all the same.
            values, vectors = torch.linalg.eigh(f_var.double())
            root = (vectors * values.clamp_min(0).sqrt()[..., None, :]).to(f_mu.dtype)
            noise = torch.randn(
                f_mu.shape[1], n_samples, dtype=f_mu.dtype, device=f_mu.device, generator=generator
            )
            return (f_mu[..., None] + root @ noise).permute(2, 0, 1)

    def _sampled_outputs(
        self, X: Batch, n_samples: int, generator: torch.Generator | None, **model_kwargs: Any
    ) -> Iterator[Tensor]:
        """Yield the model's outputs (B, C) under weights drawn one sample at a time.

        `functional_call` swaps the weights, so the model's own are never written to.
        """
        self._check_H_init()
        X = X.to(self._device) if isinstance(X, Tensor) else X
        sizes = [tensor.weight.numel() for tensor in self.tensors]
        for _ in range(n_samples):
            parts = self.sample(1, generator)[0].split(sizes)
            weights = {
                tensor.name: part.view(tensor.shape).to(tensor.weight.dtype)
                for tensor, part in zip(self.tensors, parts, strict=True)
            }
            with self._borrowed(), torch.set_grad_enabled(self.enable_backprop):
                outputs = functional_call(self.model, weights, (X,), model_kwargs)
            check_logits(outputs)
            yield outputs.to(self._dtype)

    def _nn_functional_samples(
        self,
        X: Batch,
        n_samples: int = 100,
        generator: torch.Generator | None = None,
        **model_kwargs: Any,
    ) -> Tensor:
        return torch.stack(list(self._sampled_outputs(X, n_samples, generator, **model_kwargs)))

    def _nn_predictive_classification(
        self,
        X: Batch,
        n_samples: int = 100,
        generator: torch.Generator | None = None,
        **model_kwargs: Any,
    ) -> Tensor:
        samples = self._sampled_outputs(X, n_samples, generator, **model_kwargs)
        return sum(torch.softmax(logits, -1) for logits in samples) / n_samples  # type: ignore[return-value]

    # Keep ---------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the posterior as tensors, numbers and strings.

        The parent's keys, plus the names of the tensors, so that a state is only ever loaded over
        the adapter it belongs to.
        """
        self._check_H_init()
        return {
            **ParametricLaplace.state_dict(self),
            "H": self._curvature_state(),
            "likelihood": self._likelihood_name,
            "tensors": [tensor.name for tensor in self.tensors],
            "adapter": self.adapter,
        }

    @property
    def _likelihood_name(self) -> str:
        return str(getattr(self.likelihood, "value", self.likelihood))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, into the same kind of posterior over the same tensors.

        Raises
        ------
        StateError
            If the state belongs to another class, likelihood or adapter; nothing is changed then.
        """
        expected = {
            "cls_name": type(self).__name__,
            "likelihood": self._likelihood_name,
            "tensors": [tensor.name for tensor in self.tensors],
            "adapter": self.adapter,
        }
        for key, value in expected.items():
            if state_dict.get(key) != value:
                raise StateError(
                    f"Expected a state with {key}={_short(value)}, but it has "
                    f"{_short(state_dict.get(key))}. Load it into the posterior it came from."
                )
        if len(state_dict["mean"]) != self.n_params:
            raise StateError(
                f"Expected a state with {self.n_params} weights, but it has "
                f"{len(state_dict['mean'])}."
            )
        curvature = self._curvature_from_state(state_dict["H"])
        for key in ("temperature", "enable_backprop", "loss", "n_data", "n_outputs"):
            setattr(self, key, state_dict[key])
        self.mean = state_dict["mean"].to(self._device, self._dtype)
        for key in ("prior_mean", "prior_precision", "sigma_noise"):
            setattr(self, key, state_dict[key])
        self._set_curvature(curvature, merge=False)

    def _curvature_state(self) -> Any:
        return self.H

    def _curvature_from_state(self, state: Any) -> Any:
        return state.to(self._device, self._dtype)


class KronLoraLaplace(LoraLaplace, KronLaplace):
    """Kronecker-factored Laplace over LoRA weights, ``("lora", "kron")``; the default.

    The posterior precision of each LoRA tensor is ``B (x) A + delta``, with an exact r x r factor
    and a d x d one that is exact up to d = 1,024 and low-rank beyond (see `StreamingInterface`
    and `laplace_llm.sketch`). Source: Yang et al., *Bayesian Low-rank Adaptation for Large
    Language Models*, ICLR 2024.

    Parameters
    ----------
    damping : bool, default=False
        Add the root of the prior precision to each factor instead of the prior precision to their
        product (Ritter et al., 2018). The parent drops it on the way to its posterior.
    *args, **kwargs
        See `LoraLaplace`.
    """

    _key = ("lora", "kron")

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
        damping: bool = False,
        backend_kwargs: dict[str, Any] | None = None,
        asdl_fisher_kwargs: dict[str, Any] | None = None,
        adapter: str | None = None,
    ) -> None:
        LoraLaplace.__init__(
            self, model, likelihood, sigma_noise, prior_precision, prior_mean, temperature,
            enable_backprop, dict_key_x, dict_key_y, backend, backend_kwargs, asdl_fisher_kwargs,
            adapter, damping=damping,
        )  # fmt: skip

    @property
    def _prior_lengths(self) -> list[int]:
        return [1, self.n_layers]

    def _init_H(self) -> None:
        self.H: LoraKronDecomposed | None = None
        self.H_facs: LoraKron | None = None

    def _empty_curvature(self) -> LoraKron:
        rank = getattr(self.backend, "rank", max(max(t.shape) for t in self.tensors))
        return LoraKron.empty(self.tensors, rank, self._dtype)

    def _accumulate(self, state: LoraKron, x: Batch, y: Tensor) -> BatchSummary:
        return self._streaming.accumulate_kron(state, x, y)

    def _accumulate_parent(self, state: LoraKron, x: Batch, y: Tensor) -> Tensor:
        # N=1 makes the parent's input factor a sum over examples, which is what LoraKron keeps.
        loss, kron = self.backend.kron(x, y, N=1, **self._asdl_fisher_kwargs)
        for pair, (outputs, inputs) in zip(state.pairs, kron.kfacs, strict=True):
            pair.outputs.matrix += outputs.to(pair.outputs.matrix)  # type: ignore[union-attr]
            pair.inputs.matrix += inputs.to(pair.inputs.matrix)  # type: ignore[union-attr]
        state.n_data += len(y)
        return loss

    def _set_curvature(self, state: LoraKron, merge: bool) -> None:
        if merge and self.H_facs is not None:
            state.merge(self.H_facs)
        self.H = state.decompose(damping=self.damping)
        self.H_facs = state

    def _variance(self, jacobians: Sequence[Tensor]) -> Tensor:
        return self.posterior_precision.variance(jacobians)

    def _variance_grid(self, jacobians: Sequence[Tensor], values: Tensor) -> Tensor:
        return (self.H * self._H_factor).variance_grid(jacobians, values)

    def _curvature_state(self) -> dict[str, Any]:
        assert self.H_facs is not None
        return self.H_facs.state()

    def _curvature_from_state(self, state: dict[str, Any]) -> LoraKron:
        return self._empty_curvature().load(state)


class DiagLoraLaplace(LoraLaplace, DiagLaplace):
    """Laplace over LoRA weights with the exact diagonal of the GGN, ``("lora", "diag")``.

    Takes the arguments of `LoraLaplace`.
    """

    _key = ("lora", "diag")

    def _empty_curvature(self) -> Tensor:
        return torch.zeros(self.n_params, dtype=self._dtype, device=self._device)

    def _accumulate(self, state: Tensor, x: Batch, y: Tensor) -> BatchSummary:
        return self._streaming.accumulate_diag(state, x, y)

    def _accumulate_parent(self, state: Tensor, x: Batch, y: Tensor) -> Tensor:
        by_vmap = isinstance(self.backend, EFInterface) and not isinstance(
            self.backend, AsdlInterface
        )
        if by_vmap and isinstance(x, MutableMapping):
            raise OptionError(
                f"{self._backend_cls.__name__} computes a diagonal with vmap, which cannot take "
                "batches that are mappings. Use backend=StreamingEF."
            )
        loss, diagonal = self.backend.diag(x, y, N=1, **self._asdl_fisher_kwargs)
        state += diagonal.to(state)
        return loss

    def _set_curvature(self, state: Tensor, merge: bool) -> None:
        self.H = state + self.H if merge else state

    def _variance(self, jacobians: Sequence[Tensor]) -> Tensor:
        variances = self.posterior_variance.split([j.shape[-1] for j in jacobians])
        return torch.stack([(j * v) @ j.mT for j, v in zip(jacobians, variances, strict=True)]).sum(
            0
        )


class FullLoraLaplace(LoraLaplace, FullLaplace):
    """Laplace over LoRA weights with the dense GGN, ``("lora", "full")``; for small P only.

    Takes the arguments of `LoraLaplace`. Memory is P x P, allocated by `fit`.
    """

    _key = ("lora", "full")

    def _empty_curvature(self) -> Tensor:
        return torch.zeros(self.n_params, self.n_params, dtype=self._dtype, device=self._device)

    def _accumulate(self, state: Tensor, x: Batch, y: Tensor) -> BatchSummary:
        return self._streaming.accumulate_full(state, x, y)

    def _accumulate_parent(self, state: Tensor, x: Batch, y: Tensor) -> Tensor:
        loss, matrix = self.backend.full(x, y, N=1, **self._asdl_fisher_kwargs)
        state += matrix.to(state)
        return loss

    def _set_curvature(self, state: Tensor, merge: bool) -> None:
        self.H = state + self.H if merge else state
        self._posterior_scale = None

    def _variance(self, jacobians: Sequence[Tensor]) -> Tensor:
        return self.functional_variance(torch.cat(list(jacobians), -1))


def Laplace(
    model: nn.Module,
    likelihood: str = "classification",
    subset_of_weights: str = "lora",
    hessian_structure: str = "kron",
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`laplace.Laplace` with defaults for LoRA; other combinations go to the parent unchanged.

    Parameters
    ----------
    model : torch.nn.Module
        See `LoraLaplace`.
    likelihood : str, default='classification'
    subset_of_weights : str, default='lora'
    hessian_structure : {'kron', 'diag', 'full'}, default='kron'
        For ``subset_of_weights='lora'``; all of the parent's otherwise.
    *args, **kwargs
        See `LoraLaplace`, `KronLoraLaplace` or the parent's classes.

    Raises
    ------
    OptionError
        If there is no such structure for ``"lora"``.
    """
    structures = sorted(cls._key[1] for cls in (KronLoraLaplace, DiagLoraLaplace, FullLoraLaplace))
    if subset_of_weights == "lora" and hessian_structure not in structures:
        raise OptionError(
            f"Expected hessian_structure to be one of {structures} for subset_of_weights='lora', "
            f"but got {hessian_structure!r}."
        )
    return parent_factory(model, likelihood, subset_of_weights, hessian_structure, *args, **kwargs)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
