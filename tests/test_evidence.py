"""The evidence of the linear model, and the warning of what the usual one takes away."""

import re

import pytest
import torch
from models import chunks, letter_head, mlp_batch, ragged_letters
from test_tuning import (
    ALL,
    GRID,
    INTERVAL,
    Loader,
    assert_chosen,
    fitted,
    learnt_or_not,
    train,
    val,
)

from laplace_llm.kernel import training_space
from laplace_llm.tuning.evidence import warn_if_unsure

pytestmark = pytest.mark.filterwarnings("error:The marginal likelihood chose:UserWarning")


@ALL
def test_evidence_of_the_linear_model(structure):
    la = fitted(structure)
    la.optimize_prior_precision(method="marglik", evidence="linear_mode", **GRID)
    space = training_space(la, train().batches)
    values = torch.stack([space.log_evidence(delta)[0] for delta in INTERVAL.tolist()])
    assert_chosen(la, INTERVAL[int(values.argmax())])


def confident(**kwargs):
    """Return a posterior over a trained model, and its loader of 20 examples a batch."""
    model, batch, _ = learnt_or_not(0, "random")
    loader = Loader(chunks(batch, 20))
    return fitted(model=model, loader=loader, **kwargs), loader


def confidence(probabilities):
    return float(probabilities.detach().amax(1).mean())


@pytest.mark.parametrize("enable_backprop", [False, True])
def test_marglik_warns_once_of_lost_confidence(enable_backprop):
    la, loader = confident(enable_backprop=enable_backprop)
    with pytest.warns(UserWarning, match="mean confidence.*method='loo'") as caught:
        la.optimize_prior_precision(method="marglik")
    assert len(caught) == 1
    assert caught[0].filename == __file__
    x = torch.cat([x for x, _ in loader.batches[:2]])  # as many batches as hold 32 examples
    before, after = confidence(torch.softmax(la.model(x), -1)), confidence(la(x))
    assert before - after > 0.2
    pattern = r"chose the prior precision (\S+), under .* from (\S+) to (\S+):"
    numbers = re.search(pattern, str(caught[0].message)).groups()
    expected = [float(la.prior_precision), before, after]
    assert [float(number) for number in numbers] == pytest.approx(expected, abs=0.0051)
    la.optimize_prior_precision(method="marglik")  # again: an error if it warned


def test_marglik_does_not_warn_where_confidence_is_kept():
    la, loader = confident()
    x, _ = loader.batches[0]
    la.optimize_prior_precision(method="marglik", init_prior_prec=1e3, n_steps=5)
    assert confidence(torch.softmax(la.model(x), -1)) - confidence(la(x)) < 0.2


def test_no_other_method_warns():
    la, _ = confident()
    la.optimize_prior_precision(**GRID)
    la.optimize_prior_precision(method="marglik", evidence="linear_mode", **GRID)
    one = {"log_prior_prec_min": -4, "log_prior_prec_max": -4, "grid_size": 1}
    la.optimize_prior_precision(val_loader=val(), **one)


def test_marglik_never_warns_of_regression():
    x, y = mlp_batch(12, regression=True)
    la = fitted(loader=[(x, 100 * y)], likelihood="regression")
    la.optimize_prior_precision(method="marglik", n_steps=5)


def test_marglik_does_not_warn_without_examples():
    la, _ = confident()
    la.load_state_dict(la.state_dict())
    la.optimize_prior_precision(method="marglik", n_steps=20)


def test_the_warning_counts_the_choices_that_rows_have(monkeypatch):
    la = fitted(model=letter_head(classes=4), loader=[ragged_letters(9)])
    batch = ragged_letters(9)
    monkeypatch.setattr("laplace_llm.tuning.evidence.CONFIDENCE_LOSS", -1.0)
    with pytest.warns(UserWarning, match="mean confidence") as caught:
        assert warn_if_unsure(la, [batch])
    expected = confidence(torch.softmax(la.model(batch), -1)), confidence(la(batch))
    numbers = re.search(r"from (\S+) to (\S+):", str(caught[0].message)).groups()
    assert [float(number) for number in numbers] == pytest.approx(expected, abs=0.0051)
