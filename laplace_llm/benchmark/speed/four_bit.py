"""A base in 4 bits: bitsandbytes' own layers, also on tensors without values."""

from __future__ import annotations

from typing import Any

from torch import nn


def quantise(model: Any) -> None:
    """Put the linear layers of a language model into 4 bits, in place.

    What transformers does on loading with ``load_in_4bit=True, bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True``, but one layer after the other and on any device: NF4 in
    blocks of 64, the blocks' scales in 8 bits in blocks of 256. Embeddings, norms, biases and the
    output layer keep their precision, which is also what the layers compute in.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        In float32, float16 or bfloat16.

    Raises
    ------
    SystemExit
        If bitsandbytes is not installed.
    """
    try:
        import bitsandbytes
    except ImportError:
        raise SystemExit("First: pip install bitsandbytes (or another --preset)") from None
    output = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not output:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, four_bit(module, bitsandbytes))
    model.is_loaded_in_4bit = True  # PEFT looks here


def four_bit(linear: nn.Linear, bitsandbytes: Any) -> nn.Module:
    """Return bitsandbytes' layer of a linear one.

    It quantises by itself where a layer is moved to a device, but not to the meta device.
    """
    layer = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=linear.weight.dtype,
        quant_type="nf4",
        device="meta",
    )
    values, state = bitsandbytes.functional.quantize_4bit(
        linear.weight.detach(), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        values, quant_state=state, blocksize=64, quant_type="nf4", bnb_quantized=True, module=layer
    )
    layer.quant_state = state
    layer.bias = linear.bias
    return layer.train(linear.training)
