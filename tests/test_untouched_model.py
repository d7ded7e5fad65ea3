"""Using a posterior leaves the model, and an earlier posterior, exactly as they were."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from laplace import Laplace
from laplace.curvature import AsdlGGN, CurvlinopsGGN
from models import frozen, letter_batch, letter_head, snapshot, tiny_bert_classifier, tiny_llama
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torchmetrics import Metric

from laplace_llm import StreamingEF, StreamingGGN

STRUCTURES = ("kron", "diag", "full")
BACKENDS = (StreamingGGN, StreamingEF, CurvlinopsGGN, AsdlGGN)
NN = {"pred_type": "nn", "link_approx": "mc", "n_samples": 3}
MC = {"link_approx": "mc", "n_samples": 3}
GRID = {"method": "gridsearch", "grid_size": 3}


def used_model(classifier: bool = False) -> nn.Module:
    """Return a model in the midst of training: mixed modes, flags, gradients and hooks."""
    if classifier:
        model = tiny_bert_classifier(lora_dropout=0.5)
    else:
        model = letter_head(tiny_llama(lora_dropout=0.5))
    model.train()
    for index, module in enumerate(model.modules()):
        module.training = index % 3 != 0
    for index, parameter in enumerate(model.parameters()):
        if index % 4 == 0:
            parameter.requires_grad_(not parameter.requires_grad)
        if index % 3 == 0:
            parameter.grad = torch.full_like(parameter, float(index + 1))
    model.register_buffer("counter", torch.arange(3))
    model.register_forward_hook(lambda module, args, output: None)
    model.register_forward_pre_hook(lambda module, args: None)
    model.output_size = 17
    return model


def posterior(model: nn.Module, structure: str = "kron", **kwargs: Any) -> Any:
    return Laplace(model, "classification", "lora", structure, **kwargs)


def fitted(model: nn.Module, structure: str = "kron", **kwargs: Any) -> Any:
    la = posterior(model, structure, **kwargs)
    la.fit([letter_batch(4)])
    return la


def loader() -> list[dict[str, Tensor]]:
    return [letter_batch(3, seed=1), letter_batch(2, seed=2)]


def contents(la: Any) -> Any:
    """Return a posterior's state and what it predicts."""
    generator = torch.Generator().manual_seed(0)
    state, prediction = la.state_dict(), la(letter_batch(2, seed=3))
    return frozen({**state, "prediction": prediction, "samples": la.sample(1, generator)})


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


# What breaks in between ---------------------------------------------------------------------------


class Boom(Exception):
    """Raised by no library."""


class Bomb:
    """Raises an error when called for the n-th time, if armed."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error
        self.left: int | None = None

    def __call__(self, *args: Any) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                self.left = None
                raise self.error("bomb")


def with_bombs(error: type[BaseException]) -> tuple[nn.Module, dict[str, Bomb]]:
    """Return a used model that can be made to fail in its forward and backward passes."""
    model = used_model()
    bombs = {"forward": Bomb(error), "backward": Bomb(error)}
    layer = model.model.get_base_model().model.layers[1]
    layer.mlp.register_forward_pre_hook(lambda module, args: bombs["forward"]())

    def plant(module: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: bombs["backward"]())

    layer.mlp.register_forward_hook(plant)
    return model, bombs


each_error = pytest.mark.parametrize("error", [Boom, RuntimeError, KeyboardInterrupt])


@each_error
@pytest.mark.parametrize(("place", "call"), [("forward", 1), ("forward", 2), ("backward", 3)])
@pytest.mark.parametrize("use", ["fit", "fit more", "grid glm", "glm"])
def test_an_error_in_the_model(use, place, call, error):
    model, bombs = with_bombs(error)
    la = fitted(model, prior_precision=3.0)
    before, earlier = snapshot(model), contents(la)
    if use == "glm" and (place, call) == ("forward", 2):
        call = 1  # there is one forward pass only
    if use == "glm" and place == "backward":
        call = 2  # and one backward pass a contrast of the three classes
    bombs[place].left = call
    with pytest.raises(error, match="bomb"):
        USES[use](la)
    assert snapshot(model) == before
    assert contents(la) == earlier
    USES[use](la)
    assert snapshot(model) == before


@each_error
@pytest.mark.parametrize("use", ["nn", "samples nn", "grid nn"])
def test_an_error_under_sampled_weights(use, error):
    model, bombs = with_bombs(error)
    la = fitted(model, prior_precision=3.0)
    before, earlier = snapshot(model), contents(la)
    bombs["forward"].left = 2
    with pytest.raises(error, match="bomb"):
        USES[use](la)
    assert snapshot(model) == before
    assert contents(la) == earlier


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("place", "call"), [("forward", 1), ("forward", 2), ("backward", 1), ("backward", 2)]
)
def test_an_error_inside_any_backend(place, call, backend, structure):
    model, bombs = with_bombs(Boom)
    la = posterior(model, structure, backend=backend)
    before = snapshot(model)
    bombs[place].left = call
    with pytest.raises(Boom):
        la.fit(loader() * 2)
    assert snapshot(model) == before
    la.fit(loader())
    expected = posterior(model, structure, backend=backend)
    expected.fit(loader())
    assert contents(la) == contents(expected)


@each_error
@pytest.mark.parametrize("override", [True, False])
@pytest.mark.parametrize("structure", [*STRUCTURES, "lowrank"])
def test_an_error_in_the_training_loader(structure, override, error):
    def broken() -> Iterator[dict[str, Tensor]]:
        yield letter_batch(3, seed=1)
        raise error("bomb")

    model = used_model()
    la = fitted(model, structure)
    before, earlier = snapshot(model), contents(la)
    with pytest.raises(error, match="bomb"):
        la.fit(broken(), override=override)
    assert snapshot(model) == before
    assert contents(la) == earlier


class BrokenMetric(Metric):
    """Fails in its third update."""

    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.error, self.updates = error, 0

    def update(self, probabilities: Tensor, labels: Tensor) -> None:
        self.updates += 1
        if self.updates == 3:
            raise self.error("bomb")

    def compute(self) -> Tensor:
        return torch.zeros(())


def broken_loss(error: type[BaseException]) -> Callable:
    def loss(probabilities: Tensor, labels: Tensor) -> Tensor:
        raise error("bomb")

    return loss


@each_error
@pytest.mark.parametrize("metric", [BrokenMetric, broken_loss])
@pytest.mark.parametrize("kwargs", [{}, NN], ids=["glm", "nn"])
def test_an_error_in_the_metric(kwargs, metric, error):
    model = used_model()
    la = fitted(model, prior_precision=3.0)
    before, earlier, state = snapshot(model), contents(la), torch.get_rng_state()
    with pytest.raises(error, match="bomb"):
        la.optimize_prior_precision(val_loader=loader(), loss=metric(error), **GRID, **kwargs)
    assert snapshot(model) == before
    assert contents(la) == earlier
    assert torch.equal(torch.get_rng_state(), state)


def test_an_error_in_the_marginal_likelihood(monkeypatch):
    model = used_model()
    la = fitted(model, prior_precision=3.0)
    before, earlier = snapshot(model), contents(la)
    bomb, step = Bomb(KeyboardInterrupt), torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: (bomb(), step(self)))
    bomb.left = 2
    with pytest.raises(KeyboardInterrupt):
        la.optimize_prior_precision(method="marglik", n_steps=5)
    assert snapshot(model) == before
    assert contents(la) == earlier


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
        lambda m: setattr(m.model.config, "use_cache", "changed"),
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
