"""Eigenvalues refitted in the Kronecker eigenbasis, and the second pass that they take."""

from itertools import pairwise

import pytest
import torch
from laplace.curvature import AsdlGGN, CurvlinopsGGN
from models import (
    KINDS,
    bruteforce_jacobians,
    chunks,
    diagonal_blocks,
    eigenprojections,
    explicit_ggn,
    frozen,
    inputs_of,
    letter_batch,
    letter_head,
    mlp_batch,
    randn,
    refitted_blocks,
    select,
    snapshot,
    tiny_llama,
    tiny_mlp,
)
from torch import nn

import laplace_llm
from laplace_llm import EkfacLoraLaplace, KronLoraLaplace
from laplace_llm.eigenbasis import EigenbasisMoments
from laplace_llm.errors import DataError, OptionError, OutputError, StateError
from laplace_llm.factors import FactorPair, LoraKron
from laplace_llm.kronecker import CorrectedBlock, LoraKronDecomposed
from laplace_llm.sketch import new_moment

EXACT = {"rtol": 1e-8, "atol": 1e-10}
OPTIONS = {
    "default": {},
    "expand": {"kfac_approx": "expand"},
    "rank 2": {"rank": 2},
    "rank 5": {"rank": 5},
}
EACH_OPTION = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def fitted(batch=None, cls=EkfacLoraLaplace, model=None, size=4, **options):
    la = cls(letter_head() if model is None else model, backend_kwargs=options)
    batch = letter_batch(6) if batch is None else batch
    la.fit(chunks(batch, size))
    return la, batch


def curvature_of(la):
    """Return the curvature without the prior, (P, P)."""
    return la.H.to_matrix()


def exact_ggn(la, batch):
    jacobians = bruteforce_jacobians(la.model, inputs_of(batch), la.tensors)
    return explicit_ggn(jacobians, la.model(inputs_of(batch)).detach())


def blocks_of(la, matrix):
    return diagonal_blocks(matrix, [tensor.numel for tensor in la.tensors])


# What it claims -----------------------------------------------------------------------------------


@EACH_OPTION
def test_no_other_diagonal_in_the_eigenbasis_is_closer_to_the_exact_ggn(options):
    la, batch = fitted(**options)
    exact, ours = blocks_of(la, exact_ggn(la, batch)), blocks_of(la, curvature_of(la))
    for pair, wanted, got in zip(la.H_facs.pairs, exact, ours, strict=True):
        projections = eigenprojections(pair)
        closest = (wanted - got).norm()
        for projection in projections:  # the distance is convex and has no slope in any of them
            slope = 2 * (projection * (wanted - got)).sum()
            assert abs(slope) < 1e-10 * wanted.norm()
            assert (wanted - got - 1e-3 * wanted.norm() * projection).norm() > closest


@EACH_OPTION
def test_it_is_closer_to_the_exact_ggn_than_the_factors_are(options):
    ekfac, batch = fitted(**options)
    kron, _ = fitted(cls=KronLoraLaplace, **options)
    exact = blocks_of(ekfac, exact_ggn(ekfac, batch))
    ours, theirs = (blocks_of(la, curvature_of(la)) for la in (ekfac, kron))
    for wanted, near, far in zip(exact, ours, theirs, strict=True):
        assert (wanted - near).norm() < 0.999 * (wanted - far).norm()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_weight_has_its_ggn_projected_on_the_eigenbasis(kind):
    model, make_batch = KINDS[kind]()
    la, batch = fitted(make_batch(5), model=model)
    expected = torch.block_diag(*refitted_blocks(la.H_facs, exact_ggn(la, batch)))
    torch.testing.assert_close(curvature_of(la), expected, **EXACT)


@EACH_OPTION
def test_the_trace_is_that_of_the_exact_ggn_in_any_eigenbasis(options):
    la, batch = fitted(**options)
    expected = [block.trace() for block in blocks_of(la, exact_ggn(la, batch))]
    traces = [block.trace() for block in blocks_of(la, curvature_of(la))]
    torch.testing.assert_close(traces, expected, **EXACT)


def test_it_is_exact_where_the_kronecker_product_is():
    """One example of one position and one seed."""
    la, batch = fitted(mlp_batch(1, outputs=2), model=tiny_mlp(outputs=2))
    expected = torch.block_diag(*blocks_of(la, exact_ggn(la, batch)))
    torch.testing.assert_close(curvature_of(la), expected, **EXACT)


@EACH_OPTION
def test_padding_and_batch_size_change_nothing(options):
    la, _ = fitted(**options)
    for pad, extra, size in (("left", 0, 6), ("right", 5, 1), ("left", 3, 5)):
        other, _ = fitted(letter_batch(6, pad=pad, extra=extra), size=size, **options)
        torch.testing.assert_close(curvature_of(other), curvature_of(la), **EXACT)


def test_single_precision_is_close_to_double():
    single, double = tiny_llama().float(), tiny_llama()
    double.load_state_dict(single.state_dict())
    for options in ({}, {"rank": 2}):
        la, batch = fitted(model=letter_head(single), **options)
        reference, _ = fitted(model=letter_head(double), **options)
        for value in (1e-2, 1.0):
            la.prior_precision = reference.prior_precision = value
            got, expected = (x._glm_predictive_distribution(batch)[1] for x in (la, reference))
            assert got.dtype == torch.float32
            torch.testing.assert_close(got.double(), expected, rtol=2e-3, atol=1e-5)


def test_a_stronger_prior_leaves_less_uncertainty():
    la, batch = fitted()
    variances, determinants = [], []
    for value in (0.1, 1.0, 10.0, 100.0):
        la.prior_precision = value
        covariance = la._glm_predictive_distribution(batch)[1]
        variances.append(covariance.diagonal(dim1=-2, dim2=-1))
        determinants.append(la.log_det_ratio)
    assert all((a > b).all() for a, b in pairwise(variances))
    assert all(a > b for a, b in pairwise(determinants))


def test_a_prior_precision_per_tensor_is_tuned_by_the_validation_gradient():
    la, _ = fitted()
    val = [letter_batch(6, seed=1)]
    la.optimize_prior_precision(method="val_grad", val_loader=val, prior_structure="layerwise")
    assert len(la.prior_precision) == len(la.tensors)


# The sums, and the algebra ------------------------------------------------------------------------

SHAPES = [(3, 9, True), (9, 3, False)]  # (out, in, small outputs)


def random_factors(rank, outputs, inputs):
    """Return factors of so many random rows each."""
    pairs = []
    for index, (out, in_, small_out) in enumerate(SHAPES):
        pair = FactorPair(
            new_moment(out, rank, torch.float64, "cpu", small=small_out),
            new_moment(in_, rank, torch.float64, "cpu", small=not small_out),
        )
        pair.outputs.add(randn(outputs, out, seed=index))
        pair.inputs.add(randn(inputs, in_, seed=2 + index))
        pairs.append(pair)
    return LoraKron(pairs, [small_out for *_, small_out in SHAPES], n_data=4)


@pytest.mark.parametrize("rank", [None, 2, 4])
@pytest.mark.parametrize(("outputs", "inputs"), [(20, 20), (2, 20), (20, 2), (1, 1), (3, 3)])
def test_eigenvalues_are_means_over_eigenspaces_whatever_the_factors_ranks(rank, outputs, inputs):
    """Null spaces and complements of sketches have no axes of their own."""
    factors = random_factors(rank, outputs, inputs)
    moments, gradients = EigenbasisMoments(factors.decompose().blocks), []
    for index, (out, in_, _) in enumerate(SHAPES):
        gradients.append(randn(7, out * in_, seed=4 + index))
        for part in gradients[-1].split(3):
            moments.add(index, part)
    exact = torch.block_diag(*(rows.T @ rows for rows in gradients))
    expected = torch.block_diag(*refitted_blocks(factors, exact))
    torch.testing.assert_close(moments.decompose().to_matrix(), expected, **EXACT)


def test_eigenvalues_without_data_are_the_prior_alone():
    blocks = random_factors(2, 0, 0).decompose().blocks
    posterior = EigenbasisMoments(blocks).decompose() + torch.tensor(2.0).double()
    torch.testing.assert_close(posterior.to_matrix(), 2 * torch.eye(54).double(), **EXACT)


@pytest.mark.parametrize("exponent", [1, -1, -0.5])
@pytest.mark.parametrize("rank", [None, 2])
def test_products_as_corrected_eigenvalues_give_the_kronecker_posterior(rank, exponent):
    deltas = torch.tensor([0.3, 1.7]).double()
    kron = random_factors(rank, 20, 20).decompose()
    corrected = LoraKronDecomposed(
        [CorrectedBlock(b.small, b.large, b.transposed, *b.eigenvalues(0 * deltas[0], False))
         for b in kron.blocks]
    )  # fmt: skip
    kron, corrected = kron * 0.7 + deltas, corrected * 0.7 + deltas
    W = randn(4, 3, 54)
    torch.testing.assert_close(corrected.bmm(W, exponent), kron.bmm(W, exponent), **EXACT)
    torch.testing.assert_close(corrected.diag(exponent), kron.diag(exponent), **EXACT)
    torch.testing.assert_close(corrected.inv_square_form(W), kron.inv_square_form(W), **EXACT)
    torch.testing.assert_close(corrected.logdet(), kron.logdet(), **EXACT)
    parts, values = W.split(27, -1), torch.tensor([0.1, 2.0]).double()
    for left, right in zip(
        corrected.tensor_variances(parts, values), kron.tensor_variances(parts, values), strict=True
    ):
        torch.testing.assert_close(left, right, **EXACT)


# The second pass ----------------------------------------------------------------------------------


class Passes:
    """A loader that gives other batches in each pass; an exception among them is raised."""

    def __init__(self, *passes):
        self.passes = list(passes)
        self.begun = 0

    def __iter__(self):
        self.begun += 1
        for batch in self.passes[min(self.begun, len(self.passes)) - 1]:
            if isinstance(batch, Exception):
                raise batch
            yield batch


def contents(la):
    keys = ("mean", "loss", "n_data", "n_outputs", "prior_precision")
    return frozen([la.state_dict()["H"], [getattr(la, key) for key in keys]])


def test_the_loader_is_passed_over_twice_and_counted_once():
    la, loader = EkfacLoraLaplace(letter_head()), Passes(chunks(letter_batch(6), 4))
    la.fit(loader)
    assert loader.begun == 2
    kron, _ = fitted(cls=KronLoraLaplace)
    assert (la.n_data, la.n_outputs) == (6, 3)
    torch.testing.assert_close(la.loss, kron.loss, rtol=0, atol=0)


def test_examples_may_come_in_another_order_in_the_second_pass():
    la, batch = fitted()
    other = EkfacLoraLaplace(letter_head())
    other.fit(Passes(chunks(batch, 4), [select(batch, [5, 0, 3]), select(batch, [4, 1, 2])]))
    torch.testing.assert_close(curvature_of(other), curvature_of(la), **EXACT)


@pytest.mark.parametrize("override", [True, False])
@pytest.mark.parametrize("make", [iter, lambda batches: (batch for batch in batches)])
def test_an_iterator_is_refused_before_it_is_touched(make, override):
    la, batch = fitted()
    before, iterator = contents(la), make(chunks(batch, 4))
    with pytest.raises(DataError, match=r"iterator.*DataLoader or a list"):
        la.fit(iterator, override=override)
    assert contents(la) == before
    assert len(list(iterator)) == 2


@pytest.mark.parametrize("override", [True, False])
@pytest.mark.parametrize("size", [3, 0])
def test_a_second_pass_over_other_examples_is_an_error(size, override):
    la, batch = fitted()
    before = contents(la)
    second = chunks(letter_batch(size), 4) if size else []
    message = "passed over again" if size else "at least one batch"
    with pytest.raises(DataError, match=message):
        la.fit(Passes(chunks(batch, 4), second), override=override)
    assert contents(la) == before


@pytest.mark.parametrize("override", [True, False])
@pytest.mark.parametrize("number", [1, 2])
def test_an_error_in_either_pass_leaves_model_and_posterior_alone(number, override):
    la, _ = fitted()
    model, before = snapshot(la.model), contents(la)
    passes = [chunks(letter_batch(5, seed=1), 4) for _ in range(2)]
    passes[number - 1].append(RuntimeError("bomb"))
    with pytest.raises(RuntimeError, match="bomb"):
        la.fit(Passes(*passes), override=override)
    assert snapshot(la.model) == model
    assert contents(la) == before


class Rooted(nn.Module):
    """Has finite outputs, and infinite gradients, where all features are zero."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return (self.model(x).square() * x.square().sum(1, keepdim=True)).sqrt()


def test_infinite_gradients_in_the_second_pass_are_named():
    la, (x, y) = fitted(mlp_batch(6), model=Rooted(tiny_mlp()))
    before = contents(la)
    message = r"finite curvature.*first\.lora_A\.default\.weight.*in batch 0"
    with pytest.raises(OutputError, match=message):
        la.fit(Passes([(x, y)], [(0 * x, y)]))
    assert contents(la) == before


def test_added_data_correct_the_eigenvalues_of_earlier_data_too():
    batch = letter_batch(9)
    parts = [[select(batch, slice(k, k + 3))] for k in (0, 3, 6)]
    whole, _ = fitted(batch)
    la = EkfacLoraLaplace(letter_head())
    loaders = [Passes(part) for part in parts]
    for loader in loaders:
        la.fit(loader, override=False)
    torch.testing.assert_close(curvature_of(la), curvature_of(whole), **EXACT)
    assert la.n_data == 9
    assert [loader.begun for loader in loaders] == [4, 3, 2]


def test_adding_data_to_a_loaded_posterior_is_an_error_that_changes_nothing():
    la, batch = fitted()
    loaded = EkfacLoraLaplace(letter_head())
    loaded.load_state_dict(la.state_dict())
    before, loader = contents(loaded), Passes([batch])
    with pytest.raises(DataError, match=r"a loaded posterior has none.*override=True"):
        loaded.fit(loader, override=False)
    assert contents(loaded) == before
    assert loader.begun == 0
    loaded.fit([batch])
    torch.testing.assert_close(curvature_of(loaded), curvature_of(la), **EXACT)


def test_earlier_data_that_have_changed_are_an_error():
    la, batch = EkfacLoraLaplace(letter_head()), letter_batch(6)
    earlier = chunks(batch, 3)
    la.fit(earlier)
    before = contents(la)
    earlier.pop()
    with pytest.raises(DataError, match=r"same 8 examples.*had 5"):
        la.fit([letter_batch(2, seed=1)], override=False)
    assert contents(la) == before


def test_monte_carlo_labels_give_the_exact_eigenvalues_on_average():
    la, (x, y) = fitted(mlp_batch(6), model=tiny_mlp())
    options = {"stochastic": True, "mc_samples": 40}
    sampling = EkfacLoraLaplace(tiny_mlp(), backend_kwargs=options)
    moments, copies = EigenbasisMoments(la.H_moments.blocks), 100
    torch.manual_seed(0)
    with sampling._borrowed():
        sampling._streaming.accumulate_eigenvalues(moments, x.repeat(copies, 1), y.repeat(copies))
    for key in ("kept", "totals"):
        drawn = torch.cat([sums.flatten() for sums in getattr(moments, key)]) / copies
        exact = torch.cat([sums.flatten() for sums in getattr(la.H_moments, key)])
        torch.testing.assert_close(drawn, exact, rtol=0.1, atol=1e-10)


def test_the_second_pass_draws_labels_of_its_own():
    batch = mlp_batch(6)
    la = EkfacLoraLaplace(tiny_mlp(), backend_kwargs={"stochastic": True})
    torch.manual_seed(0)
    la.fit([batch])
    again = EigenbasisMoments(la.H_moments.blocks)
    torch.manual_seed(0)  # of the first pass
    with la._borrowed():
        la._streaming.accumulate_eigenvalues(again, *batch)
    assert not torch.allclose(torch.cat(again.totals), torch.cat(la.H_moments.totals))


# Options and states -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [CurvlinopsGGN, AsdlGGN])
def test_backends_without_per_example_gradients_are_refused(backend):
    with pytest.raises(OptionError, match=f"{backend.__name__} cannot give per-example gradients"):
        laplace_llm.Laplace(letter_head(), hessian_structure="ekfac", backend=backend)


def test_there_is_no_damping():
    with pytest.raises(TypeError, match="damping"):
        EkfacLoraLaplace(letter_head(), damping=True)


def test_weights_saved_beside_the_adapter_can_be_uncertain():
    model = tiny_mlp(targets=("first",), modules_to_save=["second"])
    la, batch = EkfacLoraLaplace(model, include_modules_to_save=True), mlp_batch(6)
    la.fit([batch])
    assert any(tensor.role == "saved" for tensor in la.tensors)
    expected = torch.block_diag(*refitted_blocks(la.H_facs, exact_ggn(la, batch)))
    torch.testing.assert_close(curvature_of(la), expected, **EXACT)


def test_a_state_of_other_factors_or_eigenvalues_is_refused():
    la, _ = fitted()
    before = contents(la)
    with pytest.raises(StateError, match="rank"):
        la.load_state_dict(fitted(rank=2)[0].state_dict())
    state = la.state_dict()
    state["H"]["moments"]["kept"] = state["H"]["moments"]["kept"][:-1]
    with pytest.raises(StateError, match="eigenvalues of shapes"):
        la.load_state_dict(state)
    with pytest.raises(StateError, match="KronLoraLaplace"):
        la.load_state_dict(fitted(cls=KronLoraLaplace)[0].state_dict())
    assert contents(la) == before
