"""Taps: gradients handed on one at a time, inputs that layers share, and what is left behind."""

import gc
import weakref

import pytest
import torch
from models import (
    bruteforce_jacobians,
    choice_batch,
    inputs_of,
    letter_batch,
    letter_head,
    ragged_choices,
    scoring_head,
    tiny_bert_classifier,
    tiny_gpt2,
    tiny_llama,
    tiny_mlp,
)
from peft import LoraConfig, get_peft_model
from torch import nn

from laplace_llm import DiagLoraLaplace, SequenceClassificationHead, StreamingGGN, taps
from laplace_llm.adapters import find_lora_tensors
from laplace_llm.session import borrowed

ATTENTION = ("q_proj", "k_proj", "v_proj")


def tapped(model, batch, sides="AB"):
    tensors = find_lora_tensors(model, sides=sides)
    with borrowed(model, [tensor.weight for tensor in tensors]):
        yield from (tensors, taps.forward(model, tensors, batch))


def first_reader(tensors, position):
    """Return the name, without projection and side, of the tensor at a position."""
    return tensors[position].name.rsplit("_proj", 1)[0][:-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_inputs_of_q_k_and_v_are_kept_once(dtype):
    model = tiny_llama(targets=(*ATTENTION, "o_proj"), dtype=dtype)
    if dtype == torch.bfloat16:  # PEFT keeps adapters in float32, and casts for each of them
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
    tensors, run = tapped(letter_head(model), letter_batch(4))
    for index, (tensor, source) in enumerate(zip(tensors, run.sources, strict=True)):
        if tensor.role == "A" and any(f"{name}." in tensor.name for name in ATTENTION):
            assert first_reader(tensors, source) == first_reader(tensors, index)
            assert "q_proj" in tensors[source].name
        else:
            assert source == index
        torch.testing.assert_close(run.inputs(index), run.inputs(source))
    kept = [tap.captured for tap in run._taps]
    assert sum(value is not None for value in kept) == len(set(run.sources))


def test_factors_of_shared_inputs_are_those_of_each():
    model = letter_head(tiny_llama(targets=ATTENTION))
    tensors, run = tapped(model, letter_batch(4))
    captured = {}

    def capture(index):
        return lambda _module, args, _output: captured.__setitem__(index, args[0].detach())

    handles = [t.module.register_forward_hook(capture(i)) for i, t in enumerate(tensors)]
    model(letter_batch(4))
    for handle in handles:
        handle.remove()
    mask = letter_batch(4)["attention_mask"].bool()[..., None]
    for index, value in captured.items():
        torch.testing.assert_close(run.inputs(index), torch.where(mask, value, 0.0))


@pytest.mark.parametrize("sides", ["AB", "B"])
@pytest.mark.parametrize("build", [lambda: letter_head(tiny_gpt2()), letter_head])
def test_gradients_are_those_of_autograd_and_are_not_kept(build, sides):
    model, batch = build(), letter_batch(4)
    tensors, run = tapped(model, batch, sides)
    cotangent = torch.randn(run.logits.shape, generator=torch.manual_seed(0)).double()
    refs = []

    def outer(index, gradient):
        refs.append(weakref.ref(gradient))
        return gradient.mT @ run.inputs(index)

    products = run.backward(cotangent, outer)
    gc.collect()
    assert not any(ref() is not None for ref in refs)
    # Another pass over the same graph gives the same.
    again = run.backward(cotangent, outer, last=True)
    weights = [tensor.weight for tensor in tensors]
    with borrowed(model, weights):
        expected = torch.autograd.grad(model(batch), weights, cotangent)
    for ours, same, theirs in zip(products, again, expected, strict=True):
        torch.testing.assert_close(ours.sum(0), theirs)
        assert torch.equal(ours, same)


def test_nothing_of_a_pass_outlives_it():
    run = tapped_run = list(tapped(letter_head(), letter_batch(4)))[1]
    graph = weakref.ref(run.logits)
    run.backward(torch.ones_like(run.logits), lambda i, g: None, last=True)
    del run, tapped_run
    gc.collect()
    assert graph() is None


def test_a_model_of_no_use_to_a_tensor_gives_it_zeros():
    class TwoBranches(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            self.second(x)
            return self.first(x)

    config = LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False)
    model = get_peft_model(TwoBranches(), config).double().eval()
    x = torch.randn(5, 4, dtype=torch.float64, generator=torch.manual_seed(0))
    backend = StreamingGGN(model, "classification")
    blocks, _ = backend.jacobian_blocks(x)
    zero = [bool((block == 0).all()) for block in blocks]
    assert zero == ["second" in tensor.name for tensor in backend.tensors]
    assert all(
        block.shape[-1] == t.weight.numel()
        for block, t in zip(blocks, backend.tensors, strict=True)
    )


def test_hooks_are_gone_after_a_pass_and_after_an_error():
    model = scoring_head()
    for batch in (choice_batch(3), {"input_ids": "nonsense"}):
        try:
            list(tapped(model, inputs_of(batch)))
        except Exception:
            assert batch["input_ids"] == "nonsense"
        for module in model.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks


def test_mlp_without_attention_shares_nothing():
    tensors, run = tapped(tiny_mlp(), torch.randn(5, 4, dtype=torch.float64))
    assert run.sources == list(range(len(tensors)))


@pytest.mark.parametrize("sides", ["AB", "B"])
def test_pooled_activations_of_several_sequences_an_example(sides):
    """Targets after the pooling have one position for each sequence, not for each token."""
    model = tiny_bert_classifier(targets=("value", "pooler.dense"), classes=1)
    head, batch = SequenceClassificationHead(model), ragged_choices(5)
    tensors, run = tapped(head, batch, sides)
    counts = batch["choice_present"].sum(1, keepdim=True)
    for index, tensor in enumerate(tensors):
        if "pooler" in tensor.name:
            assert torch.equal(run.token_counts(index), counts)
            assert not run.inputs(index)[~batch["choice_present"]].any()
    la = DiagLoraLaplace(head, tensors=sides)
    with la._borrowed():
        blocks, _ = la._streaming.jacobian_blocks(batch)
    expected = bruteforce_jacobians(head, batch, tensors)
    torch.testing.assert_close(torch.cat(blocks, -1), expected)


class Marked(nn.Module):
    """Marks absent choices in a way through which a gradient would pass."""

    def __init__(self):
        super().__init__()
        self.model = tiny_mlp()

    def forward(self, x):
        return self.model(x) + torch.where(x[:, :3] > 0.5, -torch.inf, 0.0)


def test_absent_choices_have_no_gradient_however_they_are_marked():
    x = torch.randn(6, 4, dtype=torch.float64, generator=torch.manual_seed(1))
    absent = x[:, :3] > 0.5
    assert absent.any()
    blocks, logits = StreamingGGN(Marked(), "classification").jacobian_blocks(x)
    assert torch.equal(logits == -torch.inf, absent)
    for block in blocks:
        assert not block[absent].any()
        assert block[~absent].any()
