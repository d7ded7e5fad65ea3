"""Moments of the linearised predictive: how many passes they take, and what they leave out."""

import pytest
import torch
from models import HEADS, inputs_of, letter_batch, letter_head, mlp_batch, tiny_mlp
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from laplace_llm import KronLoraLaplace, StreamingGGN
from laplace_llm.contrasts import choice_contrasts
from laplace_llm.links import mean_field, quasi_monte_carlo
from laplace_llm.structures import STRUCTURES
from laplace_llm.taps import Taps

EXACT = {"rtol": 1e-8, "atol": 1e-10}
VALUES = torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64)


@pytest.fixture
def backwards(monkeypatch):
    """Return a list that grows with every backward pass of taps."""
    calls, backward = [], Taps.backward

    def counted(self, *args, **kwargs):
        calls.append(1)
        return backward(self, *args, **kwargs)

    monkeypatch.setattr(Taps, "backward", counted)
    return calls


def fitted(cls=KronLoraLaplace, head="letters", **kwargs):
    model, make_batch = HEADS[head]()
    batch = make_batch(5)
    la = cls(model, "classification", **kwargs)
    la.fit([batch])
    return la, inputs_of(make_batch(4, seed=1))


@pytest.mark.parametrize("cls", STRUCTURES)
@pytest.mark.parametrize("head", ["letters", "scored", "ragged scored"])
def test_centred_moments_are_those_of_the_logits_less_their_mean(cls, head):
    la, x = fitted(cls, head)
    whole, centred = la.moments_grid(x, VALUES), la.moments_grid(x, VALUES, centred=True)
    here = whole.mean.isfinite().double()
    shares = here / here.sum(1, keepdim=True)
    centring = torch.diag_embed(here) - here[:, :, None] * shares[:, None]
    torch.testing.assert_close(centred.mean, whole.mean, **EXACT)
    torch.testing.assert_close(centred.covariance, centring @ whole.covariance @ centring, **EXACT)


@pytest.mark.parametrize("cls", STRUCTURES)
@pytest.mark.parametrize(("name", "link"), [("qmc", quasi_monte_carlo), ("mean_field", mean_field)])
def test_links_of_differences_predict_the_same_from_the_contrasts(cls, name, link):
    la, x = fitted(cls)
    expected = link(*la._glm_predictive_distribution(x))
    torch.testing.assert_close(la(x, link_approx=name), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({}, 2),
        ({"link_approx": "mean_field"}, 2),
        ({"link_approx": "probit"}, 3),
        ({"link_approx": "mc"}, 3),
        ({"diagonal_output": True}, 3),
    ],
)
def test_backward_passes_of_a_prediction(options, passes, backwards):
    la, x = fitted()
    backwards.clear()
    la(x, **options)
    assert len(backwards) == passes


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("stochastic", [False, True])
def test_backward_passes_of_a_fit(classes, stochastic, backwards):
    la = KronLoraLaplace(
        letter_head(classes=classes), "classification", backend_kwargs={"stochastic": stochastic}
    )
    la.fit([letter_batch(5, classes=classes)])
    assert len(backwards) == (1 if stochastic else classes - 1)


def test_two_choices_take_one_backward_pass_each(backwards):
    la = KronLoraLaplace(letter_head(classes=2), "classification")
    batch = letter_batch(5, classes=2)
    la.fit([batch])
    la(inputs_of(batch))
    assert len(backwards) == 2


@pytest.mark.parametrize("link", ["qmc", "mean_field", "probit"])
def test_tuning_passes_over_the_data_once(link, backwards):
    la, _ = fitted()
    batches = [letter_batch(4, seed=2), letter_batch(3, seed=3)]
    passes = 2 * (3 if link == "probit" else 2)
    backwards.clear()
    la.optimize_prior_precision(val_loader=batches, link_approx=link, grid_size=7)
    assert len(backwards) == passes
    backwards.clear()
    la.optimize_prior_precision(method="val_grad", val_loader=batches, link_approx=link, n_steps=3)
    assert len(backwards) == passes


@pytest.mark.parametrize("link", ["qmc", "mean_field", "probit"])
def test_the_grid_search_chooses_what_separate_passes_choose(link):
    la, _ = fitted()
    batches = [letter_batch(6, seed=2), letter_batch(3, seed=3)]
    labels = torch.cat([batch["labels"] for batch in batches])
    losses = []
    interval = torch.logspace(-4, 4, 25)
    for value in interval:
        la.prior_precision = value
        probabilities = torch.cat([la(inputs_of(batch), link_approx=link) for batch in batches])
        losses.append(torch.nn.functional.nll_loss(probabilities.log(), labels))
    la.prior_precision = 1.0
    la.optimize_prior_precision(val_loader=batches, link_approx=link, grid_size=25)
    assert la.prior_precision.item() == pytest.approx(interval[int(torch.stack(losses).argmin())])


def test_regression_needs_all_outputs(backwards):
    la = KronLoraLaplace(tiny_mlp(outputs=2), "regression")
    x, y = mlp_batch(5, outputs=2, regression=True)
    la.fit([(x, y)])
    backwards.clear()
    la(x)
    assert len(backwards) == 2


def test_a_single_output_is_not_centred():
    la = KronLoraLaplace(tiny_mlp(outputs=1), "classification")
    x, _ = mlp_batch(5, outputs=1, regression=True)
    la.fit([(x, torch.zeros(5, dtype=torch.long))])
    torch.testing.assert_close(la(x), torch.ones(5, 1).double())


@pytest.mark.parametrize("head", ["letters", "ragged letters", "mlp"])
def test_centred_jacobians_are_those_of_the_contrasts(head):
    model, make_batch = HEADS[head]()
    x = inputs_of(make_batch(5))
    backend = StreamingGGN(model, "classification")
    whole, outputs = backend.jacobian_blocks(x)
    some, same = backend.jacobian_blocks(x, centred=True)
    assert torch.equal(outputs, same)
    basis = choice_contrasts(outputs.isfinite(), outputs)
    for block, expected in zip(some, whole, strict=True):
        torch.testing.assert_close(block, basis.mT @ expected, **EXACT)


class Shapes(TorchDispatchMode):
    """Keeps the shapes of all results."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.seen += [t.shape for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        return result


@pytest.mark.parametrize("rank", [2, None])
def test_no_square_of_a_wide_side_is_ever_made(rank):
    width = 160  # of the hidden layer; the base weights are 4 x 160 and 160 x 3
    model, (x, y) = tiny_mlp(hidden=width), mlp_batch(6)
    with Shapes() as shapes:
        la = KronLoraLaplace(model, "classification", backend_kwargs={"rank": rank})
        la.fit([(x, y)])
        la.fit([(x, y)], override=False)
        la.optimize_prior_precision()
        la.optimize_prior_precision(val_loader=[(x, y)])
        la.optimize_prior_precision(method="marglik", n_steps=2)
        la(x)
        la(x, link_approx="probit")
        la.sample(2)
        la.load_state_dict(la.state_dict())
    assert any(max(shape[-2:], default=0) >= width for shape in shapes.seen)
    squares = [shape for shape in shapes.seen if len(shape) > 1 and min(shape[-2:]) >= width]
    assert not squares
