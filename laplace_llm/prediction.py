"""Prediction: the linearised (GLM) and sampled (`nn`) predictives of a posterior."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from laplace_llm.data import check_inputs, check_outputs
from laplace_llm.eigen import eigh
from laplace_llm.errors import OptionError
from laplace_llm.links import CLOSED_FORMS, OF_DIFFERENCES, over_present
from laplace_llm.moments import Moments, glm_moments
from laplace_llm.options import check_count, check_one_of
from laplace_llm.posterior import LoraPosterior
from laplace_llm.prior import check_grid
from laplace_llm.seeds import default_generator
from laplace_llm.taps import Batch, check_finite, check_logits

BRIDGES = ("bridge", "bridge_norm")  # the parent's links that mix an example's logits
LINKS = (*CLOSED_FORMS, "mc", *BRIDGES)
PREDICTIVES = ("glm", "nn")


class LoraPredictive(LoraPosterior):
    """A posterior over LoRA weights that answers the parent's prediction calls."""

    @property
    def _knows_contrasts(self) -> bool:
        """Whether it can be asked for covariances of differences between outputs alone."""
        return True

    def moments_grid(
        self, batch: Batch, values: Tensor, layerwise: bool = False, centred: bool = False
    ) -> Moments:
        """Return the latent moments of a batch under G scalar prior precisions, in one pass.

        Parameters
        ----------
        batch : Tensor or MutableMapping
            Model inputs.
        values : Tensor
            (G,) prior precisions.
        layerwise : bool, default=False
            Whether to keep the L tensors' parts apart, where tensors are independent.
        centred : bool, default=False
            Whether the covariances leave out what all logits share: enough for ``'qmc'``,
            and ``'mean_field'``, and one backward pass in C less.

        Returns
        -------
        moments : Moments
            Mean (B, C) and covariances (G, B, C, C), or (G, L, B, C, C) if layerwise.

        Raises
        ------
        OptionError
            If layerwise, and the tensors' variances do not add up in this structure.
        """
        self._check_H_init()
        check_grid(values)
        check_inputs(batch, self._device)
        if layerwise:
            self._check_independent()
        variance = self._tensor_variances if layerwise else self._variance_grid
        with self._borrowed(), keeping_prior(self):
            moments = glm_moments(
                self._streaming,
                batch,
                lambda j: variance(j, values.to(self._device, self._dtype)),
                self.n_outputs,
                centred=centred and self._knows_contrasts,
            )
        self._check_same_outputs(moments.mean)
        return Moments(moments.mean, moments.covariance.detach())

    def __call__(
        self,
        x: Batch | Moments,
        pred_type: str = "glm",
        joint: bool = False,
        link_approx: str = "qmc",
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
        fitting: bool = False,
        **model_kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the posterior predictive of a batch; the parent's arguments and results.

        Unlike in the parent:

        - `x` may also be `Moments`, from `moments_grid`; the link is then all there is to do;
        - `link_approx` may be ``'qmc'``, and is by default: what ``'mc'`` converges to, without
          its noise (`laplace_llm.links.quasi_monte_carlo`; `n_samples` has no effect on it); or
          ``'mean_field'``, a closed form (`laplace_llm.links.mean_field`). Both take into account
          that logits move together. The parent's default ``'probit'`` does not, and can be worse
          than no Laplace at all;
        - `generator` also drives ``link_approx='mc'`` and ``pred_type='nn'``;
        - a choice that its row does not have (its logit is -inf) has probability zero, and the
          others get what they would get without it.

        Raises
        ------
        NotFittedError
            Before `fit`.
        ValueError
            As in the parent.
        """
        self._check_H_init()
        self._check_prediction(pred_type, link_approx)
        self._check_sampling(n_samples, generator)
        if generator is not None and link_approx == "mc":
            # The parent checks the generator and then draws without it.
            classes = self._predicts_classes(fitting)
            if pred_type == "glm" and classes:
                moments = self._glm_predictive_distribution(x)
                samples = self._glm_predictive_samples(
                    *moments, n_samples, diagonal_output, generator
                )
                return samples.mean(0)
            if pred_type == "nn" and classes:
                return self._nn_predictive_classification(x, n_samples, generator, **model_kwargs)
            if pred_type == "nn":
                samples = self._nn_functional_samples(x, n_samples, generator, **model_kwargs)
                return samples.mean(0), samples.var(0)
        if link_approx in OF_DIFFERENCES:
            if pred_type == "glm" and self._predicts_classes(fitting):
                moments = self._glm_predictive_distribution(
                    x, diagonal_output=diagonal_output, centred=not diagonal_output
                )
                return CLOSED_FORMS[link_approx](*moments)
            link_approx = "probit"  # what the parent expects where there is no link to take
        if link_approx in BRIDGES and pred_type == "glm" and self._predicts_classes(fitting):
            parents = super().__call__

            def bridge(mean: Tensor, covariance: Tensor) -> Tensor:
                return parents(Moments(mean, covariance), link_approx=link_approx, fitting=fitting)

            return over_present(bridge)(*self._glm_predictive_distribution(x))
        return super().__call__(
            x, pred_type, joint, link_approx, n_samples, diagonal_output, generator, fitting,
            **model_kwargs,
        )  # fmt: skip

    def predictive_samples(
        self,
        x: Batch,
        pred_type: str = "glm",
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return samples (S, B, C) of the predictive, as the parent does.

        Unlike there, those of a reward model are rewards for both predictives, not the softmax of
        what is a single output.
        """
        self._check_samples(pred_type, n_samples, generator)
        sample = super().predictive_samples
        if self.likelihood == "reward_modeling":
            sample = self.functional_samples
        return sample(x, pred_type, n_samples, diagonal_output, generator)

    def functional_samples(
        self,
        x: Batch,
        pred_type: str = "glm",
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return samples (S, B, C) of the outputs, as the parent does."""
        self._check_samples(pred_type, n_samples, generator)
        return super().functional_samples(x, pred_type, n_samples, diagonal_output, generator)

    def sample(self, n_samples: int = 100, generator: torch.Generator | None = None) -> Tensor:
        """Return (S, P) draws from the posterior, as the parent does."""
        self._check_H_init()
        self._check_sampling(n_samples, generator)
        return super().sample(n_samples, generator)

    def log_prob(self, value: Tensor, normalized: bool = True) -> Tensor:
        """Return the log density of weights (P,) under the posterior, as the parent does."""
        self._check_H_init()
        if not isinstance(value, Tensor) or value.shape != self.mean.shape:
            came = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise OptionError(f"Expected weights of shape ({self.n_params},), but got {came}.")
        return super().log_prob(value, normalized)

    def _check_prediction(self, pred_type: Any, link_approx: Any) -> None:
        check_one_of("pred_type", pred_type, PREDICTIVES)
        check_one_of("link_approx", link_approx, LINKS)
        if pred_type == "nn" and link_approx != "mc":
            raise OptionError(
                f"Only mc link approximation is supported for nn: expected link_approx='mc', but "
                f"got {link_approx!r}."
            )

    def _check_samples(self, pred_type: Any, n_samples: Any, generator: Any) -> None:
        self._check_H_init()
        check_one_of("pred_type", pred_type, PREDICTIVES)
        self._check_sampling(n_samples, generator)

    def _check_sampling(self, n_samples: Any, generator: Any) -> None:
        check_count("n_samples", n_samples)
        if generator is not None:
            self._check_generator(generator)

    def _check_same_outputs(self, mean: Tensor) -> None:
        """Raise DataError if outputs have a posterior each, and there are others than in `fit`."""
        if not self._knows_contrasts:
            check_outputs(mean.shape[-1], self.n_outputs)

    def _check_generator(self, generator: Any) -> None:
        if not isinstance(generator, torch.Generator) or generator.device != self._device:
            raise OptionError(
                f"Expected generator to be a torch.Generator on {self._device}, but got "
                f"{generator!r}."
            )

    def _predicts_classes(self, fitting: bool) -> bool:
        return self.likelihood == "classification" or (
            self.likelihood == "reward_modeling" and fitting
        )

    def _glm_predictive_distribution(
        self,
        X: Batch | Moments,
        joint: bool = False,
        diagonal_output: bool = False,
        centred: bool = False,
    ) -> tuple[Tensor, Tensor]:
        if isinstance(X, Moments):  # already computed; cloned, as the bridge links write into them
            return X.mean.clone(), X.covariance.clone()
        self._check_H_init()
        check_inputs(X, self._device)
        X = X.to(self._device) if isinstance(X, Tensor) else X
        with self._borrowed():
            if joint:
                blocks, outputs = self._streaming.jacobian_blocks(X, self.enable_backprop)
                mean = outputs.flatten()
                covariance = self._variance([j.flatten(0, 1)[None] for j in blocks])[0]
            else:
                mean, covariance = glm_moments(
                    self._streaming,
                    X,
                    self._variance,
                    self.n_outputs,
                    self.enable_backprop,
                    centred and self._knows_contrasts,
                )
            if not joint:
                self._check_same_outputs(mean)
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
        random = default_generator(f_mu.device) if generator is None else generator
        state, draw = random.get_state(), super()._glm_functional_samples

        def samples(mean: Tensor, covariance: Tensor) -> Tensor:
            # The same noise for all rows, as in the parent, whatever choices the others have.
            random.set_state(state)
            try:
                return draw(mean, covariance, n_samples, diagonal_output, generator)
            except torch.linalg.LinAlgError:
                # Outputs that move together have a singular covariance, which has no Cholesky
                # factor but a symmetric root all the same.
                values, vectors = eigh(covariance.double(), "the outputs' covariance")
                root = (vectors * values.clamp_min(0).sqrt()[..., None, :]).to(mean.dtype)
                noise = torch.randn(
                    mean.shape[1], n_samples, dtype=mean.dtype, device=mean.device,
                    generator=generator,
                )  # fmt: skip
                return (mean[..., None] + root @ noise).permute(2, 0, 1)

        return over_present(samples, absent=-torch.inf)(f_mu, f_var)

    def _sampled_outputs(
        self,
        X: Batch | Moments,
        n_samples: int,
        generator: torch.Generator | None,
        **model_kwargs: Any,
    ) -> Iterator[Tensor]:
        """Yield the model's outputs (B, C) under weights drawn one sample at a time.

        `functional_call` swaps the weights, so the model's own are never written to.
        """
        self._check_H_init()
        if isinstance(X, Moments):
            raise OptionError("Expected a batch for pred_type='nn', but got Moments.")
        check_inputs(X, self._device)
        X = X.to(self._device) if isinstance(X, Tensor) else X
        sizes = [tensor.numel for tensor in self.tensors]
        for _ in range(n_samples):
            parts = self.sample(1, generator)[0].split(sizes)
            weights = {
                tensor.name: tensor.placed(part)
                for tensor, part in zip(self.tensors, parts, strict=True)
            }
            with self._borrowed(), torch.set_grad_enabled(self.enable_backprop):
                outputs = functional_call(self.model, weights, (X,), model_kwargs)
            check_logits(outputs)
            check_finite(outputs)
            yield outputs.to(self._device, self._dtype)

    def _nn_functional_samples(
        self,
        X: Batch | Moments,
        n_samples: int = 100,
        generator: torch.Generator | None = None,
        **model_kwargs: Any,
    ) -> Tensor:
        return torch.stack(list(self._sampled_outputs(X, n_samples, generator, **model_kwargs)))

    def _nn_predictive_classification(
        self,
        X: Batch | Moments,
        n_samples: int = 100,
        generator: torch.Generator | None = None,
        **model_kwargs: Any,
    ) -> Tensor:
        samples = self._sampled_outputs(X, n_samples, generator, **model_kwargs)
        return sum(torch.softmax(logits, -1) for logits in samples) / n_samples  # type: ignore[return-value]


@contextmanager
def keeping_prior(la: LoraPredictive) -> Iterator[None]:
    """Put the prior precision back afterwards."""
    before = la._prior_precision
    try:
        yield
    finally:
        la.prior_precision = before
