"""Heads on language models: what they share, and the one for letters and label words."""

from __future__ import annotations

import inspect
from collections.abc import MutableMapping, Sequence
from copy import deepcopy
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from laplace_llm.collate import check_tokenizer, continuation, target
from laplace_llm.errors import DataError, OptionError
from laplace_llm.heads import (
    Head,
    at_least_float32,
    check_mask,
    check_module,
    check_token_ids,
    moved,
    offloaded,
    only_present,
    present_choices,
    unwrap,
)


class CausalHead(Head):
    """What the heads on language models share: the backbone, without its vocabulary.

    Parameters
    ----------
    model : torch.nn.Module
        A Hugging Face AutoModelForCausalLM, or AutoModelForSeq2SeqLM (whose decoder is causal),
        with or without PEFT around it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        check_module(model)
        self.model = model
        causal = self._causal
        if not isinstance(causal, PreTrainedModel) or causal.get_output_embeddings() is None:
            raise OptionError(
                f"Expected a Hugging Face causal language model, but got {type(causal).__name__}. "
                "Use SequenceClassificationHead for classifiers."
            )
        backbone = inspect.signature(causal.base_model.forward).parameters
        self._takes_positions = "position_ids" in backbone
        self._encodes = _is_encoder_decoder(causal)

    @property
    def _causal(self) -> Any:
        return unwrap(self.model)

    @property
    def _device(self) -> torch.device:
        return self._embeddings.weight.device

    @property
    def _embeddings(self) -> Any:
        return self._causal.get_input_embeddings()

    def _hidden(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None
    ) -> Tensor:
        """Return the last hidden states (R, T, d).

        Unless given, position ids come from the mask, so that padding on the left moves no token.
        """
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if position_ids is not None:
            inputs["position_ids"] = position_ids
        elif self._takes_positions:
            inputs["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp_min(0)
        return self._causal.base_model(**inputs, use_cache=False, return_dict=True)[0]

    def _finish(self, logits: Tensor) -> Tensor:
        """Apply what some architectures do to logits after the vocabulary matrix."""
        config = self._causal.config.get_text_config(decoder=True)
        if getattr(config, "logits_scaling", None):  # Granite
            logits = logits / config.logits_scaling
        if getattr(config, "logit_scale", None):  # Cohere
            logits = logits * config.logit_scale
        if getattr(config, "final_logit_softcapping", None):  # Gemma 2
            cap = config.final_logit_softcapping
            logits = cap * torch.tanh(logits / cap)
        return logits


class MultipleChoiceHead(CausalHead):
    """Logits of the choices' tokens after each prompt: "... Answer:" -> " A", " B", ...

    Only the last real token's hidden state and the choices' vocabulary rows are used. Those rows
    are a frozen float32 (or better) copy made at construction, `choice_layer`; it is the last layer
    of the head, so the parent's ``subset_of_weights="last_layer"`` works. Where lm_head is not a
    plain linear layer (it carries an adapter, or PEFT trains it through ``modules_to_save``) or
    is offloaded, there is no copy and its full output is used.

    In an encoder-decoder model such as T5 the encoder reads the prompt, and the choice is the first
    token that the decoder writes.

    Parameters
    ----------
    model : torch.nn.Module
        A Hugging Face AutoModelForCausalLM or AutoModelForSeq2SeqLM, with or without PEFT around
        it.
    choice_token_ids : Sequence[int]
        One token for each of the C choices.

    Raises
    ------
    OptionError
        If the model is not a language model, has a decoder without a start token, or the tokens
        are not distinct token ids.
    """

    def __init__(self, model: nn.Module, choice_token_ids: Sequence[int]) -> None:
        super().__init__(model)
        lm_head = self._causal.get_output_embeddings()
        self.choice_token_ids = _check_token_ids(choice_token_ids, self._causal)
        if self._encodes and self._causal.config.decoder_start_token_id is None:
            raise OptionError(
                f"Expected an encoder-decoder model with a start token, but "
                f"{type(self._causal).__name__} has none. Set model.config.decoder_start_token_id."
            )
        self.choice_layer = None
        if type(lm_head) is nn.Linear and not offloaded(lm_head):
            self.choice_layer = _ChoiceLayer.rows_of(lm_head, self.choice_token_ids)
            shift = getattr(self._causal, "final_logits_bias", None)  # of BART and its relatives
            if shift is not None:
                self.choice_layer.add_bias(shift[0, self.choice_token_ids])

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments besides the model, as JSON can hold them."""
        return {"choice_token_ids": list(self.choice_token_ids)}

    @property
    def vocabulary(self) -> nn.Module | None:
        """The vocabulary matrix that `forward` calls; None where it has a copy of the rows."""
        return None if self.choice_layer is not None else self._causal.get_output_embeddings()

    @classmethod
    def from_tokenizer(
        cls,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        choices: Sequence[str] = ("A", "B", "C", "D"),
    ) -> MultipleChoiceHead:
        """Make a head for choices given as text.

        Parameters
        ----------
        model : torch.nn.Module
            As for the class.
        tokenizer : PreTrainedTokenizerBase
            The model's tokenizer.
        choices : Sequence[str], default=('A', 'B', 'C', 'D')
            Letters or label words. Each stands for the first token of " " + choice after a
            prompt's "Answer:"; in an encoder-decoder model, for that of the choice as a target,
            which is a text of its own.

        Raises
        ------
        OptionError
            If two choices begin with the same token.
        """
        check_tokenizer(tokenizer)
        if not all(isinstance(choice, str) for choice in choices):
            raise OptionError(f"Expected choices that are strings, but got {choices!r}.")
        texts = [choice.strip() for choice in choices]
        if _is_encoder_decoder(unwrap(model)):
            ids = [target(tokenizer, text)[0] for text in texts]
        else:
            ids = [continuation(tokenizer, "Answer:", " " + text)[0] for text in texts]
        if len(set(ids)) != len(ids):
            raise OptionError(
                f"Expected choices that begin with different tokens, but {list(choices)} begin "
                f"with {ids}. Use other words, letters, or (for causal models) ChoiceScoringHead."
            )
        return cls(model, ids)

    def forward(self, batch: MutableMapping[str, Any]) -> Tensor:
        """Return the choices' logits (B, C).

        Parameters
        ----------
        batch : MutableMapping
            ``input_ids`` (B, T) and optionally ``attention_mask`` (B, T), padded on either side,
            and ``choice_present`` (B, C): other choices' logits are -inf.

        Raises
        ------
        DataError
            If a row has no real token or no choice, or the inputs are missing, of another shape,
            or packed choices.
        """
        ids, mask = ids_and_mask(batch, 2, self._embeddings)
        if "choice_ids" in batch:
            raise DataError(
                "Expected prompts that the choices' tokens follow, but got packed choices "
                "(choice_ids). Use MultipleChoiceCollator, or ChoiceScoringHead."
            )
        positions = torch.arange(ids.shape[1], device=ids.device)
        last = (mask * (positions + 1)).amax(1) - 1
        if bool((last < 0).any()):
            raise DataError("Expected at least one real token in every row, but a mask is all 0.")
        if self._encodes:
            logits = at_least_float32(self._first_written(ids, mask))
            return only_present(logits, present_choices(batch))
        hidden = self._hidden(ids, mask)
        features = hidden[torch.arange(len(ids)).to(hidden.device), last.to(hidden.device)]
        if self.choice_layer is not None:
            logits = self._chosen(features)
        else:
            assert self.vocabulary is not None
            logits = self.vocabulary(features)[:, self.choice_token_ids]
            logits = self._finish(at_least_float32(logits))
        return only_present(logits, present_choices(batch))

    def _chosen(self, features: Tensor) -> Tensor:
        """Return the choices' logits (B, C) from what lm_head would be given, (B, d)."""
        assert self.choice_layer is not None
        weight = self.choice_layer.weight
        return self._finish(self.choice_layer(features.to(weight.device, weight.dtype)))

    def _first_written(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the choices' logits (B, C) for the first token that the decoder writes.

        The whole model is called, as what comes between decoder and lm_head differs (T5 scales,
        FLAN-T5 does not); lm_head sees one position a prompt.
        """
        start = ids.new_full((len(ids), 1), self._causal.config.decoder_start_token_id)
        given: list[Tensor] = []
        handle = self._causal.get_output_embeddings().register_forward_pre_hook(
            lambda _module, args: given.append(args[0])
        )
        try:
            logits = self._causal(
                input_ids=ids,
                attention_mask=mask,
                decoder_input_ids=start,
                use_cache=False,
                return_dict=True,
            ).logits
        finally:
            handle.remove()
        if self.choice_layer is None:
            return logits[:, 0, self.choice_token_ids]
        return self._chosen(given[0][:, 0])


class _ChoiceLayer(nn.Linear):
    """The choice tokens' rows of lm_head.

    Frozen, because PEFT would not save it with the adapter. A deep copy requires gradients: the
    parent's last-layer classes work on a deep copy and take its parameters by that flag.
    """

    @classmethod
    def rows_of(cls, lm_head: nn.Linear, rows: Sequence[int]) -> _ChoiceLayer:
        weight = at_least_float32(lm_head.weight.detach()[list(rows)].clone())
        with_bias = lm_head.bias is not None
        layer = cls(weight.shape[1], weight.shape[0], with_bias, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        if with_bias:
            bias = at_least_float32(lm_head.bias.detach()[list(rows)].clone())
            layer.bias = nn.Parameter(bias, requires_grad=False)
        return layer

    def add_bias(self, bias: Tensor) -> None:
        """Add to the layer's bias."""
        total = bias.to(self.weight) if self.bias is None else self.bias + bias.to(self.bias)
        self.bias = nn.Parameter(total.detach().clone(), requires_grad=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> _ChoiceLayer:
        copy = self.__new__(type(self))
        memo[id(self)] = copy
        copy.__dict__.update({k: deepcopy(v, memo) for k, v in self.__dict__.items()})
        return copy.requires_grad_(True)


def _is_encoder_decoder(model: nn.Module) -> bool:
    return isinstance(model, PreTrainedModel) and bool(model.config.is_encoder_decoder)


def _check_token_ids(ids: Sequence[int], causal: PreTrainedModel) -> list[int]:
    size = causal.get_output_embeddings().weight.shape[0]
    given = ids.tolist() if hasattr(ids, "tolist") else ids
    listed = isinstance(given, Sequence) and not isinstance(given, str)
    whole = listed and all(isinstance(i, Integral) and not isinstance(i, bool) for i in given)
    if not whole:
        raise OptionError(
            f"Expected choice_token_ids to be a sequence of token ids, but got {ids!r}. For texts "
            "use MultipleChoiceHead.from_tokenizer."
        )
    values = [int(i) for i in given]
    if not values or len(set(values)) != len(values) or not all(0 <= i < size for i in values):
        raise OptionError(
            f"Expected distinct token ids between 0 and {size - 1}, but got {values}."
        )
    return values


def entry(batch: MutableMapping[str, Any], key: str, ndim: int, device: torch.device) -> Tensor:
    """Return one entry of the batch on the device, or say what is wrong with it."""
    shape = "(B, T)" if ndim == 2 else "(B, C, T)"
    value = batch[key] if isinstance(batch, MutableMapping) and key in batch else None
    if not isinstance(value, Tensor) or value.ndim != ndim:
        came = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(type(value))
        raise DataError(f"Expected batch[{key!r}] to be a tensor of shape {shape}, but got {came}.")
    return moved(value, device)


def ids_and_mask(
    batch: MutableMapping[str, Any], ndim: int, embeddings: nn.Module
) -> tuple[Tensor, Tensor]:
    """Return ``input_ids`` and ``attention_mask``, all ones where the batch has none."""
    device = embeddings.weight.device
    assert isinstance(device, torch.device)
    ids = entry(batch, "input_ids", ndim, device)
    check_token_ids(ids, embeddings)
    if "attention_mask" not in batch:
        return ids, torch.ones_like(ids)
    mask = entry(batch, "attention_mask", ndim, device)
    check_mask(mask, ids)
    return ids, mask.long()
