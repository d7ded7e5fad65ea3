"""The parent's ELLA and VaLLA on LoRA weights: beside the parent's own, and by dense algebra."""

import io

import laplace
import pytest
import torch
from laplace.curvature import CurvlinopsGGN
from models import (
    HAS_ELLA,
    HEADS,
    bruteforce_jacobians,
    inputs_of,
    letter_batch,
    letter_head,
    mlp_batch,
    snapshot,
    tiny_bert_classifier,
    tiny_llama,
    tiny_mlp,
)
from peft import LoraConfig
from torch.utils.data import DataLoader, TensorDataset

import laplace_llm
from laplace_llm import (
    ELLALoraLaplace,
    FullLoraLaplace,
    FunctionalLoraLaplace,
    SequenceClassificationHead,
    VaLLALoraLaplace,
)
from laplace_llm.backends import StreamingGGN
from laplace_llm.errors import AdapterError, DataError, OptionError
from laplace_llm.links import mean_field, quasi_monte_carlo

EXACT = {"rtol": 1e-7, "atol": 1e-9}
N = 9
X_TEST = mlp_batch(4, seed=3)[0]
SINCE_03 = pytest.mark.skipif(not HAS_ELLA, reason="needs laplace-torch 0.3")
EACH_LIKELIHOOD = pytest.mark.parametrize("likelihood", ["classification", "regression"])
OPTIONS = {"temperature": 0.5, "prior_precision": 0.8}
ELLA = {"subsample_size": 6, "n_eigenvalues": 4, "seed": 2, **OPTIONS}
VALLA = {"inducing_locations": "random", "num_inducing": 4, "seed": 2, **OPTIONS}
BOTH = pytest.mark.parametrize(
    ("cls", "options"), [(ELLALoraLaplace, ELLA), (VaLLALoraLaplace, VALLA)], ids=["ELLA", "VaLLA"]
)


def loader(likelihood="classification"):
    data = mlp_batch(N, regression=likelihood == "regression")
    return DataLoader(TensorDataset(*data), 4)


def letters(n=N, seed=0):
    """Return a loader of mappings, and a batch of them."""
    batch = letter_batch(n, seed=seed)
    rows = [{key: value[i] for key, value in batch.items()} for i in range(n)]
    return DataLoader(rows, 4), batch


def few(options):
    """Return arguments of `fit`, which for VaLLA is a hundred steps long by default."""
    return {"iterations": 5, "lr": 0.05} if "inducing_locations" in options else {}


def fitted(cls, options, likelihood="classification", **kwargs):
    la = cls(tiny_mlp(), likelihood, **{**options, **kwargs})
    la.fit(loader(likelihood), **few(options))
    return la


def parents(cls, options, likelihood="classification", **kwargs):
    """Return the parent's own posterior, with its own Jacobians."""
    la = cls(tiny_mlp(), likelihood, backend=CurvlinopsGGN, **{**options, **kwargs})
    la.fit(loader(likelihood), **few(options))
    return la


def assert_same_moments(la, reference, x=X_TEST):
    for joint in (False, True):
        for ours, theirs in zip(
            la.predictive_moments(x, joint=joint),
            reference.predictive_moments(x, joint=joint),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, **EXACT)


# Beside the parent --------------------------------------------------------------------------------


@SINCE_03
@BOTH
@EACH_LIKELIHOOD
def test_they_are_the_parents(cls, options, likelihood):
    la = fitted(cls, options, likelihood)
    theirs = parents(laplace.ELLA if cls is ELLALoraLaplace else laplace.VaLLA, options, likelihood)
    assert_same_moments(la, theirs)
    torch.testing.assert_close(la.prior_precision, theirs.prior_precision, **EXACT)
    jacobians = bruteforce_jacobians(la.model, X_TEST, la.tensors)
    for name in ("functional_variance", "functional_covariance"):
        ours, expected = (getattr(each, name)(jacobians) for each in (la, theirs))
        torch.testing.assert_close(ours, expected, **EXACT)
    if likelihood == "classification":
        expected = theirs(X_TEST, link_approx="probit")
        torch.testing.assert_close(la(X_TEST, link_approx="probit"), expected, **EXACT)
    else:
        for ours, expected in zip(la(X_TEST), theirs(X_TEST), strict=True):
            torch.testing.assert_close(ours, expected, **EXACT)


@SINCE_03
def test_inducing_inputs_that_are_numbers_are_optimised():
    start = mlp_batch(4, seed=5)[0]
    kwargs = {"inducing_locations": start, "inducing_classes": torch.tensor([0, 1, 2, 1])}
    options = {**VALLA, **kwargs}
    la, theirs = fitted(VaLLALoraLaplace, options), parents(laplace.VaLLA, options)
    assert not torch.equal(la.inducing_locations, start)
    torch.testing.assert_close(la.inducing_locations, theirs.inducing_locations, **EXACT)
    torch.testing.assert_close(la.fit_history_["objective"], theirs.fit_history_["objective"])
    assert_same_moments(la, theirs)


@SINCE_03
@EACH_LIKELIHOOD
def test_grid_search_chooses_what_the_parent_does_in_one_pass(likelihood):
    la, theirs = fitted(ELLALoraLaplace, ELLA, likelihood), parents(laplace.ELLA, ELLA, likelihood)
    x, y = mlp_batch(5, seed=4, regression=likelihood == "regression")
    passes = []

    class Validation:
        def __iter__(self):
            passes.append(1)
            return iter([(x[:3], y[:3]), (x[3:], y[3:])])

    la.optimize_prior_precision(val_loader=Validation(), grid_size=9)
    assert len(passes) == 1
    theirs.optimize_prior_precision(val_loader=Validation(), grid_size=9)
    assert torch.equal(la.prior_precision, theirs.prior_precision)
    assert la.prior_precision != 0.8
    for ours, expected in zip(
        la.fit_history_["tuning"], theirs.fit_history_["tuning"], strict=True
    ):
        assert ours == pytest.approx(expected)
    assert_same_moments(la, theirs)


@SINCE_03
def test_validation_while_fitting():
    for cls, options in ((ELLALoraLaplace, ELLA), (VaLLALoraLaplace, VALLA)):
        la = cls(tiny_mlp(), **options)
        la.fit(loader(), val_loader=loader(), val_steps=2, **few(options))
        assert len(la.fit_history_["val_nll"]) >= 1


# On batches that are mappings ---------------------------------------------------------------------


def dense_ggn(la, batch):
    jacobians = bruteforce_jacobians(la.model, batch, la.tensors)
    p = torch.softmax(la.model(batch).detach(), -1)
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    return torch.einsum("ncp,ncd,ndq->pq", jacobians, hessian, jacobians)


@SINCE_03
def test_ella_on_mappings_is_the_posterior_in_its_directions():
    data, batch = letters()
    la = ELLALoraLaplace(letter_head(), **ELLA)
    la.fit(data)
    directions = la.dual_directions
    torch.testing.assert_close(directions.T @ directions, torch.eye(4).double(), **EXACT)
    inner = directions.T @ dense_ggn(la, batch) @ directions / 0.5 + 0.8 * torch.eye(4).double()
    x = letter_batch(5, seed=3)
    features = bruteforce_jacobians(la.model, x, la.tensors) @ directions
    expected = features @ torch.linalg.inv(inner) @ features.mT
    mean, variance = la.predictive_moments(x)
    torch.testing.assert_close(mean, la.model(x).detach(), **EXACT)
    torch.testing.assert_close(variance, expected, **EXACT)


@SINCE_03
def test_ella_with_all_directions_is_the_exact_posterior_in_them():
    """As many directions as weights: nothing is left out."""
    x, y = mlp_batch(60)
    model = tiny_mlp()
    la = ELLALoraLaplace(model, tensors="B", **{**ELLA, "subsample_size": 60, "n_eigenvalues": 18})
    la.fit(DataLoader(TensorDataset(x, y), 7))
    full = laplace.Laplace(model, "classification", "lora", "full", tensors="B", **OPTIONS)
    full.fit([(x, y)])
    expected = full._glm_predictive_distribution(X_TEST)[1]
    torch.testing.assert_close(la.predictive_moments(X_TEST)[1], expected, rtol=1e-6, atol=1e-8)


@SINCE_03
def test_valla_on_mappings_is_its_formula():
    data, _ = letters()
    la = VaLLALoraLaplace(letter_head(), **VALLA)
    la.fit(data, **few(VALLA))
    x = letter_batch(5, seed=3)
    jacobians = bruteforce_jacobians(la.model, x, la.tensors)
    inducing = bruteforce_jacobians(la.model, la.inducing_locations, la.tensors)
    rows = inducing[torch.arange(4), la.inducing_classes]
    factor = torch.zeros(4, 4).double()
    factor[tuple(torch.tril_indices(4, 4))] = la.L.detach()
    # With A = L L^T: the prior covariance less K*Z (A^-1 + K_ZZ)^-1 K_Z*.
    scaled = factor.T @ rows
    prior = float(la.prior_precision.detach())
    precision = prior * torch.eye(la.n_params).double() + scaled.T @ scaled
    expected = jacobians @ torch.linalg.inv(precision) @ jacobians.mT
    torch.testing.assert_close(la.predictive_moments(x)[1], expected, **EXACT)
    assert prior != 0.8


@SINCE_03
@BOTH
def test_saved_modules_and_choice_rows(cls, options):
    """Of ``lm_head`` the choices' rows, and of a saved head all."""
    heads = {
        False: letter_head(tiny_llama(targets=("v_proj", "lm_head"))),
        True: SequenceClassificationHead(tiny_bert_classifier()),
    }
    for saved, head in heads.items():
        data, _ = letters()
        la = cls(head, include_modules_to_save=saved, **options)
        la.fit(data, **few(options))
        reference = FullLoraLaplace(head, include_modules_to_save=saved)
        assert la.n_params == reference.n_params
        x = letter_batch(3, seed=3)
        jacobians = bruteforce_jacobians(head, x, la.tensors)
        variance = la.predictive_moments(x)[1]
        torch.testing.assert_close(variance, la.functional_variance(jacobians), **EXACT)
        other = cls(head, include_modules_to_save=saved, **options)
        other.load_state_dict(la.state_dict())
        torch.testing.assert_close(other.predictive_moments(x)[1], variance, **EXACT)


@SINCE_03
@BOTH
def test_choices_that_a_row_does_not_have(cls, options):
    model, make_batch = HEADS["ragged letters"]()
    batch, x = make_batch(N), make_batch(5, seed=3)
    data = DataLoader([{k: v[i] for k, v in batch.items()} for i in range(N)], 4)
    la = cls(model, **{**options, **({"n_eigenvalues": 3} if cls is ELLALoraLaplace else {})})
    la.fit(data, **few(options))
    absent = model(x) == -torch.inf
    assert absent.any()
    for link in ("qmc", "mean_field", "probit"):
        probabilities = la(x, link_approx=link)
        assert torch.equal(probabilities == 0, absent)
        torch.testing.assert_close(probabilities.sum(1), torch.ones(5).double())


@SINCE_03
@BOTH
def test_a_switched_adapter_is_noticed(cls, options):
    la = fitted(cls, options)
    la.model.add_adapter("second", LoraConfig(r=2, target_modules=["first"]))
    la.model.set_adapter("second")
    with pytest.raises(AdapterError, match="default"):
        la(X_TEST)


@SINCE_03
@BOTH
def test_links_of_mappings(cls, options):
    data, _ = letters()
    la = cls(letter_head(), **options)
    la.fit(data, **few(options))
    x = letter_batch(5, seed=3)
    mean, covariance = la.predictive_moments(x)
    torch.testing.assert_close(la(x), quasi_monte_carlo(mean, covariance), **EXACT)
    torch.testing.assert_close(la(x, link_approx="mean_field"), mean_field(mean, covariance))
    own = torch.diag_embed(covariance.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(la(x, diagonal_output=True), quasi_monte_carlo(mean, own), **EXACT)
    for link in ("probit", "mc", "bridge"):
        torch.testing.assert_close(la(x, link_approx=link).sum(1), torch.ones(5).double())
    assert la.functional_samples(x, n_samples=3).shape == (3, 5, 3)


class Rewards(torch.nn.Module):
    """Scores (B, 1) of inputs, or (B, 2) of pairs."""

    def __init__(self):
        super().__init__()
        self.score = tiny_mlp(outputs=1)

    def forward(self, x):
        return self.score(x).squeeze(-1) if x.ndim == 3 else self.score(x)


@SINCE_03
@BOTH
def test_reward_models_are_fitted_on_pairs(cls, options):
    pairs = mlp_batch(2 * N)[0].view(N, 2, 4)
    data = DataLoader(TensorDataset(pairs, mlp_batch(N, outputs=2)[1]), 4)
    theirs = laplace.ELLA if cls is ELLALoraLaplace else laplace.VaLLA
    la = cls(Rewards(), "reward_modeling", **options)
    reference = theirs(Rewards(), "reward_modeling", backend=CurvlinopsGGN, **options)
    for posterior in (la, reference):
        posterior.fit(data, **few(options))
    assert_same_moments(la, reference)
    for ours, expected in zip(la(X_TEST), reference(X_TEST), strict=True):
        torch.testing.assert_close(ours, expected, **EXACT)
    assert la(X_TEST)[0].shape == (4, 1)


@SINCE_03
def test_slicing_a_batch_changes_nothing(monkeypatch):
    la = fitted(ELLALoraLaplace, ELLA)
    before = la.predictive_moments(X_TEST)
    monkeypatch.setattr("laplace_llm.moments.JACOBIAN_BYTES", 1)
    monkeypatch.setattr("laplace_llm.moments.JACOBIAN_SHARE", 0)
    for left, right in zip(la.predictive_moments(X_TEST), before, strict=True):
        torch.testing.assert_close(left, right, **EXACT)


# The model, states and errors ---------------------------------------------------------------------


@SINCE_03
@BOTH
def test_the_model_is_only_borrowed(cls, options):
    model = tiny_mlp().train()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)
        parameter.grad = torch.full_like(parameter, float(index))
    before = snapshot(model)
    la = cls(model, **options)
    la.fit(loader(), **few(options))
    la(X_TEST)
    la.functional_variance(torch.ones(2, 3, la.n_params).double())
    state = la.state_dict()
    la.load_state_dict(state)
    assert snapshot(model) == before
    assert not hasattr(model, "output_size")
    assert la.n_params == sum(tensor.numel for tensor in la.tensors)


@SINCE_03
@BOTH
def test_states_hold_the_adapter_and_come_back(cls, options):
    la = fitted(cls, options)
    file = io.BytesIO()
    torch.save(la.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    weights = state["model_fingerprint"]["state_dict"].values()
    assert sum(value.numel() for value in weights) == la.n_params
    other = cls(tiny_mlp(), **options)
    other.load_state_dict(state)
    assert_same_moments(other, la)
    changed = cls(tiny_mlp(seed=1), **options)
    with pytest.raises(ValueError, match="same pretrained model"):
        changed.load_state_dict(state)


@SINCE_03
@BOTH
def test_what_is_refused(cls, options):
    with pytest.raises(OptionError, match=r"CurvlinopsGGN.*Jacobians.*StreamingGGN"):
        cls(tiny_mlp(), backend=CurvlinopsGGN, **options)
    with pytest.raises(AdapterError):
        cls(torch.nn.Linear(4, 3), **options)
    la = cls(tiny_mlp(), **options)
    with pytest.raises(RuntimeError, match="fit"):
        la(X_TEST)
    with pytest.raises(DataError, match=r"DataLoader.*list"):
        la.fit([mlp_batch(4)])


@SINCE_03
def test_our_factory_knows_them():
    for name, cls, options in (
        ("nystrom", ELLALoraLaplace, ELLA),
        ("variational", VaLLALoraLaplace, VALLA),
    ):
        la = laplace_llm.Laplace(
            tiny_mlp(), hessian_structure="gp", functional_approximation=name, **options
        )
        assert type(la) is cls
        with pytest.raises(OptionError, match=r"functional_approximation.*'kron'"):
            laplace_llm.Laplace(tiny_mlp(), functional_approximation=name)
    la = laplace_llm.Laplace(tiny_mlp(), hessian_structure="gp", functional_approximation="sod")
    assert type(la) is FunctionalLoraLaplace
    with pytest.raises(OptionError, match=r"functional_approximation.*'other'"):
        laplace_llm.Laplace(tiny_mlp(), hessian_structure="gp", functional_approximation="other")
    theirs = laplace_llm.Laplace(
        torch.nn.Linear(4, 3), "classification", "all", "gp",
        functional_approximation="nystrom", subsample_size=4, n_eigenvalues=2,
    )  # fmt: skip
    assert type(theirs) is laplace.ELLA


@pytest.mark.skipif(HAS_ELLA, reason="of earlier versions")
@BOTH
def test_earlier_versions_of_laplace_torch_say_so(cls, options):
    with pytest.raises(OptionError, match=r"laplace-torch >= 0\.3.*hessian_structure='gp'"):
        cls(tiny_mlp(), **options)


# Jacobians of chosen outputs ----------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [[0, 2, 1, 1], [[0, 1], [2, 2], [1, 0], [0, 0]]])
@pytest.mark.parametrize("head", ["letters", "mlp"])
def test_jacobians_of_chosen_outputs(head, outputs):
    model, batch = (
        (letter_head(), letter_batch(4)) if head == "letters" else (tiny_mlp(), mlp_batch(4))
    )
    outputs, x = torch.tensor(outputs), inputs_of(batch)
    backend = StreamingGGN(model, "classification")
    jacobians, values = backend.selected_output_jacobians(x, outputs)
    dense = bruteforce_jacobians(model, x, backend.tensors)
    expected = dense[torch.arange(4)[:, None], outputs.view(4, -1)]
    torch.testing.assert_close(jacobians, expected, **EXACT)
    torch.testing.assert_close(values, model(x).detach(), **EXACT)
    assert not jacobians.requires_grad
