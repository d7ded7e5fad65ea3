"""All choices of a question in one sequence: who sees whom, which models can, and the way back."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from transformers import PreTrainedModel

from laplace_llm.heads import check_present


def visible(choice_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return which tokens each token sees, bool (B, S, S), the seeing ones along dimension 1.

    It sees itself, the real tokens of the question before it, and those of its own choice.

    Parameters
    ----------
    choice_ids : Tensor
        (B, S), -1 on the question and on padding.
    attention_mask : Tensor
        (B, S), nonzero on real tokens.
    """
    own = choice_ids[:, :, None] == choice_ids[:, None, :]
    question = choice_ids[:, None, :] < 0
    seen = ((own | question) & attention_mask.bool()[:, None, :]).tril()
    # Padding too sees itself: a softmax over nothing is NaN.
    return seen | torch.eye(choice_ids.shape[1], dtype=torch.bool, device=seen.device)


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what to add to attention scores, (B, 1, S, S): 0 where seen, else the lowest number.

    Eager attention and sdpa both take this form, and Hugging Face models pass it on as it is.
    """
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill(~seen, torch.finfo(dtype).min)[:, None]


def predecessors(seen: Tensor) -> Tensor:
    """Return the last other token that each token sees, (B, S); -1 where there is none."""
    numbers = torch.arange(1, seen.shape[-1] + 1, device=seen.device)
    return (seen.tril(-1) * numbers).amax(-1) - 1


def hide_absent(mask: Tensor, choice_ids: Tensor, present: Tensor) -> Tensor:
    """Return the mask (B, S) without the tokens of choices that are not present (B, C).

    Raises
    ------
    DataError
        If there are choices that `present` says nothing of.
    """
    check_present(present, (len(mask), max(count_choices(choice_ids), present.shape[1])))
    return mask * ((choice_ids < 0) | present.gather(1, choice_ids.clamp_min(0))).to(mask)


def unpack(
    ids: Tensor, mask: Tensor, choice_ids: Tensor, present: Tensor | None = None
) -> dict[str, Tensor]:
    """Return one sequence a choice: ``input_ids``, ``attention_mask``, ``choice_mask`` (B, C, T).

    Each holds the real tokens of the question and of its own choice. Padding is on the right,
    where no causal model can see it, and is as narrow as the longest sequence allows.

    Parameters
    ----------
    ids, mask : Tensor
        (B, S), padded on either side.
    choice_ids : Tensor
        (B, S), -1 on the question and on padding.
    present : Tensor, optional
        (B, C), which tells C; default: as many choices as there are.
    """
    numbers = torch.arange(count_choices(choice_ids, present), device=ids.device)[:, None]
    choices = choice_ids[:, None, :].expand(-1, len(numbers), -1)
    kept = ((choices < 0) | (choices == numbers)) & mask.bool()[:, None, :]
    # The kept tokens come first; stable, so in their order.
    order = (~kept).long().argsort(stable=True)[..., : int(kept.sum(-1).amax())]
    kept = kept.gather(-1, order)
    chosen = kept & (choices.gather(-1, order) == numbers)
    ids = ids[:, None, :].expand_as(choices).gather(-1, order).where(kept, 0)
    return {"input_ids": ids, "attention_mask": kept.long(), "choice_mask": chosen}


def count_choices(choice_ids: Tensor, present: Tensor | None = None) -> int:
    """Return C, at least 1: that of ``choice_present`` (B, C), or the choices that there are."""
    return present.shape[1] if present is not None else max(1, int(choice_ids.max()) + 1)


def obstacle(model: PreTrainedModel) -> str | None:
    """Return why a causal language model would mix packed choices or misplace them, else None."""
    reason = _obstacle(model)
    return None if reason is None else f"{type(model).__name__} {reason}"


def _obstacle(model: PreTrainedModel) -> str | None:
    config = model.config.get_text_config()
    # Others take no additive mask, or would not look at it.
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"computes attention by {config._attn_implementation!r}, not by sdpa or eager"
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        return "takes no position_ids"
    # Where scores are not causal, what stands after a choice changes it: BERT as no decoder.
    if not all(getattr(module, "is_causal", True) for module in model.base_model.modules()):
        return "attends to later tokens"
    # Recurrent and convolutional layers heed no attention mask.
    if getattr(model, "_is_stateful", False):
        return "has recurrent layers"
    other = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "attention"}
    if other:
        return f"has layers of type {', '.join(sorted(other))}"
    # A mask of four dimensions replaces the one that would have cut the window out.
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", 0)
    if window and getattr(config, "use_sliding_window", True):
        return f"attends to windows of {window} tokens"
    # Others compute masks or position biases (ALiBi, GPT-Neo's local layers) of their own.
    if not getattr(model, "_supports_attention_backend", False):
        return "has attention of its own"
    return None
