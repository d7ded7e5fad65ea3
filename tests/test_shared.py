"""One pass over the model for the moments of several posteriors."""

import pytest
import torch
from models import mlp_batch, snapshot, tiny_mlp
from test_contract import STRUCTURES
from test_tuning import INTERVAL, assert_chosen, fitted

from laplace_llm import LowRankLoraLaplace, shared_moments_grid
from laplace_llm.errors import OptionError


def test_shared_moments_equal_each_posteriors_own():
    model, x = tiny_mlp(), mlp_batch(5, seed=3)[0]
    posteriors = [fitted(structure, model=model) for structure in STRUCTURES]
    for index, la in enumerate(posteriors):
        la.prior_precision = torch.linspace(0.5, 2 + index, len(la.tensors)).double()
    before = [la.prior_precision for la in posteriors]
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    state = snapshot(model)
    shared = shared_moments_grid(posteriors, x, INTERVAL)
    assert len(calls) == 1
    assert snapshot(model) == state
    handle.remove()
    assert len(shared) == len(posteriors)
    for la, prior, moments in zip(posteriors, before, shared, strict=True):
        assert torch.equal(la.prior_precision, prior)
        for result, expected in zip(moments, la.moments_grid(x, INTERVAL), strict=True):
            torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-12)


def test_shared_moments_need_one_model_and_the_larger_set_first():
    model, x = tiny_mlp(), mlp_batch(5)[0]
    both, only_b = fitted(model=model), fitted("kron, B", model=model)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    for posteriors, name in (([only_b, both], "lora_A"), ([both, fitted("diag")], "lora_A")):
        with pytest.raises(OptionError, match=f"one model, the first with all.*{name}"):
            shared_moments_grid(posteriors, x, INTERVAL)
    unfitted = LowRankLoraLaplace(model)
    with pytest.raises(AttributeError, match="fit"):
        shared_moments_grid([both, unfitted], x, INTERVAL)
    assert not calls
    (alone,) = shared_moments_grid([only_b], x, INTERVAL)
    expected = only_b.moments_grid(x, INTERVAL).covariance
    torch.testing.assert_close(alone.covariance, expected, rtol=1e-9, atol=1e-12)


def test_shared_moments_keep_every_prior_after_an_error(monkeypatch):
    model, x = tiny_mlp(), mlp_batch(5)[0]
    posteriors = [fitted(structure, model=model) for structure in ("diag", "full", "kron")]

    def broken(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(posteriors[2], "_variance_grid", broken)
    state = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        shared_moments_grid(posteriors, x, INTERVAL)
    for la in posteriors:
        assert_chosen(la, 0.7)
    assert snapshot(model) == state
