"""All choices of a question in one sequence: who sees whom, and which models can do it."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from transformers import PreTrainedModel

from laplace_llm.errors import OptionError, UnsupportedLayerError


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


def check_packable(model: PreTrainedModel) -> None:
    """Raise unless a causal language model keeps packed choices apart.

    Raises
    ------
    OptionError
        If its attention is neither sdpa nor eager.
    UnsupportedLayerError
        If it ignores position ids or masks, or has layers other than full attention.
    """
    config = model.config.get_text_config()
    attention = config._attn_implementation
    if attention not in ("sdpa", "eager"):
        raise OptionError(
            "Expected attn_implementation='sdpa' or 'eager' for packed choices, but got "
            f"{attention!r}. Load the model with one of these, or use "
            "ChoiceScoringCollator(packed=False)."
        )
    reason = _obstacle(model)
    if reason is not None:
        raise UnsupportedLayerError(
            "Expected a model of full attention over given masks and positions for packed "
            f"choices, but {type(model).__name__} {reason}. Use "
            "ChoiceScoringCollator(packed=False)."
        )


def _obstacle(model: PreTrainedModel) -> str | None:
    """Return what of the model would mix choices or misplace them; None if nothing would."""
    config = model.config.get_text_config()
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        return "takes no position_ids"
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
