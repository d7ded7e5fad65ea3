"""The head that scores choices by the log-probabilities of their own tokens."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, Literal, NamedTuple

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from laplace_llm import packing
from laplace_llm.causal_heads import CausalHead, entry, ids_and_mask
from laplace_llm.errors import DataError, OptionError, UnsupportedLayerError
from laplace_llm.heads import (
    at_least_float32,
    attendable,
    check_same_shape,
    only_present,
    present_choices,
)


class ChoiceScoringHead(CausalHead):
    """Log-probability of each choice's own tokens after the question.

    Parameters
    ----------
    model : torch.nn.Module
        A Hugging Face AutoModelForCausalLM, with or without PEFT around it.
    normalization : {'sum', 'mean'}, default='sum'
        Whether a choice's token log-probabilities are added or averaged.

    Raises
    ------
    OptionError
        If the model is not a causal language model (encoder-decoder models are not), or
        `normalization` is unknown.
    UnsupportedLayerError
        If lm_head carries an adapter.
    """

    def __init__(self, model: nn.Module, normalization: Literal["sum", "mean"] = "sum") -> None:
        super().__init__(model)
        if normalization not in ("sum", "mean"):
            raise OptionError(f"Expected normalization='sum' or 'mean', but got {normalization!r}.")
        if self._encodes:
            raise OptionError(
                f"ChoiceScoringHead scores what follows a question in one sequence, but "
                f"{type(self._causal).__name__} is an encoder-decoder model. Use "
                "MultipleChoiceHead with letters or label words."
            )
        if isinstance(self._causal.get_output_embeddings(), LoraLayer):
            raise UnsupportedLayerError(
                "ChoiceScoringHead does not support an adapter on lm_head yet. Leave lm_head out "
                "of LoraConfig(target_modules=...), or use MultipleChoiceHead."
            )
        self.normalization = normalization

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments besides the model, as JSON can hold them."""
        return {"normalization": self.normalization}

    @property
    def packing_obstacle(self) -> str | None:
        """Why `prepare` takes packed batches apart for this model; None where it does not."""
        return packing.obstacle(self._causal)

    def prepare(self, batch: Any) -> Any:
        """Return the batch as the model will see it.

        A packed batch stays packed where the model keeps the choices of a sequence apart: full
        attention over given masks and positions, computed by sdpa or eager. For other models it
        becomes one sequence a choice, padded on the right; entries such as labels are kept. What
        belongs to choices that ``choice_present`` says are not there becomes padding.

        Parameters
        ----------
        batch : MutableMapping
            As for `forward`, which calls this by itself.

        Raises
        ------
        DataError
            If an entry of a packed batch is missing or of another shape, ``choice_present`` is
            not one flag for each choice, or a row has none.
        """
        if not _is_packed(batch):
            return super().prepare(batch)
        present = present_choices(batch)
        if self.packing_obstacle is None and present is None:
            return batch
        ids, mask, choices, _ = self._packed_entries(batch)
        if present is not None:
            mask = packing.hide_absent(mask, choices, present.to(mask.device))
        if self.packing_obstacle is None:
            return {**batch, "attention_mask": mask}
        others = {key: batch[key] for key in batch if key not in ("choice_ids", "position_ids")}
        return super().prepare({**others, **packing.unpack(ids, mask, choices, present)})

    def forward(self, batch: MutableMapping[str, Any]) -> Tensor:
        """Return the choices' scores (B, C) in float32 or better.

        Parameters
        ----------
        batch : MutableMapping
            Of `ChoiceScoringCollator`. Packed, one sequence a question, told by its
            ``choice_ids``: these, ``input_ids``, ``attention_mask`` and ``position_ids`` of shape
            (B, S). Or one sequence a choice: ``input_ids``, ``attention_mask`` and
            ``choice_mask`` of shape (B, C, T); the last marks the tokens of the choice itself.
            In both, ``choice_present`` (B, C) if not all rows have all choices: the scores of the
            others are -inf.

        Raises
        ------
        DataError
            If an input is missing or of another shape, or a choice that is present has no token
            to score.
        """
        batch = self.prepare(batch)
        present = present_choices(batch)
        targets = self._packed(batch) if _is_packed(batch) else self._separate(batch)
        n_rows, n_choices = targets.shape
        row, position = targets.chosen.nonzero(as_tuple=True)
        source, choice = targets.source[row, position], targets.choice[row, position]
        counts = torch.bincount(choice, minlength=n_rows * n_choices)
        empty = (counts == 0).view(targets.shape)
        if present is not None:
            empty = empty & present.to(empty.device)
        if bool(empty.any() | (source < 0).any()):
            raise DataError(
                "Expected every choice to have at least one token, and a real token before each, "
                "but a choice of the batch's choice_mask or choice_ids is empty or begins at the "
                "first token of its row."
            )
        hidden = self._hidden(targets.ids, targets.mask, targets.positions).flatten(0, 1)
        # Packed choices begin after one and the same token: its logits are computed once.
        place, which = torch.unique(row * targets.ids.shape[1] + source, return_inverse=True)
        logits = self._causal.get_output_embeddings()(hidden[place.to(hidden.device)])
        logits = self._finish(at_least_float32(logits))
        device = logits.device
        which, tokens = which.to(device), targets.ids[row, position].to(device)
        log_probs = logits[which, tokens] - logits.logsumexp(-1)[which]
        scores = log_probs.new_zeros(len(counts)).index_add(0, choice.to(device), log_probs)
        if self.normalization == "mean":
            scores = scores / counts.clamp_min(1).to(scores)
        return only_present(scores.view(n_rows, n_choices), present)

    def _separate(self, batch: MutableMapping[str, Any]) -> _Targets:
        ids, mask = ids_and_mask(batch, 3, self._embeddings)
        chosen = entry(batch, "choice_mask", 3, self._device).bool()
        check_same_shape("choice_mask", chosen, ids)
        n_rows, n_choices, length = ids.shape
        ids, mask, chosen = ids.flatten(0, 1), mask.flatten(0, 1), chosen.flatten(0, 1)
        # A token is predicted from the one before it, which must be real.
        before = torch.arange(-1, length - 1, device=ids.device)
        source = torch.where(mask.bool().roll(1, -1), before, -1)
        choice = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
        shape = (n_rows, n_choices)
        return _Targets(ids, attendable(mask), None, chosen & mask.bool(), source, choice, shape)

    def _packed(self, batch: MutableMapping[str, Any]) -> _Targets:
        ids, mask, choices, positions = self._packed_entries(batch)
        seen = packing.visible(choices, mask)
        attention = packing.additive(seen, self._causal.get_input_embeddings().weight.dtype)
        chosen = (choices >= 0) & mask.bool()
        n_choices = packing.count_choices(choices, present_choices(batch))
        choice = torch.arange(len(ids), device=ids.device)[:, None] * n_choices + choices
        source, shape = packing.predecessors(seen), (len(ids), n_choices)
        return _Targets(ids, attention, positions, chosen, source, choice, shape)

    def _packed_entries(
        self, batch: MutableMapping[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return ids, mask, choice ids and position ids, each (B, S)."""
        ids, mask = ids_and_mask(batch, 2, self._embeddings)
        choices = entry(batch, "choice_ids", 2, self._device)
        positions = entry(batch, "position_ids", 2, self._device)
        check_same_shape("choice_ids", choices, ids)
        check_same_shape("position_ids", positions, ids)
        return ids, mask, choices, positions


def _is_packed(batch: Any) -> bool:
    return isinstance(batch, MutableMapping) and "choice_ids" in batch


class _Targets(NamedTuple):
    """What goes into the model, and the tokens (R, T) to score.

    A `chosen` token is predicted at position `source` of its row (none if negative), and its
    log-probability counts for `choice`, one of B * C.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor | None
    chosen: Tensor
    source: Tensor
    choice: Tensor
    shape: tuple[int, int]
