"""Choosing the prior precision: leave-one-out, evidences, their warning; errors of all methods."""

import warnings

import pytest
import torch
from models import (
    choice_batch,
    chunks,
    letter_head,
    mlp_batch,
    ragged_letters,
    randn,
    scoring_head,
    snapshot,
    tiny_llama,
    tiny_mlp,
)
from test_contract import STRUCTURES
from torch.nn import functional as F

from laplace_llm.errors import DataError, OptionError
from laplace_llm.kernel import training_space
from laplace_llm.links import mean_field, quasi_monte_carlo
from laplace_llm.tuning.leave_one_out import held_out, smoothed_nll

ALL = pytest.mark.parametrize("structure", STRUCTURES)
GRID = {"log_prior_prec_min": -2, "log_prior_prec_max": 3, "grid_size": 11}
INTERVAL = torch.logspace(-2, 3, 11)


class Loader:
    """A list of batches that counts how often it is passed over."""

    def __init__(self, batches, error=None):
        self.batches, self.error, self.passes = batches, error, 0

    def __iter__(self):
        self.passes += 1
        return self._iterate()

    def _iterate(self):
        yield from self.batches
        if self.error is not None:
            raise self.error("broken")


def train():
    return Loader(chunks(mlp_batch(14), 5))


def val():
    """Return what the model is right about but for every fourth, so that it is to be unsure."""
    x, _ = mlp_batch(11, seed=1)
    labels = tiny_mlp()(x).argmax(1)
    labels[::4] = (labels[::4] + 1) % 3
    return Loader(chunks((x, labels), 4))


def fitted(structure="kron", loader=None, likelihood="classification", model=None, **kwargs):
    cls, options = STRUCTURES[structure]
    la = cls(tiny_mlp() if model is None else model, likelihood, **{**options, **kwargs})
    la.prior_precision = 0.7
    la.fit(train() if loader is None else loader)
    return la


def whole(loader):
    return tuple(torch.cat(parts) for parts in zip(*loader.batches, strict=True))


def nll(probabilities, labels):
    return float(-probabilities.gather(1, labels[:, None]).log().mean())


def val_loss(la, loader):
    x, y = whole(loader)
    return nll(la(x), y)


def assert_chosen(la, value):
    torch.testing.assert_close(la.prior_precision, torch.as_tensor([value]).double())


# Leave one out ------------------------------------------------------------------------------------


def loo_choice(la, batches, interval, link=quasi_monte_carlo):
    """Return the value with the lowest loss, each mode and each covariance from scratch."""
    space = training_space(la, batches)
    target = space.log_likelihood(space.trained)
    modes = [space.mode(delta) for delta in interval.tolist()]
    close = [i for i, mode in enumerate(modes) if space.log_likelihood(mode.latent) >= target]
    anchor = max(close, default=0)
    mean = space.leave_one_out(modes[anchor], float(interval[anchor])).mean
    losses = []
    for delta in interval.tolist():
        covariance = space.leave_one_out(modes[anchor], delta).covariance
        if la.likelihood == "regression":
            deviation = (covariance.diagonal(dim1=1, dim2=2) + la.sigma_noise**2).sqrt()
            log_prob = torch.distributions.Normal(mean, deviation).log_prob(space.labels)
            losses.append(-float(log_prob.mean()))
        else:  # of 3 % of the labels, every class is as likely
            logs = link(mean, covariance).log()
            right = logs.gather(1, space.labels[:, None])[:, 0]
            losses.append(-float((0.97 * right + 0.03 * logs.mean(1)).mean()))
    return float(interval[losses.index(min(losses))])


@ALL
def test_leave_one_out_is_the_default(structure):
    loader = train()
    la = fitted(structure, loader)
    fit = loader.passes
    la.optimize_prior_precision(**GRID)
    assert loader.passes == fit + 1
    assert_chosen(la, loo_choice(la, loader.batches, INTERVAL))
    explicit = fitted(structure)
    explicit.optimize_prior_precision(method="loo", **GRID)
    assert torch.equal(explicit.prior_precision, la.prior_precision)


def test_leave_one_out_thins_a_fine_grid():
    la = fitted()
    la.optimize_prior_precision()
    interval = torch.logspace(-4, 4, 100)[::3]
    assert_chosen(la, loo_choice(la, train().batches, interval))


@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
def test_leave_one_out_takes_a_link_and_a_temperature(temperature):
    la = fitted(temperature=temperature)
    la.optimize_prior_precision(link_approx="mean_field", **GRID)
    assert_chosen(la, loo_choice(la, train().batches, INTERVAL, mean_field))


def test_leave_one_out_takes_no_loss():
    loader = train()
    la = fitted(loader=loader)
    with pytest.raises(OptionError, match="no loss for method='loo'"):
        la.optimize_prior_precision(loss=lambda p, y: p.sum())
    assert loader.passes == 1
    assert_chosen(la, 0.7)


@pytest.mark.parametrize("structure", ["kron", "lowrank, B"])
def test_leave_one_out_in_regression(structure):
    x, y = mlp_batch(14, regression=True)
    la = fitted(structure, [(x, y)], "regression", sigma_noise=0.5)
    la.optimize_prior_precision(**GRID)
    assert_chosen(la, loo_choice(la, [(x, y)], INTERVAL))


def learnt_or_not(seed, labels):
    """Return a model trained to a loss of 0.02 on labels that follow a rule, or on random ones."""
    model = tiny_mlp(hidden=64, rank=4, init_lora_weights=True, seed=seed)
    rule = randn(4, 3, seed=5)
    x = randn(100, 4, seed=seed + 10)
    y = (x @ rule).argmax(1) if labels == "rule" else mlp_batch(100, seed=seed)[1]
    weights = [p for name, p in model.named_parameters() if "lora_B" in name]
    optimizer = torch.optim.Adam(weights, lr=0.05)
    loss = torch.inf
    while loss > 0.02:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    test_x = randn(400, 4, seed=seed + 100)
    test_y = (test_x @ rule).argmax(1) if labels == "rule" else mlp_batch(400, seed=seed + 1)[1]
    return model, (x, y), (test_x, test_y)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_leave_one_out_tells_a_learnt_task_from_random_labels(seed):
    chosen = {}
    for labels in ("rule", "random"):
        model, batch, (x, y) = learnt_or_not(seed, labels)
        la = fitted(model=model, loader=[batch])
        la.optimize_prior_precision()
        chosen[labels] = float(la.prior_precision)
        plain = nll(torch.softmax(model(x), -1).detach(), y)
        assert nll(la(x), y) < (0.5 if labels == "rule" else 1.3)
        assert labels == "rule" or plain > 3
    # Smoothed labels keep it from being as sure as it might be: 100 examples cannot tell.
    assert chosen["rule"] > 0.5
    assert chosen["rule"] > 20 * chosen["random"]


# Where the training data are ----------------------------------------------------------------------


def test_training_data_may_be_given():
    la, other = fitted(), Loader(chunks(mlp_batch(14, seed=9), 5))
    la.optimize_prior_precision(train_loader=other, **GRID)
    assert other.passes == 1
    assert_chosen(la, loo_choice(la, other.batches, INTERVAL))


def loaded():
    la = fitted()
    la.load_state_dict(fitted().state_dict())
    return la


def after_an_iterator(loader, override=False):
    la = fitted(loader=iter(train()))
    la.fit(loader, override=override)
    return la


INCOMPLETE = {
    "an iterator": lambda: fitted(loader=iter(train())),
    "a generator": lambda: fitted(loader=(batch for batch in train())),
    "a loaded state": loaded,
    "an iterator and a list": lambda: after_an_iterator(train()),
    "a list and an iterator": lambda: (la := fitted()).fit(iter(train()), override=False) or la,
    "a loaded state and a list": lambda: (la := loaded()).fit(train(), override=False) or la,
}


@pytest.mark.parametrize("build", INCOMPLETE.values(), ids=INCOMPLETE)
@pytest.mark.parametrize("options", [{}, {"method": "marglik", "evidence": "linear_mode"}])
def test_training_data_that_are_gone_must_be_given(build, options):
    la = build()
    with pytest.raises(DataError, match="train_loader"):
        la.optimize_prior_precision(**options, **GRID)
    assert_chosen(la, 0.7)
    la.optimize_prior_precision(**options, train_loader=train(), **GRID)
    expected = fitted()
    expected.optimize_prior_precision(**options, **GRID)
    assert torch.equal(la.prior_precision, expected.prior_precision)


def test_data_of_all_fits_are_used():
    first, second = Loader(chunks(mlp_batch(8), 3)), Loader([mlp_batch(6, seed=4)])
    la = fitted(loader=first)
    la.fit(second, override=False)
    la.optimize_prior_precision(**GRID)
    assert (first.passes, second.passes) == (2, 2)
    both = [*first.batches, *second.batches]
    assert_chosen(la, loo_choice(la, both, INTERVAL))
    la.fit(second)  # anew
    la.optimize_prior_precision(**GRID)
    assert (first.passes, second.passes) == (2, 4)
    afresh = after_an_iterator(train(), override=True)
    afresh.optimize_prior_precision(**GRID)


def test_fit_passes_over_a_loader_once():
    """Asking a DataLoader for an iterator starts its workers and draws a random number."""
    loader = train()
    fitted(loader=loader)
    assert loader.passes == 1


# Which method, and what it leaves -----------------------------------------------------------------


def test_a_validation_set_makes_it_a_grid_search():
    loader = train()
    la = fitted(loader=loader)
    la.optimize_prior_precision(val_loader=val(), **GRID)
    assert loader.passes == 1
    losses = []
    other = fitted()
    for value in INTERVAL:
        other.prior_precision = value
        losses.append(val_loss(other, val()))
    assert_chosen(la, INTERVAL[losses.index(min(losses))])


def test_leave_one_out_is_of_a_scalar():
    loader = train()
    la = fitted(loader=loader)
    with pytest.raises(OptionError, match="prior_structure='scalar' for method='loo'"):
        la.optimize_prior_precision(prior_structure="layerwise")
    assert loader.passes == 1


METHODS = {
    "loo": lambda la, loader: la.optimize_prior_precision(train_loader=loader),
    "linear mode": lambda la, loader: la.optimize_prior_precision(
        method="marglik", evidence="linear_mode", train_loader=loader
    ),
    "gridsearch": lambda la, loader: la.optimize_prior_precision(
        method="gridsearch", val_loader=loader, grid_size=3
    ),
    "val_grad": lambda la, loader: la.optimize_prior_precision(
        method="val_grad", val_loader=loader
    ),
    "layerwise": lambda la, loader: la.optimize_prior_precision(
        method="val_grad", val_loader=loader, prior_structure="layerwise"
    ),
}
EACH_METHOD = pytest.mark.parametrize("act", METHODS.values(), ids=METHODS)


@EACH_METHOD
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_the_loader_changes_nothing(act, error):
    la = fitted(model=tiny_mlp(lora_dropout=0.5).train())
    la.prior_precision = torch.tensor([0.1, 0.2, 0.3, 0.4])
    before, model = la.prior_precision, snapshot(la.model)
    with pytest.raises(error, match="broken"):
        act(la, Loader(train().batches, error))
    assert torch.equal(la.prior_precision, before)
    assert snapshot(la.model) == model


@EACH_METHOD
def test_tuning_leaves_the_model_alone(act):
    la = fitted(model=tiny_mlp(lora_dropout=0.5).train())
    model = snapshot(la.model)
    act(la, train())
    assert snapshot(la.model) == model
    assert not la.prior_precision.requires_grad
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        la(mlp_batch(3)[0])


@pytest.mark.parametrize("stage", ["sample", "moments"])
def test_an_error_after_marglik_changes_nothing(stage, monkeypatch):
    la = fitted()
    model = snapshot(la.model)

    def broken(*args, **kwargs):
        raise KeyboardInterrupt

    name = "_warn_if_unsure" if stage == "sample" else "_glm_predictive_distribution"
    monkeypatch.setattr(la, name, broken)
    with pytest.raises(KeyboardInterrupt):
        la.optimize_prior_precision(method="marglik", n_steps=2)
    assert_chosen(la, 0.7)
    assert snapshot(la.model) == model


# Different numbers of choices ---------------------------------------------------------------------


def of_sizes(*sizes):
    """Return batches of scored choices, each of so many a question."""
    return [choice_batch(3, size, seed=index) for index, size in enumerate(sizes)]


@pytest.mark.parametrize(
    "act",
    [*METHODS.values(), lambda la, loader: la.fit(loader)],
    ids=[*METHODS, "fit"],
)
def test_batches_of_different_sizes_are_refused_by_number(act):
    la = fitted(model=scoring_head(tiny_llama(targets=("v_proj",))), loader=of_sizes(3))
    model = snapshot(la.model)
    with pytest.raises(DataError, match=r"2 after 3.*n_choices=3 or more.*in batch 2"):
        act(la, of_sizes(3, 3, 2))
    assert_chosen(la, 0.7)
    assert snapshot(la.model) == model


def test_sampled_weights_check_the_sizes_of_batches_and_labels_too():
    la = fitted(model=letter_head(classes=4), loader=[ragged_letters(5)])
    options = {"pred_type": "nn", "link_approx": "mc", "n_samples": 2, "grid_size": 2}
    la.optimize_prior_precision(val_loader=[ragged_letters(5)], **options)
    bad = ragged_letters(5)
    bad["labels"][0] = 3  # the first row has two choices
    with pytest.raises(DataError, match=r"row 0 has label 3.*in batch 1"):
        la.optimize_prior_precision(val_loader=[ragged_letters(5), bad], **options)
    la = fitted(model=scoring_head(tiny_llama(targets=("v_proj",))), loader=of_sizes(3))
    with pytest.raises(DataError, match=r"2 after 3.*in batch 1"):
        la.optimize_prior_precision(val_loader=of_sizes(3, 2), **options)


def test_later_fits_need_as_many_choices():
    la = fitted(model=scoring_head(tiny_llama(targets=("v_proj",))), loader=of_sizes(3))
    with pytest.raises(DataError, match=r"4 after 3.*n_choices=4 or more.*in batch 0"):
        la.fit(of_sizes(4), override=False)
    la.fit(of_sizes(4))
    assert la.n_outputs == 4


@pytest.mark.parametrize("link", ["qmc", "mean_field"])
def test_leave_one_out_smooths_over_the_choices_that_a_row_has(link):
    la = fitted(model=letter_head(classes=4), loader=[ragged_letters(9)])
    la.optimize_prior_precision(link_approx=link, **GRID)
    space = training_space(la, [ragged_letters(9)])
    moments = held_out(space, INTERVAL)
    losses = []
    for index in range(len(INTERVAL)):
        loss = 0.0
        for mean, covariance, label, here in zip(
            *moments.at(index), space.labels, space.present, strict=True
        ):
            block = mean[here][None], covariance[here][:, here][None]
            logs = {"qmc": quasi_monte_carlo, "mean_field": mean_field}[link](*block)[0].log()
            loss -= float(0.97 * logs[label] + 0.03 * logs.mean())
        losses.append(loss)
    assert_chosen(la, INTERVAL[losses.index(min(losses))])


def test_smoothing():
    p = torch.tensor([[0.5, 0.3, 0.2], [0.9, 0.1, 0.0]]).double()
    labels, present = torch.tensor([2, 0]), torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    rows = [
        0.97 * p[0, 2].log() + 0.03 * p[0].log().mean(),
        0.97 * p[1, 0].log() + 0.03 * p[1, :2].log().mean(),
    ]
    torch.testing.assert_close(smoothed_nll(p, labels, present), -sum(rows) / 2)
    expected = F.cross_entropy(p[:1].log(), labels[:1], label_smoothing=0.03)
    torch.testing.assert_close(smoothed_nll(p[:1], labels[:1]), expected)


@pytest.mark.parametrize("act", METHODS.values(), ids=METHODS)
def test_every_method_takes_rows_of_different_sizes(act):
    la = fitted(model=letter_head(classes=4), loader=chunks(ragged_letters(9), 4))
    act(la, chunks(ragged_letters(9, seed=1), 4))
    assert la.prior_precision.isfinite().all()
    assert (la.prior_precision > 0).all()
    probabilities = la(ragged_letters(9))
    assert torch.equal(probabilities > 0, ragged_letters(9)["choice_present"])
