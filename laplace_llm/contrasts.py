"""Contrasts: directions in logit space that differences between an example's choices span.

The softmax does not see what all logits share, so C - 1 directions are all there is to a question
of C choices.
"""

from __future__ import annotations

import torch
from torch import Tensor


def contrasts(classes: int, like: Tensor) -> Tensor:
    """Return Helmert's orthonormal contrasts (C, C - 1): a basis of what sums to zero."""
    return choice_contrasts(torch.ones(classes, dtype=torch.bool, device=like.device), like)


def choice_contrasts(present: Tensor, like: Tensor) -> Tensor:
    """Return Helmert's contrasts (..., C, C - 1) of the choices that are present (..., C).

    Column j - 1 compares choice j with those before it. It is zero where there are none, or j
    itself is absent; the others are orthonormal.
    """
    here = present.to(like)
    before = here.cumsum(-1)[..., :-1]  # present choices before each but the first
    earlier = torch.ones(present.shape[-1], before.shape[-1]).to(like).triu()
    own = torch.diag_embed(before, offset=-1)[..., :-1]
    scale = here[..., 1:] / (before * (before + 1)).clamp_min(1).sqrt()
    return (here[..., None] * earlier - own) * scale[..., None, :]
