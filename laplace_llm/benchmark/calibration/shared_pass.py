"""One pass over batches for many Laplace posteriors, and what each would have paid alone."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from laplace_llm.benchmark.calibration.costs import Cost, Meter
from laplace_llm.moments import Moments, glm_moments
from laplace_llm.prediction import keeping_prior

Key = TypeVar("Key", bound=Hashable)


class Member(NamedTuple):
    """A posterior and the (G,) prior precisions under which its moments are wanted."""

    posterior: Any
    values: Tensor


class Part(NamedTuple):
    """A member's moments over all batches, and their cost: the Jacobians and its own part."""

    moments: Moments
    cost: Cost


def shared_pass(
    members: Mapping[Key, Member], batches: Sequence[Any], meter: Meter
) -> dict[Key, Part]:
    """Return every member's moments: `laplace_llm.shared_moments_grid`, timed.

    Parameters
    ----------
    members : Mapping
        Posteriors over one model. One of them must have the LoRA tensors of all.
    batches : Sequence
        Model inputs.
    meter : Meter
        Of the problem.
    """
    las = [member.posterior for member in members.values()]
    first = max(las, key=lambda la: len(la.tensors))
    position = {tensor.weight: index for index, tensor in enumerate(first.tensors)}
    columns = [[position[tensor.weight] for tensor in la.tensors] for la in las]
    sizes = [len(member.values) for member in members.values()]
    own = [0.0] * len(las)

    def variances(jacobians: Sequence[Tensor]) -> Tensor:
        parts = []
        for index, (la, values) in enumerate(members.values()):
            chosen = [jacobians[i] for i in columns[index]]
            with meter.measure() as cost:
                parts.append(la._variance_grid(chosen, values.to(la._device, la._dtype)))
            own[index] += cost.seconds
        return torch.cat(parts)

    means, covariances = [], []
    with meter.measure() as total, ExitStack() as stack:
        stack.enter_context(first._borrowed())
        for la in las:
            stack.enter_context(keeping_prior(la))
        for batch in batches:
            moments = glm_moments(first._streaming, batch, variances, first.n_outputs)
            means.append(moments.mean)
            covariances.append(moments.covariance.detach())
    mean, covariance = torch.cat(means), torch.cat(covariances, 1)
    jacobians_alone = total.seconds - sum(own)
    return {
        key: Part(Moments(mean, part), Cost(jacobians_alone + seconds, total.memory))
        for key, part, seconds in zip(members, covariance.split(sizes), own, strict=True)
    }
