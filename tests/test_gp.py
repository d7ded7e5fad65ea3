"""Functional Laplace on LoRA weights: beside the parent's own, and against dense algebra."""

import io
import math

import laplace
import pytest
import torch
from laplace.curvature import CurvlinopsGGN
from models import (
    HAS_ELLA,
    HEADS,
    bruteforce_jacobians,
    chunks,
    letter_batch,
    letter_head,
    mlp_batch,
    select,
    snapshot,
    tiny_bert_classifier,
    tiny_mlp,
)
from torch.nn import functional as F
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

import laplace_llm
from laplace_llm import FunctionalLoraLaplace, SequenceClassificationHead, StreamingEF
from laplace_llm.errors import DataError, NotFittedError, OptionError, StateError
from laplace_llm.outputs import OutputRows
from laplace_llm.subset import subset_of_data

EXACT = {"rtol": 1e-8, "atol": 1e-10}
OPTIONS = {"temperature": 0.5, "prior_precision": 0.8, "prior_mean": 0.1}
N, M = 9, 5
X, Y = mlp_batch(N)
X_TEST = mlp_batch(4, seed=3)[0]
INDEPENDENT = pytest.mark.parametrize("independent", [False, True])
EACH_LIKELIHOOD = pytest.mark.parametrize("likelihood", ["classification", "regression"])


def data(likelihood="classification", outputs=3):
    return mlp_batch(N, outputs=outputs, regression=likelihood == "regression")


def options(likelihood):
    """Of regression the parent's evidence has no temperature."""
    return {**OPTIONS, **({"temperature": 1.0, "sigma_noise": 0.7} if "re" in likelihood else {})}


def fitted(likelihood="classification", outputs=3, loader=None, **kwargs):
    model = tiny_mlp(outputs=outputs)
    la = FunctionalLoraLaplace(model, likelihood, **{**options(likelihood), **kwargs})
    la.fit(chunks(data(likelihood, outputs), 4) if loader is None else loader)
    return la


def moments(la, x=X_TEST):
    return la._glm_predictive_distribution(x)


# The parent's -------------------------------------------------------------------------------------


def parents(likelihood, outputs, upright=True, **kwargs):
    """Return the parent's posterior, fitted on a model without frozen parameters of its own.

    `upright`: with its blocks between training and test examples the right way round.
    """
    gp = laplace.FunctionalLaplace(
        tiny_mlp(outputs=outputs),
        likelihood,
        backend=CurvlinopsGGN,
        **{**options(likelihood), "n_subset": M, **kwargs},
    )
    gp.mean = torch.cat([p.detach().flatten() for p in gp.params])  # else of all parameters
    if upright and not gp.independent_outputs:
        transposed = gp._kernel_batch_star
        gp._kernel_batch_star = lambda *args: transposed(*args).mT
    gp.fit(DataLoader(TensorDataset(*data(likelihood, outputs)), 4))
    return gp


def ours(likelihood, outputs, **kwargs):
    loader = DataLoader(TensorDataset(*data(likelihood, outputs)), 4, shuffle=True)
    return fitted(likelihood, outputs, loader, **{"n_subset": M, **kwargs})


CASES = pytest.mark.parametrize(
    ("likelihood", "outputs"),
    [("classification", 3), ("classification", 2), ("regression", 1), ("regression", 2)],
)


@pytest.mark.filterwarnings("ignore:Using FunctionalLaplace with the diagonal")
@pytest.mark.parametrize("n_subset", [M, N])
@INDEPENDENT
@CASES
def test_it_is_the_parents_functional_laplace(likelihood, outputs, independent, n_subset):
    kwargs = {"independent_outputs": independent, "n_subset": n_subset, "seed": 3}
    la, gp = ours(likelihood, outputs, **kwargs), parents(likelihood, outputs, **kwargs)
    jacobians = bruteforce_jacobians(la.model, X_TEST, la.tensors)
    variance = gp.functional_variance(jacobians)
    torch.testing.assert_close(moments(la)[1], variance, **EXACT)
    torch.testing.assert_close(la.functional_variance(jacobians), variance, **EXACT)
    torch.testing.assert_close(la.gp_kernel_prior_variance, gp.gp_kernel_prior_variance, **EXACT)
    if likelihood == "regression":
        for name in ("loss", "scatter"):
            torch.testing.assert_close(getattr(la, name), getattr(gp, name), **EXACT)
        # The parent adds the log likelihood to what is one, and leaves its constant out.
        theirs = gp.log_marginal_likelihood() - gp.log_likelihood
        theirs = theirs - n_subset * outputs / 2 * math.log(2 * math.pi)
        torch.testing.assert_close(la.log_marginal_likelihood(), theirs, **EXACT)
    else:
        for name in ("loss", "log_det_ratio", "scatter"):
            torch.testing.assert_close(getattr(la, name), getattr(gp, name), rtol=1e-6, atol=1e-8)
        theirs = gp.log_marginal_likelihood()
        torch.testing.assert_close(la.log_marginal_likelihood(), theirs, rtol=1e-6, atol=1e-8)
    la.prior_precision = gp.prior_precision = 3.0
    gp._build_Sigma_inv()
    torch.testing.assert_close(moments(la)[1], gp.functional_variance(jacobians), **EXACT)


@pytest.mark.filterwarnings("ignore:Using FunctionalLaplace with the diagonal")
@pytest.mark.skipif(not HAS_ELLA, reason="0.2.3 has no joint covariance for this")
@INDEPENDENT
def test_joint_covariances_are_the_parents(independent):
    kwargs = {"independent_outputs": independent}
    la, gp = ours("regression", 2, **kwargs), parents("regression", 2, **kwargs)
    jacobians = bruteforce_jacobians(la.model, X_TEST, la.tensors)
    expected = gp.functional_covariance(jacobians)
    torch.testing.assert_close(la(X_TEST, joint=True)[1], expected, **EXACT)
    torch.testing.assert_close(la.functional_covariance(jacobians), expected, **EXACT)


def test_the_parent_transposes_the_blocks_of_several_outputs():
    """With all data, a Gaussian process is the GGN's posterior; the parent's is not."""
    full = laplace.Laplace(tiny_mlp(outputs=2), "regression", "lora", "full", **options("re"))
    full.fit([data("regression", 2)])
    jacobians = bruteforce_jacobians(full.model, X_TEST, full.tensors)
    exact = full.functional_variance(jacobians)
    torch.testing.assert_close(moments(fitted("regression", 2))[1], exact, **EXACT)
    upright = parents("regression", 2, n_subset=N).functional_variance(jacobians)
    torch.testing.assert_close(upright, exact, **EXACT)
    transposed = parents("regression", 2, upright=False, n_subset=N).functional_variance(jacobians)
    assert (transposed - exact).abs().max() > 0.1 * exact.abs().max()


def test_an_output_that_rounds_to_certainty_says_nothing():
    """To the parent it says something, with a noise variance of 10."""
    model = tiny_mlp()
    with torch.no_grad():
        model.base_model.model.second.base_layer.bias += torch.tensor([0.0, 0.0, 900.0])
    la = FunctionalLoraLaplace(model, **OPTIONS)
    la.fit([(X, Y)])
    jacobians = bruteforce_jacobians(model, X_TEST, la.tensors)
    torch.testing.assert_close(moments(la)[1], jacobians @ jacobians.mT / 0.8, **EXACT)
    assert la.log_marginal_likelihood().isfinite()
    torch.testing.assert_close(la.log_det_ratio, torch.zeros(()).double(), **EXACT)


# Independent outputs and the prior ----------------------------------------------------------------


def dense(la, x, prior):
    """Return the covariances (B, C, C) of the Gaussian process, by solving with its kernel."""
    train, test = (bruteforce_jacobians(la.model, inputs, la.tensors) for inputs in (X, x))
    p = torch.softmax(la.model(X).detach(), -1)
    result = torch.zeros(len(x), 3, 3).double()
    for outputs in [[0], [1], [2]] if la.independent_outputs else [[0, 1, 2]]:
        rows = train[:, outputs].flatten(0, 1)
        noise = (0.5 / (p * (1 - p))[:, outputs]).flatten().diag()
        for b in range(len(x)):
            own = test[b, outputs]
            cross = own / prior @ rows.T
            inner = torch.linalg.solve(rows / prior @ rows.T + noise, cross.T)
            covariance = own / prior @ own.T - cross @ inner
            result[b][torch.tensor(outputs)[:, None], torch.tensor(outputs)] = covariance
    return result


@INDEPENDENT
@pytest.mark.parametrize("prior", ["scalar", "tensor", "weight"])
def test_covariances_are_those_of_the_kernel(prior, independent):
    la = fitted(independent_outputs=independent)
    sizes = torch.tensor([tensor.numel for tensor in la.tensors])
    values = {
        "scalar": torch.tensor([0.8]).double(),
        "tensor": torch.linspace(0.5, 2, len(sizes)).double(),
        "weight": torch.linspace(0.5, 2, la.n_params).double(),
    }[prior]
    la.prior_precision = values
    weights = values.expand(len(sizes)).repeat_interleave(sizes) if prior != "weight" else values
    expected = dense(la, X_TEST, weights)
    torch.testing.assert_close(moments(la)[1], expected, **EXACT)
    jacobians = bruteforce_jacobians(la.model, X_TEST, la.tensors)
    torch.testing.assert_close(la.functional_variance(jacobians), expected, **EXACT)
    joint = la._glm_predictive_distribution(X_TEST, joint=True)[1]
    blocks = joint.view(4, 3, 4, 3).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    torch.testing.assert_close(blocks, expected, **EXACT)
    grid = la.moments_grid(X_TEST, torch.tensor([0.3, 0.8])).covariance
    for value, covariance in zip((0.3, 0.8), grid, strict=True):
        own = torch.full((la.n_params,), value).double()
        torch.testing.assert_close(covariance, dense(la, X_TEST, own), rtol=1e-6, atol=1e-6)


def test_independent_outputs_predict_and_tune_with_every_link():
    la = fitted(independent_outputs=True)
    mean, covariance = moments(la)
    off = covariance - torch.diag_embed(covariance.diagonal(dim1=1, dim2=2))
    assert not off.any()
    for link in ("qmc", "mean_field", "probit", "mc"):
        probabilities = la(X_TEST, link_approx=link)
        torch.testing.assert_close(probabilities.sum(1), torch.ones(4).double())
    # The default link is of the outputs' own covariances, not of their contrasts'.
    noise = torch.randn(200_000, 4, 3, generator=torch.Generator().manual_seed(0)).double()
    draws = torch.softmax(mean + noise * covariance.diagonal(dim1=1, dim2=2).sqrt(), -1)
    torch.testing.assert_close(la(X_TEST), draws.mean(0), rtol=0, atol=4e-3)
    for kwargs in ({}, {"val_loader": [(X, Y)]}, {"method": "marglik", "n_steps": 20}):
        la.prior_precision = 0.8
        la.optimize_prior_precision(**kwargs)
        assert la.prior_precision != 0.8
    for structure in ("scalar", "layerwise"):
        before = la.log_marginal_likelihood(torch.tensor(30.0))
        la.optimize_prior_precision(
            method="marglik", init_prior_prec=30.0, n_steps=8, prior_structure=structure
        )
        assert la.log_marginal_likelihood() > before


def test_independent_outputs_have_no_posterior_over_the_weights():
    la = fitted(independent_outputs=True)
    for action in (
        lambda: la.posterior_precision,
        lambda: la.log_det_posterior_precision,
        lambda: la.sample(2),
        lambda: la.log_prob(la.mean),
        lambda: la(X_TEST, pred_type="nn", link_approx="mc"),
    ):
        with pytest.raises(OptionError, match=r"independent_outputs=False.*pred_type='gp'"):
            action()


@EACH_LIKELIHOOD
def test_a_prior_mean_set_later_counts(likelihood):
    la = fitted(likelihood)
    before = la.log_marginal_likelihood()
    la.prior_mean = -0.4
    assert la.log_marginal_likelihood() != before
    other = fitted(likelihood, prior_mean=-0.4)
    torch.testing.assert_close(la.log_marginal_likelihood(), other.log_marginal_likelihood())


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_regression_evidence_is_the_density_of_the_targets(temperature):
    la = fitted("regression", 2, temperature=temperature)
    x, y = data("regression", 2)
    jacobians = bruteforce_jacobians(la.model, x, la.tensors).flatten(0, 1)
    mean = la.model(x).detach().flatten() + jacobians @ (0.1 - la.mean)
    covariance = jacobians @ jacobians.T / 0.8 + 0.49 * temperature * torch.eye(18).double()
    gaussian = torch.distributions.MultivariateNormal(mean, covariance)
    torch.testing.assert_close(la.log_marginal_likelihood(), gaussian.log_prob(y.flatten()))


# The subset ---------------------------------------------------------------------------------------


def examples(subset):
    """Return the examples that are in batches, as numbers."""
    index = {tuple(row.tolist()): i for i, row in enumerate(X)}
    return sorted(index[tuple(row.tolist())] for x, _ in subset for row in x)


def parents_examples():
    return sorted(laplace.utils.SoDSampler(N, M, seed=2).indices.tolist())


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(TensorDataset(X, Y), 4),
        DataLoader(TensorDataset(X, Y), 4, shuffle=True),
        chunks((X, Y), 2),
        (batch for batch in chunks((X, Y), 5)),
    ],
    ids=["loader", "shuffled", "list", "iterator"],
)
def test_the_subset_is_the_parents(loader):
    subset, left_out = subset_of_data(loader, M, 2, "labels")
    assert examples(subset) == parents_examples()
    assert left_out == N - M


def test_a_sampler_of_some_examples_is_respected():
    kept = [0, 2, 3, 5, 7, 8]
    loader = DataLoader(TensorDataset(X, Y), 4, sampler=SubsetRandomSampler(kept))
    for size in (4, 6, 20):
        subset, left_out = subset_of_data(loader, size, 0, "labels")
        assert set(examples(subset)) <= set(kept)
        assert len(examples(subset)) == min(size, 6)
        assert left_out == 6 - min(size, 6)


@pytest.mark.parametrize("collate", [True, False])
def test_subsets_of_mappings(collate):
    """With the loader's own collator, which the parent leaves out."""
    batch = letter_batch(N)
    rows = [{key: value[i] for key, value in batch.items()} for i in range(N)]

    def stacked(rows):
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    loader = DataLoader(rows, 4, collate_fn=stacked) if collate else chunks(batch, 4)
    la = FunctionalLoraLaplace(letter_head(), n_subset=M, seed=2, **OPTIONS)
    la.fit(loader)
    assert la.n_data == N
    alone = FunctionalLoraLaplace(letter_head(), **OPTIONS)
    alone.fit([select(batch, parents_examples())])
    alone.prior_precision = 0.8 * N / M
    x = letter_batch(4, seed=3)
    torch.testing.assert_close(moments(la, x)[1], moments(alone, x)[1], **EXACT)
    torch.testing.assert_close(la(x), alone(x), **EXACT)
    torch.testing.assert_close(la.log_det_ratio, alone.log_det_ratio, **EXACT)
    assert la.optimize_prior_precision() is None


def test_more_than_all_is_all_and_halves_add_up():
    whole = fitted()
    for n_subset in (N, N + 1, 10**6):
        la = fitted(n_subset=n_subset)
        assert la.n_data == N
        torch.testing.assert_close(moments(la)[1], moments(whole)[1], **EXACT)
    halves = fitted(loader=[(X[:6], Y[:6])], n_subset=3)
    halves.fit([(X[6:], Y[6:])], override=False)
    assert halves.n_data == N
    torch.testing.assert_close(halves.gp_kernel_prior_variance.item(), 6 / N / 0.8)


def test_tuning_on_the_training_data_looks_at_all_of_it():
    passes = []

    class Loader:
        def __iter__(self):
            passes.append(1)
            return iter(chunks((X, Y), 4))

    la, whole = fitted(loader=Loader(), n_subset=2), fitted()
    for posterior in (la, whole):
        posterior.optimize_prior_precision()
    assert len(passes) == 2
    torch.testing.assert_close(la.prior_precision, whole.prior_precision)
    la.fit(iter(chunks((X, Y), 4)))
    with pytest.raises(DataError, match="iterator"):
        la.optimize_prior_precision()


def test_bad_loaders_and_models_leave_the_posterior_alone():
    la = fitted(n_subset=M)
    state, before = snapshot(la.model), la(X_TEST)
    for loader in ([], [{"x": X}], [X], [(X, Y + 9)]):
        with pytest.raises(DataError):
            la.fit(loader)
    assert snapshot(la.model) == state
    assert la.n_data == N
    assert torch.equal(la(X_TEST), before)


# Names, options and saving ------------------------------------------------------------------------


def test_both_factories_build_it_with_the_parents_arguments():
    for factory in (laplace.Laplace, laplace_llm.Laplace):
        la = factory(
            tiny_mlp(), "classification", "lora", "gp", n_subset=M, independent_outputs=True, seed=4
        )
        assert type(la) is FunctionalLoraLaplace
        assert (la.n_subset, la.independent_outputs, la.seed) == (M, True, 4)
    assert FunctionalLoraLaplace(tiny_mlp(), "classification", M, 1.0, 0.5).prior_precision == 0.5


def test_gp_and_glm_are_two_names_of_one_prediction():
    la = fitted()
    torch.testing.assert_close(la(X_TEST, "gp"), la(X_TEST, "glm"), **EXACT)
    torch.testing.assert_close(la(X_TEST), la(X_TEST, pred_type="glm"), **EXACT)
    for draw in (la.functional_samples, la.predictive_samples):
        one, two = (
            draw(X_TEST, name, n_samples=3, generator=torch.Generator().manual_seed(0))
            for name in ("gp", "glm")
        )
        assert torch.equal(one, two)
    la.optimize_prior_precision(pred_type="gp", method="gridsearch", val_loader=[(X, Y)])
    chosen = la.prior_precision
    la.optimize_prior_precision(method="gridsearch", val_loader=[(X, Y)])
    assert torch.equal(chosen, la.prior_precision)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n_subset": 0}, "n_subset.*got 0"),
        ({"n_subset": True}, "n_subset.*got True"),
        ({"n_subset": 2.5}, r"n_subset.*got 2\.5"),
        ({"factors_on": "gpu"}, "factors_on.*got 'gpu'"),
        ({"backend": CurvlinopsGGN}, "CurvlinopsGGN.*rows.*StreamingGGN"),
    ],
)
def test_bad_options_leave_the_model_alone(kwargs, message):
    model = tiny_mlp()
    before = snapshot(model)
    with pytest.raises(OptionError, match=message):
        FunctionalLoraLaplace(model, **kwargs)
    assert snapshot(model) == before


def test_nothing_predicts_before_fit():
    la = FunctionalLoraLaplace(tiny_mlp(), n_subset=3)
    for action in (
        lambda: la(X_TEST),
        lambda: la.functional_samples(X_TEST),
        lambda: la.log_marginal_likelihood(),
        lambda: la.optimize_prior_precision(),
        lambda: la.state_dict(),
    ):
        with pytest.raises(NotFittedError):
            action()


@pytest.mark.parametrize("place", [None, "cpu", "disk"])
@INDEPENDENT
@EACH_LIKELIHOOD
def test_saving_a_subset_and_its_options(likelihood, independent, place):
    la = fitted(likelihood, n_subset=M, seed=7, independent_outputs=independent)
    file = io.BytesIO()
    torch.save(la.state_dict(), file)
    file.seek(0)
    other = FunctionalLoraLaplace(tiny_mlp(), likelihood, factors_on=place)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert (other.n_subset, other.seed, other.independent_outputs) == (M, 7, independent)
    assert torch.equal(moments(other)[1], moments(la)[1])
    assert torch.equal(other.log_marginal_likelihood(), la.log_marginal_likelihood())
    for posterior in (la, other):
        posterior.fit([data(likelihood)], override=False)
    torch.testing.assert_close(moments(other)[1], moments(la)[1], **EXACT)


def test_rows_without_their_weights_are_refused():
    la = fitted()
    state = la.state_dict()
    del state["H"]["weights"]
    with pytest.raises(StateError, match="weights"):
        la.load_state_dict(state)


@pytest.mark.parametrize("place", [None, "cpu", "disk"])
def test_rows_are_kept_where_they_are_wanted(place):
    la = fitted(factors_on=place, independent_outputs=True)
    assert isinstance(la.H, OutputRows)
    assert la.H.store._file is None or place == "disk"
    torch.testing.assert_close(moments(la)[1], moments(fitted(independent_outputs=True))[1])


def test_the_empirical_fisher_has_a_diagonal_too():
    la = fitted(backend=StreamingEF)
    residuals = torch.softmax(la.model(X).detach(), 1) - F.one_hot(Y, 3)
    torch.testing.assert_close(la.H.weights, residuals.square(), **EXACT)


@INDEPENDENT
def test_saved_modules_are_weights_too(independent):
    batch = letter_batch(6)
    la = FunctionalLoraLaplace(
        SequenceClassificationHead(tiny_bert_classifier()),
        prior_precision=0.8,
        independent_outputs=independent,
        include_modules_to_save=True,
    )
    la.fit(chunks(batch, 4))
    jacobians = bruteforce_jacobians(la.model, batch, la.tensors)
    assert "saved" in {tensor.role for tensor in la.tensors}
    assert jacobians.shape[2] == la.n_params
    p = torch.softmax(la.model(batch).detach(), -1)
    weighted = jacobians * (p * (1 - p))[..., None]
    expected = torch.zeros(6, 3, 3).double()
    for outputs in [[0], [1], [2]] if independent else [[0, 1, 2]]:
        own = jacobians[:, outputs]
        precision = torch.einsum("ncp,ncq->pq", own, weighted[:, outputs])
        precision += 0.8 * torch.eye(la.n_params).double()
        rows, columns = torch.tensor(outputs)[:, None], torch.tensor(outputs)
        expected[:, rows, columns] = own @ torch.linalg.solve(precision, own.mT)
    torch.testing.assert_close(moments(la, batch)[1], expected, **EXACT)


@INDEPENDENT
def test_single_precision(independent):
    exact = fitted(independent_outputs=independent)
    la = FunctionalLoraLaplace(tiny_mlp(torch.float32), independent_outputs=independent, **OPTIONS)
    la.fit([(X.float(), Y)])
    mean, covariance = moments(la, X_TEST.float())
    assert mean.dtype == covariance.dtype == torch.float32
    torch.testing.assert_close(covariance.double(), moments(exact)[1], rtol=1e-4, atol=1e-5)
    evidence = exact.log_marginal_likelihood()
    torch.testing.assert_close(la.log_marginal_likelihood().double(), evidence, rtol=1e-4, atol=0)


def test_the_model_is_only_borrowed():
    model = tiny_mlp().train()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)
        parameter.grad = torch.full_like(parameter, float(index))
    before = snapshot(model)
    la = FunctionalLoraLaplace(model, n_subset=M)
    la.fit(chunks((X, Y), 4))
    la(X_TEST)
    la.optimize_prior_precision()
    la.log_marginal_likelihood()
    assert snapshot(model) == before


@INDEPENDENT
def test_choices_that_a_row_does_not_have(independent):
    model, make_batch = HEADS["ragged letters"]()
    la = FunctionalLoraLaplace(model, independent_outputs=independent, **OPTIONS)
    la.fit(chunks(make_batch(6), 4))
    x = make_batch(5, seed=3)
    absent = model(x) == -torch.inf
    assert absent.any()
    assert torch.equal(la(x) == 0, absent)
    torch.testing.assert_close(la(x).sum(1), torch.ones(5).double())
    assert la.log_marginal_likelihood().isfinite()
    la.optimize_prior_precision()
    assert la.prior_precision.isfinite()


def test_targets_of_one_output_need_no_second_dimension():
    x, y = data("regression", 1)
    flat = fitted("regression", 1, [(x, y[:, 0])])
    evidence = fitted("regression", 1).log_marginal_likelihood()
    torch.testing.assert_close(flat.log_marginal_likelihood(), evidence, **EXACT)


def test_labels_and_inputs_of_mappings_stay_together():
    batch = letter_batch(6)
    subset, _ = subset_of_data([batch], 3, 0, "labels")
    ((x, y),) = subset
    assert torch.equal(x["labels"], y)
    assert len(x["input_ids"]) == 3
