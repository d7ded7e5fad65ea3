"""Using a posterior leaves the model, and an earlier posterior, exactly as they were."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from laplace import Laplace
from laplace.curvature import AsdlGGN, CurvlinopsGGN
from models import letter_batch, letter_head, snapshot, tiny_llama, used_model
from torch import Tensor, nn
from torch.nn.utils import parametrize

from laplace_llm import StreamingEF, StreamingGGN

STRUCTURES = ("kron", "diag", "full")
BACKENDS = (StreamingGGN, StreamingEF, CurvlinopsGGN, AsdlGGN)
NN = {"pred_type": "nn", "link_approx": "mc", "n_samples": 3}
MC = {"link_approx": "mc", "n_samples": 3}
GRID = {"method": "gridsearch", "grid_size": 3}


def posterior(model: nn.Module, structure: str = "kron", **kwargs: Any) -> Any:
    return Laplace(model, "classification", "lora", structure, **kwargs)


def fitted(model: nn.Module, structure: str = "kron", **kwargs: Any) -> Any:
    la = posterior(model, structure, **kwargs)
    la.fit([letter_batch(4)])
    return la


def loader() -> list[dict[str, Tensor]]:
    return [letter_batch(3, seed=1), letter_batch(2, seed=2)]


# What works ---------------------------------------------------------------------------------------

USES = {
    "fit": lambda la: la.fit(loader()),
    "fit more": lambda la: la.fit(loader(), override=False),
    "marglik": lambda la: la.optimize_prior_precision(method="marglik", n_steps=2),
    "grid glm": lambda la: la.optimize_prior_precision(val_loader=loader(), **GRID),
    "grid mc": lambda la: la.optimize_prior_precision(val_loader=loader(), **GRID, **MC),
    "grid nn": lambda la: la.optimize_prior_precision(val_loader=loader(), **GRID, **NN),
    "glm": lambda la: la(letter_batch(3)),
    "glm mc": lambda la: la(letter_batch(3), **MC),
    "nn": lambda la: la(letter_batch(3), **NN),
    "samples glm": lambda la: la.predictive_samples(letter_batch(3), n_samples=2),
    "samples nn": lambda la: la.predictive_samples(letter_batch(3), "nn", n_samples=2),
    "functional": lambda la: la.functional_samples(letter_batch(3), n_samples=2),
    "weights": lambda la: la.sample(2),
    "state": lambda la: la.load_state_dict(la.state_dict()),
}
each_use = pytest.mark.parametrize("use", [pytest.param(u, id=name) for name, u in USES.items()])


@each_use
@pytest.mark.parametrize("structure", [*STRUCTURES, "lowrank", "ekfac", "gp"])
def test_use(structure, use):
    model = used_model()
    before = snapshot(model)
    la = fitted(model, structure)
    assert snapshot(model) == before
    use(la)
    assert snapshot(model) == before


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend(backend, structure):
    model = used_model()
    before = snapshot(model)
    la = posterior(model, structure, backend=backend)
    assert snapshot(model) == before
    la.fit(loader())
    assert snapshot(model) == before
    la.optimize_prior_precision(method="marglik", n_steps=2)
    la(letter_batch(2))
    assert snapshot(model) == before


@pytest.mark.parametrize("use", ["fit", "grid glm", "glm", "nn"])
def test_bare_classifier_with_a_trained_head(use):
    model = used_model(classifier=True)
    before = snapshot(model)
    USES[use](fitted(model))
    assert snapshot(model) == before


def test_dropout_is_off_whatever_the_modes():
    la, reference = fitted(used_model()), fitted(letter_head(tiny_llama()))
    torch.testing.assert_close(la(letter_batch(3)), reference(letter_batch(3)))
    torch.testing.assert_close(la.loss, reference.loss)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_use_without_gradients(context):
    model = used_model()
    before = snapshot(model)
    expected = fitted(model)(letter_batch(3))
    with context():
        la = fitted(model)
        la.fit([letter_batch(4)])
        torch.testing.assert_close(la(letter_batch(3)), expected)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    "use", ["fit", "fit more", "marglik", "grid glm", "grid mc", "glm", "state"]
)
def test_global_random_state_is_not_used(use):
    la = fitted(used_model())
    state = torch.get_rng_state()
    USES[use](la)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "use",
    [
        lambda la, g: la(letter_batch(3), **MC, generator=g),
        lambda la, g: la(letter_batch(3), **NN, generator=g),
        lambda la, g: la.sample(3, generator=g),
        lambda la, g: la.predictive_samples(letter_batch(3), "nn", n_samples=2, generator=g),
    ],
    ids=["mc", "nn", "sample", "samples-nn"],
)
def test_a_generator_replaces_the_global_random_state(use):
    la = fitted(used_model())
    state = torch.get_rng_state()
    use(la, torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), state)


# The snapshot -------------------------------------------------------------------------------------


def test_the_snapshot_sees_what_it_should():
    """Else none of the tests above could fail."""
    changes: list[Callable[[nn.Module], Any]] = [
        lambda m: next(m.parameters()).data.mul_(1 + 1e-15),
        lambda m: next(m.parameters()).requires_grad_(not next(m.parameters()).requires_grad),
        lambda m: setattr(next(m.parameters()), "grad", None),
        lambda m: setattr(next(m.parameters()), "grad", next(m.parameters()).grad.clone()),
        lambda m: next(m.parameters()).grad.zero_(),
        lambda m: setattr(next(m.parameters()), "data", next(m.parameters()).data.clone().float()),
        lambda m: next(p for p in m.parameters() if p.requires_grad).register_hook(print),
        lambda m: next(
            p for p in m.parameters() if p.requires_grad
        ).register_post_accumulate_grad_hook(print),
        lambda m: with_no_grad(next(m.parameters()).mul_, 1),  # written to, with its own values
        lambda m: setattr(m.model, "double_one", m.model.double),  # any attribute
        lambda m: m.counter.add_(1),
        lambda m: setattr(m, "counter", m.counter.clone()),
        lambda m: setattr(m, "counter", m.counter.to("meta")),
        lambda m: m.model.eval(),
        lambda m: inner(m).register_forward_hook(lambda *args: None),
        lambda m: inner(m).register_forward_pre_hook(lambda *args: None),
        lambda m: inner(m).register_forward_pre_hook(lambda *args: None, with_kwargs=True),
        lambda m: inner(m).register_full_backward_hook(lambda *args: None),
        lambda m: inner(m).register_full_backward_pre_hook(lambda *args: None),
        lambda m: inner(m)._forward_hooks_with_kwargs.update({7: True}),
        lambda m: inner(m)._forward_hooks_always_called.update({7: True}),
        lambda m: m._forward_hooks.update(dict.fromkeys(m._forward_hooks, print)),  # same handle
        lambda m: inner(m).__dict__.update(_is_full_backward_hook=False),
        lambda m: parametrize.register_parametrization(inner(m), "weight", nn.Identity()),
        lambda m: setattr(inner(m), "forward", print),
        lambda m: setattr(m.model, "fisher", 1),
        lambda m: setattr(m, "output_size", 3),
        lambda m: setattr(m.model.config, "pad_token_id", 7),
        lambda m: m.model.base_model.model.model.layers[0].self_attn.q_proj.scaling.update(
            default=3.0
        ),
        lambda m: m.model.add_adapter("other", m.model.peft_config["default"]),
    ]
    for index, change in enumerate(changes):
        model = used_model()
        before = snapshot(model)
        assert snapshot(model) == before
        change(model)
        assert snapshot(model) != before, index


def inner(model: nn.Module) -> nn.Module:
    """Return a submodule deep inside."""
    return model.model.get_base_model().model.layers[1].mlp.up_proj


def with_no_grad(function: Callable[..., Any], *args: Any) -> None:
    with torch.no_grad():
        function(*args)
