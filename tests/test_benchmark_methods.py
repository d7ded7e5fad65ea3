"""The calibration benchmark's methods on a tiny model, and each against its definition."""

from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from laplace import Laplace
from models import chunks, frozen, letter_batch, letter_head, scoring_head, snapshot, tiny_llama
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from laplace_llm.adapters import find_lora_tensors
from laplace_llm.benchmark.calibration import methods  # noqa: F401 (registers them)
from laplace_llm.benchmark.calibration.conformal import conformal_sets
from laplace_llm.benchmark.calibration.features import LinearHead, labelled_features
from laplace_llm.benchmark.calibration.linear import Standardize, seeded
from laplace_llm.benchmark.calibration.method import Method, NotApplicable, missing, registered
from laplace_llm.benchmark.calibration.methods.evidential import Evidential, evidential_loss
from laplace_llm.benchmark.calibration.methods.last_layer_laplace import METHODS as LAPLACE
from laplace_llm.benchmark.calibration.methods.last_layer_laplace import negative_log_likelihood
from laplace_llm.benchmark.calibration.methods.last_layer_sampling import (
    LastLayerDropout,
    LastLayerEnsemble,
    LastLayerSWAG,
)
from laplace_llm.benchmark.calibration.methods.lora import (
    IVON,
    CheckpointEnsemble,
    DeepEnsemble,
    LoraDropout,
    LoraSWAG,
    lora_weights,
)
from laplace_llm.benchmark.calibration.methods.random_features import (
    RandomFeatureGP,
    covariance_factors,
    map_weights,
)
from laplace_llm.benchmark.calibration.methods.vbll import VBLL, DiagonalVBLL, LowRankVBLL
from laplace_llm.benchmark.calibration.problem import Problem
from laplace_llm.benchmark.calibration.swag import SwagMoments

LAST_LAYER = [
    *LAPLACE,
    LowRankVBLL,
    DiagonalVBLL,
    RandomFeatureGP,
    LastLayerSWAG,
    LastLayerDropout,
    LastLayerEnsemble,
    Evidential,
]
OVER_LORA = [CheckpointEnsemble, DeepEnsemble, LoraSWAG, IVON, LoraDropout]
OURS = [*LAST_LAYER, *OVER_LORA]
# Their noise is drawn for a whole batch, so that another split draws other noise.
DRAWN_BY_BATCH = (VBLL, LoraDropout)
SAMPLED = (LastLayerSWAG, LastLayerDropout, LastLayerEnsemble, *OVER_LORA)

SMALL: dict[type[Method], dict[str, Any]] = {
    LastLayerSWAG: {"epochs": 4, "n_samples": 5},
    LastLayerDropout: {"epochs": 2, "n_samples": 5},
    LastLayerEnsemble: {"epochs": 2, "n_members": 3},
    Evidential: {"epochs": 12},
    LowRankVBLL: {"epochs": 3},
    DiagonalVBLL: {"epochs": 3},
    RandomFeatureGP: {"n_features": 32, "grid": (0.1, 1.0)},
    LoraSWAG: {"n_samples": 3},
    IVON: {"n_samples": 3},
    LoraDropout: {"n_samples": 3},
}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the methods cheap."""
    for method, options in SMALL.items():
        for name, value in options.items():
            monkeypatch.setattr(method, name, value)


def trainer(batches: list[Any], dtype: torch.dtype, epochs: int = 3) -> Callable[..., nn.Module]:
    """Return a `train_adapter` that trains a tiny one."""

    def train_adapter(
        seed: int, dropout: float = 0.0, optimizer: Any = None, on_step: Any = None
    ) -> nn.Module:
        head = letter_head(tiny_llama(dtype, lora_dropout=dropout))
        weights = [tensor.weight for tensor in find_lora_tensors(head)]
        with seeded(seed, torch.device("cpu")):
            for weight in weights:
                nn.init.normal_(weight, std=0.1)
            make = optimizer or (lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr))
            steps = make(weights, 0.01)
            sampled = getattr(steps, "sampled_params", lambda train: nullcontext())
            head.train()
            for step in range(epochs * len(batches)):
                batch = batches[step % len(batches)]
                with sampled(train=True):
                    steps.zero_grad()
                    F.cross_entropy(head(batch), batch["labels"]).backward()
                steps.step()
                if on_step is not None:
                    on_step(head, step + 1, epochs * len(batches))
        return head.eval()

    return train_adapter


def problem_of(
    head: nn.Module | None = None, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Problem:
    train = chunks(letter_batch(20, seed=1), 8)
    head = letter_head(tiny_llama(dtype)) if head is None else head
    adapter = lora_weights(head)
    return Problem(
        task="tiny",
        seed=seed,
        head=head,
        n_classes=3,
        train=train,
        val=chunks(letter_batch(12, seed=2), 8),
        train_adapter=trainer(train, dtype),
        checkpoints=[{k: w * scale for k, w in adapter.items()} for scale in (0.5, 0.8, 1.0)],
    )


def fitted(method: type[Method], problem: Problem) -> Any:
    for module in method.requires:
        pytest.importorskip(module)
    instance = method()
    instance.fit(problem)
    return instance


def averaged(probs: Tensor) -> Tensor:
    return probs.mean(0) if probs.ndim == 3 else probs


# All methods --------------------------------------------------------------------------------------


def test_all_are_registered_under_their_names():
    assert all(registered()[method.name] is method for method in OURS)
    assert {"diag", "kron", "full", "gp"} == {method.structure for method in LAPLACE}
    assert {m.name for m in OURS if not m.single_model} == {
        "deep ensemble",
        "SWAG over LoRA",
        "IVON",
        "MC dropout over LoRA",
    }
    assert {m.name for m in OURS if m.tuned} == {
        *(m.name for m in LAPLACE if m.rule == "gridsearch"),
        "random-feature GP (SNGP head)",
        "VBLL low-rank",
        "VBLL diagonal",
    }


def test_a_missing_package_is_named_with_its_install_line():
    assert missing(IVON, lambda module: None) == [("ivon", "ivon-opt>=0.1.3")]
    assert missing(LowRankVBLL, lambda module: None) == [("vbll", "vbll>=0.4.9")]


@pytest.mark.parametrize("method", OURS, ids=lambda method: method.name)
def test_predicts_probabilities_and_leaves_the_model_alone(method):
    problem = problem_of()
    problem.head.model.register_forward_hook(lambda module, args, output: None)
    for index, parameter in enumerate(problem.head.parameters()):
        parameter.grad = torch.full_like(parameter, index) if index % 3 == 0 else None
    batch = letter_batch(6, seed=3)
    before = snapshot(problem.head)
    random_state = torch.get_rng_state()
    checkpoints = frozen(problem.checkpoints)
    fit = fitted(method, problem)
    probs = fit.predict(batch)

    assert probs.shape[-2:] == (6, 3)
    assert (probs.ndim == 3) == issubclass(method, SAMPLED)
    assert probs.isfinite().all()
    assert (probs >= 0).all()
    torch.testing.assert_close(probs.sum(-1), torch.ones_like(probs[..., 0]))
    assert not probs.requires_grad
    assert snapshot(problem.head) == before
    assert frozen(problem.checkpoints) == checkpoints
    assert torch.equal(torch.get_rng_state(), random_state)
    assert fit.extra_parameters > 0
    if method.group == "last layer":
        assert fit.forward_passes == 1
    else:
        assert fit.forward_passes == 3


@pytest.mark.parametrize("method", OURS, ids=lambda method: method.name)
def test_is_deterministic_given_the_seed(method):
    batch = letter_batch(6, seed=3)
    first = fitted(method, problem_of())
    torch.manual_seed(123)
    second = fitted(method, problem_of())
    expected = first.predict(batch)
    assert torch.equal(first.predict(batch), expected)
    assert torch.equal(second.predict(batch), expected)
    draws = not issubclass(method, (*LAPLACE, Evidential, CheckpointEnsemble))
    if draws:
        other = fitted(method, problem_of(seed=1)).predict(batch)
        assert not torch.allclose(other, expected, atol=1e-6)


@pytest.mark.parametrize(
    "method",
    [method for method in OURS if not issubclass(method, DRAWN_BY_BATCH)],
    ids=lambda method: method.name,
)
def test_batches_may_be_cut_anywhere(method):
    # In double precision: laplace-torch's functional posterior subtracts large numbers.
    fit = fitted(method, problem_of(dtype=torch.float64))
    batch = letter_batch(6, seed=3)
    parts = torch.cat([fit.predict(part) for part in chunks(batch, 4)], -2)
    torch.testing.assert_close(parts, fit.predict(batch), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", LAST_LAYER, ids=lambda method: method.name)
def test_last_layer_methods_say_why_they_do_not_apply(method):
    for module in method.requires:
        pytest.importorskip(module)
    problem = problem_of()
    problem.head = scoring_head()
    with pytest.raises(NotApplicable, match="ChoiceScoringHead does not end in a linear layer"):
        method().fit(problem)


def test_over_lora_methods_run_on_scored_choices():
    head = scoring_head(tiny_llama(torch.float32))
    problem = problem_of(head)
    assert fitted(CheckpointEnsemble, problem)._head is head


# The last layer -----------------------------------------------------------------------------------


def test_linear_head_gives_the_heads_logits_and_copies_no_language_model():
    head = letter_head()
    head._causal.config.final_logit_softcapping = 0.7
    problem = problem_of(head)
    features, _ = problem.features("val")
    linear = LinearHead(head)
    with torch.no_grad():
        expected = torch.cat([head(batch) for batch in problem.val])
        torch.testing.assert_close(linear(features), expected)
    assert linear.layer.weight is not head.choice_layer.weight
    assert [name for name, _ in linear.named_parameters()] == ["layer.weight"]


@pytest.mark.parametrize("rule", ["marglik", "gridsearch"])
@pytest.mark.parametrize("structure", ["diag", "kron", "full"])
@pytest.mark.filterwarnings("ignore:By default `link_approx` is `probit`")
def test_laplace_on_features_is_laplace_torch_on_the_head(structure, rule):
    problem = problem_of(dtype=torch.float64)
    method = next(m for m in LAPLACE if (m.structure, m.rule) == (structure, rule))
    method = type("SameBatches", (method,), {"batch_size": 8})
    fit = fitted(method, problem)
    peer: Any = Laplace(problem.head, "classification", "last_layer", structure)
    peer.fit(loader(problem.train))
    val = loader(problem.val) if rule == "gridsearch" else None
    # The parent's own metric adds up over the grid: its last value wins on most tasks.
    peer.optimize_prior_precision(method=rule, val_loader=val, loss=negative_log_likelihood)

    torch.testing.assert_close(fit.prior_precision.double(), peer.prior_precision.double())
    batch = letter_batch(6, seed=3)
    torch.testing.assert_close(fit.predict(batch), peer(batch), atol=1e-7, rtol=1e-5)


def loader(batches: list[Any]) -> DataLoader:
    rows = [{k: v[i] for k, v in b.items()} for b in batches for i in range(len(b["labels"]))]
    return DataLoader(rows, batch_size=8)


def test_full_laplace_says_that_it_is_too_large():
    method = next(m for m in LAPLACE if m.structure == "full")
    method = type("Little", (method,), {"max_size_cpu": 47})
    with pytest.raises(NotApplicable, match="full Hessian of 48 weights"):
        method().fit(problem_of())


def test_functional_laplace_takes_a_subset_where_the_kernel_is_large():
    method = next(m for m in LAPLACE if m.structure == "gp")
    method = type("Little", (method,), {"max_gp_size": 30})
    fit = fitted(method, problem_of())
    assert fit._la.n_subset == 10
    assert fit.extra_parameters == 10 * (10 * 3 + 16)


@pytest.mark.parametrize("method", [LowRankVBLL, DiagonalVBLL], ids=lambda method: method.name)
def test_vbll_predicts_what_its_package_does(method):
    problem = problem_of()
    fit = fitted(method, problem)
    batch = letter_batch(6, seed=3)
    features = problem.batch_features(batch)
    with seeded(problem.seed, torch.device("cpu")), torch.no_grad():
        expected = fit._layer.predictive(features, n_samples=fit.n_samples)
    torch.testing.assert_close(fit.predict(batch), expected)


def test_vbll_training_lowers_its_own_loss(monkeypatch):
    problem = problem_of()
    x, y = labelled_features(problem, "train")
    losses = []
    for epochs in (0, 30):
        monkeypatch.setattr(DiagonalVBLL, "epochs", epochs)
        fit = fitted(DiagonalVBLL, problem)
        losses.append(fit._layer(x).train_loss_fn(y).item())
    assert losses[1] < losses[0] - 0.1


def test_vbll_keeps_the_epoch_that_validates_best(monkeypatch):
    problem = problem_of()
    x, y = labelled_features(problem, "val")
    nlls = []
    for epochs in range(0, 40, 5):
        monkeypatch.setattr(LowRankVBLL, "epochs", epochs)
        fit = fitted(LowRankVBLL, problem)
        nlls.append(F.nll_loss(fit.predict_features(x).log(), y).item())
    # The same training, for longer: it cannot validate worse, and does better at first.
    assert nlls[1:] == sorted(nlls[1:], reverse=True)
    assert nlls[-1] < nlls[1]
    assert int(fit.note.split()[1]) <= 35


def test_random_feature_posterior_is_the_brute_force_one():
    fit = fitted(RandomFeatureGP, problem := problem_of())
    features, labels = labelled_features(problem, "train")
    phi = fit.random_features(features)
    probs = torch.softmax(phi @ fit._weights, -1)
    for k in range(3):
        precision = fit.precision * torch.eye(32, dtype=torch.float64)
        for row, p in zip(phi, probs[:, k], strict=True):
            precision += p * (1 - p) * torch.outer(row, row)
        factor = covariance_factors(phi, probs, fit.precision)[k]
        torch.testing.assert_close(factor @ factor.mT, precision)
        torch.testing.assert_close(fit._factors[k], factor, atol=1e-6, rtol=1e-6)

    batch = letter_batch(6, seed=3)
    star = fit.random_features(problem.batch_features(batch))
    logits = torch.empty(6, 3, dtype=torch.float64)
    for n, row in enumerate(star):
        for k in range(3):
            covariance = torch.linalg.inv(fit._factors[k] @ fit._factors[k].mT)
            variance = row @ covariance @ row
            logits[n, k] = row @ fit._weights[:, k] / (1 + torch.pi / 8 * variance) ** 0.5
    torch.testing.assert_close(
        fit.predict(batch).double(), logits.softmax(-1), atol=1e-6, rtol=1e-5
    )

    # A stationary point: the gradient of fit and prior cancel.
    target = F.one_hot(labels, 3).double()
    gradient = phi.mT @ (probs - target) + fit.precision * fit._weights
    assert gradient.abs().max() < 1e-4


def test_random_features_approximate_the_kernel():
    fit = RandomFeatureGP()
    features = problem_of().features("train")[0].double()
    fit.n_features = 20_000
    fit.draw(features, seed=0)
    phi = fit.random_features(features)
    x = Standardize(features)(features)
    scale = torch.pdist(x).median()
    kernel = torch.exp(-torch.cdist(x, x).square() / (2 * scale**2))
    assert (phi @ phi.mT - kernel).abs().max() < 0.03


def test_random_feature_map_does_not_depend_on_the_start():
    phi = torch.randn(20, 5, dtype=torch.float64)
    labels = torch.arange(20) % 3
    starts = (torch.zeros(5, 3).double(), torch.randn(5, 3).double())
    solutions = [map_weights(phi, labels, 0.5, start) for start in starts]
    torch.testing.assert_close(*solutions, atol=1e-4, rtol=1e-3)


def test_standardized_constant_features_stay_zero():
    features = torch.tensor([[1.0, 3.0, 7.0], [2.0, 3.0, 7.0], [3.0, 3.0, 7.0]])
    x = Standardize(features)(torch.tensor([[1.0, 3.0, 9.0]]))
    torch.testing.assert_close(x, torch.tensor([[-(1.5**0.5), 0.0, 0.0]]))


def test_swag_moments_are_numpys():
    iterates = torch.randn(7, 5, dtype=torch.float64)
    moments = SwagMoments(max_rank=3)
    for iterate in iterates:
        moments.collect(iterate)
    values = iterates.numpy()
    np.testing.assert_allclose(moments.mean.numpy(), values.mean(0))
    np.testing.assert_allclose(moments.variance.numpy(), values.var(0))
    deviations = [values[i] - values[: i + 1].mean(0) for i in (4, 5, 6)]
    np.testing.assert_allclose(torch.stack(moments.deviations).numpy(), deviations, atol=1e-12)

    samples = moments.sample(100_000, seed=0)
    factors = np.stack(deviations)
    covariance = np.diag(values.var(0)) / 2 + factors.T @ factors / (2 * (3 - 1))
    np.testing.assert_allclose(np.cov(samples.numpy().T), covariance, atol=0.03)
    np.testing.assert_allclose(samples.mean(0).numpy(), values.mean(0), atol=0.02)


def test_swag_refuses_what_has_no_covariance():
    moments = SwagMoments()
    moments.collect(torch.ones(2))
    with pytest.raises(ValueError, match="at least two iterates before sampling, but got 1"):
        moments.sample(3, seed=0)
    with pytest.raises(ValueError, match="max_rank of at least 2, but got 1"):
        SwagMoments(1)


def test_last_layer_dropout_is_unbiased_in_the_logits(monkeypatch):
    monkeypatch.setattr(LastLayerDropout, "n_samples", 5000)
    fit = fitted(LastLayerDropout, problem := problem_of())
    batch = letter_batch(4, seed=3)
    features = problem.batch_features(batch)
    with torch.no_grad():
        logits = fit._model(features)
    # Dropout scales what it keeps, so that log-odds agree on average.
    samples = fit.predict(batch).log()
    odds = (samples - samples[..., :1]).mean(0)
    torch.testing.assert_close(odds, logits - logits[:, :1], atol=0.1, rtol=0.1)


def test_evidential_probabilities_are_the_dirichlets_mean():
    fit = fitted(Evidential, problem := problem_of())
    batch = letter_batch(5, seed=3)
    with torch.no_grad():
        alpha = fit.concentration(problem.batch_features(batch))
    assert (alpha > 1).all()
    expected = torch.distributions.Dirichlet(alpha).mean
    torch.testing.assert_close(fit.predict(batch), expected)


def test_evidential_loss_is_the_expected_squared_error_and_a_kl_divergence():
    alpha = torch.tensor([[2.0, 1.5, 4.0], [1.2, 3.0, 1.0]], dtype=torch.float64)
    labels = torch.tensor([2, 0])
    draws = torch.distributions.Dirichlet(alpha).sample((200_000,))
    error = (draws - F.one_hot(labels, 3)).square().sum(-1).mean()
    assert float(evidential_loss(alpha, labels, 0.0)) == pytest.approx(float(error), abs=2e-3)
    only_wrong = torch.tensor([[2.0, 1.5, 1.0], [1.0, 3.0, 1.0]], dtype=torch.float64)
    posterior = torch.distributions.Dirichlet(only_wrong)
    samples = posterior.sample((200_000,))
    divergence = (posterior.log_prob(samples) - np.log(2)).mean()  # the uniform's density is 2
    penalty = evidential_loss(alpha, labels, 1.0) - evidential_loss(alpha, labels, 0.0)
    assert float(penalty) == pytest.approx(float(divergence), abs=5e-3)


# LoRA ---------------------------------------------------------------------------------------------


def test_checkpoint_ensemble_is_the_average_of_the_checkpoints():
    problem = problem_of()
    batch = letter_batch(6, seed=3)
    expected = []
    for checkpoint in problem.checkpoints:
        head = letter_head(tiny_llama(torch.float32))
        head.load_state_dict(checkpoint, strict=False)
        with torch.no_grad():
            expected.append(head(batch).softmax(-1))
    fit = fitted(CheckpointEnsemble, problem)
    torch.testing.assert_close(averaged(fit.predict(batch)), torch.stack(expected).mean(0))
    # The last checkpoint is the model's own adapter.
    adapter = sum(weight.numel() for weight in lora_weights(problem.head).values())
    assert fit.extra_parameters == 2 * adapter


def test_checkpoint_ensemble_needs_checkpoints():
    problem = problem_of()
    problem.checkpoints = []
    with pytest.raises(NotApplicable, match="no checkpoints"):
        CheckpointEnsemble().fit(problem)


def test_deep_ensemble_begins_with_the_problems_own_adapter():
    problem = problem_of()
    batch = letter_batch(6, seed=3)
    seeds = []
    train = problem.train_adapter
    problem.train_adapter = lambda seed: (seeds.append(seed), train(seed))[1]
    probs = fitted(DeepEnsemble, problem).predict(batch)
    for member, head in ((0, problem.head), (2, train(2000))):
        torch.testing.assert_close(probs[member], head(batch).softmax(-1).detach())
    assert seeds == [1000, 2000]


def test_swag_over_lora_is_around_the_mean_of_the_second_half():
    problem = problem_of()
    iterates: list[Tensor] = []
    train = problem.train_adapter

    def recorded(seed: int, on_step: Callable[..., None]) -> nn.Module:
        def both(head: nn.Module, step: int, n_steps: int) -> None:
            on_step(head, step, n_steps)
            if step >= n_steps / 2:
                iterates.append(torch.cat([w.flatten() for w in lora_weights(head).values()]))

        return train(seed, on_step=both)

    problem.train_adapter = recorded
    members = fitted(LoraSWAG, problem)._members
    samples = torch.stack([torch.cat([w.flatten() for w in m.values()]) for m in members])
    moments = SwagMoments(20)
    for iterate in iterates:
        moments.collect(iterate)
    torch.testing.assert_close(samples, moments.sample(3, problem.seed))


def test_ivon_samples_lie_around_what_it_trained():
    problem = problem_of()
    trained: list[nn.Module] = []
    train = problem.train_adapter
    problem.train_adapter = lambda **kwargs: (trained.append(train(**kwargs)), trained[-1])[1]
    fit = fitted(IVON, problem)
    mean = lora_weights(trained[0])
    for member in fit._members:
        for name, weight in member.items():
            # ess 1e6 and a Hessian of about 1e-3: a standard deviation of about 0.03.
            assert 0.01 < float((weight - mean[name]).std()) < 0.1


def test_lora_dropout_turns_nothing_else_on():
    problem = problem_of()
    fit = fitted(LoraDropout, problem)
    batch = letter_batch(6, seed=3)
    before = snapshot(fit._head)
    samples = fit.predict(batch)
    assert snapshot(fit._head) == before
    assert not torch.allclose(samples[0], samples[1])
    for module in fit._dropouts:
        module.p = 0.0
    with torch.no_grad():
        torch.testing.assert_close(fit.predict(batch)[0], fit._head(batch).softmax(-1))


def test_lora_dropout_says_what_it_needs():
    problem = problem_of()
    problem.train_adapter = lambda seed, dropout: problem.head
    with pytest.raises(RuntimeError, match="to return a model with dropout"):
        LoraDropout().fit(problem)


# Conformal sets -----------------------------------------------------------------------------------


def exchangeable(n: int, seed: int, temperature: float = 2.0) -> tuple[Tensor, Tensor]:
    """Return overconfident probabilities and labels that are drawn from the calibrated ones."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, 5, generator=generator)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    return (temperature * logits).softmax(-1), labels


@pytest.mark.parametrize("alpha", [0.1, 0.3])
@pytest.mark.parametrize("method", ["THR", "APS"])
def test_conformal_sets_cover_at_the_rate(method, alpha):
    pytest.importorskip("mapie")
    runs = [
        conformal_sets(method, *exchangeable(200, seed), *exchangeable(500, 100 + seed), alpha)
        for seed in range(20)
    ]
    coverage = np.mean([run.coverage for run in runs])
    # The mean over calibration sets lies in [1 - alpha, 1 - alpha + 1 / (n + 1)]; APS without
    # randomisation may lie above.
    assert coverage > 1 - alpha - 0.02
    if method == "THR":
        assert coverage < 1 - alpha + 0.025
    assert all(0 <= run.size <= 5 for run in runs)


def test_conformal_sets_are_the_brute_force_ones():
    pytest.importorskip("mapie")
    (probs, labels), (test, answers) = exchangeable(50, 0), exchangeable(80, 1)
    rank = int(np.ceil(51 * 0.9))
    threshold = (1 - probs[torch.arange(50), labels]).sort().values[rank - 1]
    sets = 1 - test <= threshold + 1e-7
    result = conformal_sets("THR", probs, labels, test, answers)
    assert result.coverage == pytest.approx(float(sets[torch.arange(80), answers].float().mean()))
    assert result.size == pytest.approx(float(sets.sum(1).float().mean()))


def test_conformal_sets_do_without_a_class_among_the_validation_labels():
    pytest.importorskip("mapie")
    probs, labels = exchangeable(100, 0)
    result = conformal_sets("APS", probs[labels > 0], labels[labels > 0], *exchangeable(80, 1))
    assert 0.7 < result.coverage <= 1


@pytest.mark.parametrize(
    ("method", "alpha", "message"),
    [
        ("RAPS", 0.1, "one of \\('THR', 'APS'\\), but got 'RAPS'"),
        ("THR", 1.0, "between 0 and 1, but got 1.0"),
        ("APS", 0.01, "at least 99 validation labels for alpha=0.01, but got 50"),
    ],
)
def test_conformal_sets_say_what_is_wrong(method, alpha, message):
    with pytest.raises(ValueError, match=message):
        conformal_sets(method, *exchangeable(50, 0), *exchangeable(5, 1), alpha)


def test_conformal_sets_name_their_package():
    if find_spec("mapie") is not None:
        pytest.skip("mapie is installed")
    with pytest.raises(ImportError, match='pip install "mapie'):
        conformal_sets("THR", *exchangeable(50, 0), *exchangeable(5, 1))
