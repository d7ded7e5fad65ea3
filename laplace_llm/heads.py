"""Heads: from a Hugging Face classifier to (B, C) logits, called with one mapping.

Also what all heads share: choices that a row does not have.
"""

from __future__ import annotations

import inspect
from collections.abc import MutableMapping, Sequence
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES

from laplace_llm.errors import AdapterError, DataError, OutputError, UnsupportedLayerError

# By name, as the second is not in every torch; it is a base of what `fully_shard` changes.
_FSDP = {"FullyShardedDataParallel", "FSDPModule"}


class Head(nn.Module):
    """What all heads share: choices that a row does not have.

    A batch may hold ``choice_present`` (B, C), True on the choices of each row. The logits of the
    others are -inf, which is what that means everywhere in this package.
    """

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments besides the model, as JSON can hold them."""
        return {}

    def prepare(self, batch: Any) -> Any:
        """Return the batch as the model will see it: absent choices' sequences are padding.

        Parameters
        ----------
        batch : MutableMapping
            As for `forward`, which calls this by itself.

        Raises
        ------
        DataError
            If ``choice_present`` is not one flag for each choice, or a row has none.
        """
        present = present_choices(batch)
        ids = batch.get("input_ids") if present is not None else None
        if present is None or not isinstance(ids, Tensor) or ids.ndim != 3:
            return batch
        check_present(present, ids.shape[:2])
        mask = batch.get("attention_mask", torch.ones_like(ids))
        return {**batch, "attention_mask": mask * present[..., None].to(mask)}


class SequenceClassificationHead(Head):
    """The ``.logits`` of a Hugging Face sequence classifier or multiple-choice model.

    A classifier with ``num_labels=1`` is a reward or regression model. Given several sequences an
    example, such as a pair of answers of which one is preferred, it scores each of them.

    Parameters
    ----------
    model : torch.nn.Module
        An AutoModelForSequenceClassification or AutoModelForMultipleChoice, with or without PEFT
        around it. Logits come out as (B, C) in float32 or better.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        check_module(model)
        self.model = model
        accepted = inspect.signature(unwrap(model).forward).parameters
        self._accepted = set(accepted) - {"labels", "return_dict", "kwargs"}
        name = type(unwrap(model)).__name__
        self._takes_choices = name in MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES.values()

    def forward(self, batch: MutableMapping[str, Any]) -> Tensor:
        """Return logits (B, C).

        Parameters
        ----------
        batch : MutableMapping
            The model's inputs, on any device; labels and unknown entries are ignored. From a
            classifier with one label, inputs (B, n, T) have logits (B, n), and (B, T) have (B, 1).
            ``choice_present`` (B, C), if there, takes choices or classes out.

        Raises
        ------
        OutputError
            If the model's output has no logits, or more than one label for each of n sequences.
        DataError
            If ``choice_present`` is of another shape, or a row has no choice.
        """
        if not isinstance(batch, MutableMapping):
            raise DataError(
                f"Expected a batch that is a mapping with 'input_ids', but got {_shown(batch)}."
            )
        batch = self.prepare(batch)
        device = next(self.model.parameters()).device
        inputs = {
            key: moved(value, device)
            for key, value in batch.items()
            if key in self._accepted and isinstance(value, Tensor)
        }
        self._check_inputs(batch, inputs)
        lead = inputs["input_ids"].shape[:-1] if "input_ids" in inputs else torch.Size()
        if len(lead) == 2 and "attention_mask" in inputs:
            inputs["attention_mask"] = attendable(inputs["attention_mask"])
        several = len(lead) == 2 and not self._takes_choices
        if several:
            inputs = {
                key: value.flatten(0, 1) if value.shape[:2] == lead else value
                for key, value in inputs.items()
            }
        logits = getattr(self.model(**inputs, return_dict=True), "logits", None)
        if logits is None:
            raise OutputError(
                f"Expected a model with a classification head, but "
                f"{type(unwrap(self.model)).__name__} returned no logits."
            )
        if several:
            if logits.shape[1:] != (1,):
                raise OutputError(
                    f"Expected a classifier with num_labels=1 for inputs of shape "
                    f"{(*lead, inputs['input_ids'].shape[-1])}, a score for each sequence, but it "
                    f"has {logits.shape[-1]} labels. Pass (B, T) inputs, or set num_labels=1."
                )
            logits = logits.view(lead)
        return only_present(at_least_float32(logits), present_choices(batch))

    def _check_inputs(self, batch: MutableMapping[str, Any], inputs: dict[str, Tensor]) -> None:
        """Raise DataError unless the model has what it is to read."""
        if "input_ids" in batch and "input_ids" in self._accepted:
            if "input_ids" not in inputs:
                came = _shown(batch["input_ids"])
                raise DataError(f"Expected batch['input_ids'] to be a tensor, but got {came}.")
            embeddings = cast(PreTrainedModel, unwrap(self.model)).get_input_embeddings()
            check_token_ids(inputs["input_ids"], embeddings)
            if "attention_mask" in inputs:
                check_mask(inputs["attention_mask"], inputs["input_ids"])
        elif not inputs:
            raise DataError(
                f"Expected a batch with 'input_ids', but got the keys {sorted(map(str, batch))}. "
                "Name the inputs as the model does."
            )


def check_token_ids(ids: Tensor, embeddings: nn.Module) -> None:
    """Raise DataError unless all are integers that the embeddings (V, d) have a row for."""
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise DataError(
            f"Expected batch['input_ids'] to be integers, but got {ids.dtype}. Call .long()."
        )
    if not ids.numel():
        raise DataError(
            f"Expected at least one token in batch['input_ids'], but its shape is "
            f"{tuple(ids.shape)}."
        )
    weight = getattr(embeddings, "weight", None)
    low, high = (int(value) for value in ids.aminmax())
    if low < 0 or (isinstance(weight, Tensor) and high >= len(weight)):
        allowed = "from 0 up" if weight is None else f"from 0 to {len(weight) - 1}"
        raise DataError(
            f"Expected batch['input_ids'] {allowed}, as the model has embeddings for, but got "
            f"{low if low < 0 else high}. Use the model's own tokenizer."
        )


def check_mask(mask: Tensor, ids: Tensor) -> None:
    """Raise DataError unless the attention mask has a 0 or 1 for each token."""
    check_same_shape("attention_mask", mask, ids)
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise DataError(
            "Expected batch['attention_mask'] to be 1 on real tokens and 0 on padding, but got "
            f"{mask[(mask != 0) & (mask != 1)][0].item()}."
        )


def check_same_shape(key: str, values: Tensor, ids: Tensor) -> None:
    """Raise DataError unless an entry has the shape of ``input_ids``."""
    if values.shape != ids.shape:
        raise DataError(
            f"Expected batch[{key!r}] to have the shape of input_ids, {tuple(ids.shape)}, but got "
            f"{tuple(values.shape)}."
        )


def present_choices(batch: Any) -> Tensor | None:
    """Return a batch's ``choice_present`` as bool (B, C); None where all rows have all choices."""
    if not isinstance(batch, MutableMapping) or batch.get("choice_present") is None:
        return None
    present = batch["choice_present"]
    if not isinstance(present, Tensor) or present.ndim != 2:
        came = tuple(present.shape) if isinstance(present, Tensor) else type(present).__name__
        raise DataError(f"Expected batch['choice_present'] to be a (B, C) tensor, but got {came}.")
    if not bool(present.bool().any(1).all()):
        raise DataError(
            "Expected every row to have a choice, but batch['choice_present'] has none."
        )
    return present.bool()


def check_present(present: Tensor, shape: Sequence[int]) -> None:
    """Raise DataError unless ``choice_present`` has one flag for each of B x C choices."""
    if tuple(present.shape) != tuple(shape):
        raise DataError(
            f"Expected batch['choice_present'] of shape {tuple(shape)}, a flag for each row and "
            f"choice, but got {tuple(present.shape)}. Pass n_choices={shape[1]} to the collator."
        )


def only_present(logits: Tensor, present: Tensor | None) -> Tensor:
    """Return the logits (B, C) with -inf, and no gradient, for choices that are not present."""
    if present is None:
        return logits
    check_present(present, logits.shape)
    return logits.masked_fill(~present.to(logits.device), -torch.inf)


def attendable(mask: Tensor) -> Tensor:
    """Return an attention mask (..., T) whose empty sequences are full.

    Attending to nothing is NaN; what comes out of such sequences is not for use.
    """
    return mask.masked_fill(~mask.bool().any(-1, keepdim=True), 1)


def as_classifier(model: nn.Module) -> nn.Module:
    """Wrap a bare Hugging Face model, which returns a ModelOutput, into its head."""
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    if isinstance(unwrap(model), PreTrainedModel):
        return SequenceClassificationHead(model)
    return model


def check_module(model: Any) -> None:
    """Raise AdapterError unless the model is a module."""
    if not isinstance(model, nn.Module):
        raise AdapterError(
            f"Expected a model (a torch.nn.Module), but got {_shown(model)}. Load it first, "
            "and wrap it with peft.get_peft_model(model, LoraConfig(...))."
        )


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str) else f"a {type(value).__name__}"


def undistributed(model: nn.Module) -> nn.Module:
    """Return the module inside DistributedDataParallel, or the model itself.

    The wrapper exchanges buffers in every forward pass, also in eval mode, and would wait for
    processes that have fewer batches.

    Raises
    ------
    AdapterError
        If such a wrapper is deeper inside.
    UnsupportedLayerError
        If FSDP keeps a part of the weights on other processes.
    """
    if isinstance(model, DistributedDataParallel):
        return undistributed(model.module)
    for name, module in model.named_modules():
        if not _FSDP.isdisjoint(base.__name__ for base in type(module).__mro__):
            raise UnsupportedLayerError(
                f"Expected all weights on this process, but {name or 'the model'!r} is wrapped by "
                "FSDP, which keeps a part of them on each. Gather them first: load the adapter "
                "into an unwrapped model (or use DistributedDataParallel)."
            )
        if isinstance(module, DistributedDataParallel):
            raise AdapterError(
                f"Expected DistributedDataParallel around the whole model, but it is around "
                f"{name!r}. Build the head over its .module."
            )
    return model


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside a PeftModel (compiled or not), or the model itself."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if isinstance(model, PeftModel) else model


def moved(value: Tensor, device: torch.device) -> Tensor:
    """Return a value on the device, or as it is where accelerate keeps weights elsewhere (meta).

    Its hooks move the inputs of such a module.
    """
    return value if device.type == "meta" else value.to(device)


def offloaded(module: nn.Module) -> bool:
    """Return whether accelerate keeps weights of the module on CPU or disk between its calls."""
    hooked = any(hasattr(part, "_hf_hook") for part in module.modules())
    return hooked and any(parameter.is_meta for parameter in module.parameters())


def at_least_float32(values: Tensor) -> Tensor:
    """Return the values in float32, or their own precision where that is better."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
