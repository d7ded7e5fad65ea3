"""Several posteriors over one adapter, compared from one pass over the model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from laplace_llm.data import check_inputs
from laplace_llm.errors import OptionError
from laplace_llm.moments import Moments, glm_moments
from laplace_llm.prediction import LoraPredictive, keeping_prior
from laplace_llm.prior import check_grid
from laplace_llm.taps import Batch


def shared_moments_grid(
    posteriors: Sequence[LoraPredictive], batch: Batch, values: Tensor
) -> list[Moments]:
    """Return `LoraPredictive.moments_grid` of several posteriors, from one pass over the model.

    For comparing structures: the Jacobians of a batch are computed once and contracted with every
    posterior.

    Parameters
    ----------
    posteriors : Sequence[LoraPredictive]
        Fitted posteriors over the same adapter of the same model. The first one's tensors must
        include those of the others.
    batch : Tensor or MutableMapping
        Model inputs.
    values : Tensor
        (G,) prior precisions.

    Raises
    ------
    OptionError
        If there is no posterior, or one is over another model, or over tensors that the first one
        does not have.
    PriorError
        If `values` are not positive.
    """
    if not isinstance(posteriors, Sequence) or not posteriors:
        raise OptionError(f"Expected a sequence of posteriors, but got {posteriors!r}.")
    for la in posteriors:
        if not isinstance(la, LoraPredictive):
            raise OptionError(f"Expected posteriors over LoRA weights, but got {la!r}.")
    check_grid(values)
    check_inputs(batch, posteriors[0]._device)
    first = posteriors[0]
    position = {tensor.weight: index for index, tensor in enumerate(first.tensors)}
    columns = []
    for la in posteriors:
        la._check_H_init()
        unknown = [tensor.name for tensor in la.tensors if tensor.weight not in position]
        if unknown:
            raise OptionError(
                "Expected posteriors over one model, the first with all tensors of the others, "
                f"but it does not have {unknown[0]!r} of a {type(la).__name__}."
            )
        columns.append([position[tensor.weight] for tensor in la.tensors])

    def variances(jacobians: Sequence[Tensor]) -> Tensor:
        return torch.stack(
            [
                la._variance_grid([jacobians[i] for i in chosen], values.to(la._device, la._dtype))
                for la, chosen in zip(posteriors, columns, strict=True)
            ]
        )

    with ExitStack() as stack:
        stack.enter_context(first._borrowed())
        for la in posteriors:
            stack.enter_context(keeping_prior(la))
        mean, covariances = glm_moments(first._streaming, batch, variances, first.n_outputs)
    return [Moments(mean, covariance.detach()) for covariance in covariances]
