"""The Kronecker algebra equals dense linear algebra, for dense and low-rank factors."""

import pytest
import torch
from laplace.utils import Kron, KronDecomposed
from models import tiny_llama

from laplace_llm.adapters import find_lora_tensors
from laplace_llm.errors import PriorError, StateError
from laplace_llm.factors import FactorPair, LoraKron
from laplace_llm.kronecker import Block, LoraKronDecomposed
from laplace_llm.sketch import DenseMoment, SketchedMoment, Spectrum, new_moment

EXACT = {"rtol": 1e-8, "atol": 1e-10}
SHAPES = [(3, 7, "A"), (8, 3, "B"), (2, 5, "A")]  # (out, in, side)
SIZE = sum(out * in_ for out, in_, _ in SHAPES)
DELTAS = torch.tensor([0.3, 1.7, 0.05], dtype=torch.float64)


def random_spectrum(dim, kept, generator):
    noise = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    values = 2 * torch.rand(kept, generator=generator, dtype=torch.float64)
    rest = torch.tensor(0.1 if kept < dim else 0.0, dtype=torch.float64)
    return Spectrum(torch.linalg.qr(noise)[0][:, :kept], values, rest)


def make(low_rank, damping=False, deltas=DELTAS, rest=None):
    """Return blocks on both sides; their long factors keep all or 2 eigenpairs."""
    generator = torch.Generator().manual_seed(0)
    blocks = []
    for out, in_, side in SHAPES:
        r, d = sorted((out, in_))
        large = random_spectrum(d, 2 if low_rank else d, generator)
        if rest is not None:
            large = Spectrum(large.vectors, large.values, torch.tensor(rest).double())
        blocks.append(Block(random_spectrum(r, r, generator), large, transposed=side == "B"))
    return LoraKronDecomposed(blocks, deltas, damping)


def dense(kron, deltas=None):
    """Return the matrix over weights in the order of ``weight.flatten()``, (out, in) row-major."""
    matrices = []
    for block, delta in zip(kron.blocks, kron.deltas if deltas is None else deltas, strict=True):
        small, large = block.small.dense(), block.large.dense()
        outputs, inputs = (large, small) if block.transposed else (small, large)
        eye_out, eye_in = torch.eye(len(outputs)).double(), torch.eye(len(inputs)).double()
        if kron.damping:
            root = delta.sqrt()
            matrices.append(torch.kron(outputs + root * eye_out, inputs + root * eye_in))
        else:
            matrices.append(torch.kron(outputs, inputs) + delta * torch.kron(eye_out, eye_in))
    return torch.block_diag(*matrices)


def power(matrix, exponent):
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values**exponent) @ vectors.T


def vectors(*shape):
    return torch.randn(*shape, SIZE, generator=torch.Generator().manual_seed(1)).double()


CASES = pytest.mark.parametrize(
    ("low_rank", "damping"), [(False, False), (False, True), (True, False), (True, True)]
)


@pytest.mark.parametrize("shape", [(), (4,), (4, 3)])
@pytest.mark.parametrize("exponent", [1, -1, -0.5])
@CASES
def test_bmm(low_rank, damping, exponent, shape):
    kron, W = make(low_rank, damping), vectors(*shape)
    expected = W @ power(dense(kron), exponent)
    torch.testing.assert_close(kron.bmm(W, exponent), expected, **EXACT)


def test_bmm_inverts_by_default():
    kron, W = make(True), vectors(2)
    torch.testing.assert_close(kron.bmm(W) @ dense(kron), W, **EXACT)


@CASES
def test_logdet(low_rank, damping):
    kron = make(low_rank, damping)
    torch.testing.assert_close(kron.logdet(), torch.logdet(dense(kron)), **EXACT)


@pytest.mark.parametrize("exponent", [1, -1, -0.5])
@CASES
def test_diag(low_rank, damping, exponent):
    kron = make(low_rank, damping)
    expected = power(dense(kron), exponent).diagonal()
    torch.testing.assert_close(kron.diag(exponent), expected, **EXACT)


@pytest.mark.parametrize("exponent", [1, -1, -0.5])
@CASES
def test_to_matrix(low_rank, damping, exponent):
    kron = make(low_rank, damping)
    torch.testing.assert_close(kron.to_matrix(exponent), power(dense(kron), exponent), **EXACT)


@CASES
def test_inv_square_form(low_rank, damping):
    kron, W = make(low_rank, damping), vectors(4, 3)
    expected = W @ torch.linalg.inv(dense(kron)) @ W.mT
    torch.testing.assert_close(kron.inv_square_form(W), expected, **EXACT)
    parts = list(W.split([block.size for block in kron.blocks], -1))
    torch.testing.assert_close(kron.variance(parts), expected, **EXACT)


@pytest.mark.parametrize("outputs", [1, 2, 3])
@CASES
def test_variance_grid_equals_a_loop(low_rank, damping, outputs):
    kron = make(low_rank, damping, deltas=None)
    parts = list(vectors(4, outputs).split([block.size for block in kron.blocks], -1))
    values = torch.tensor([1e-2, 0.5, 3.0, 100.0]).double()
    grid = kron.variance_grid(parts, values)
    assert grid.shape == (4, 4, outputs, outputs)
    for value, covariance in zip(values, grid, strict=True):
        torch.testing.assert_close(covariance, (kron + value).variance(parts), **EXACT)


def test_variance_grid_adds_to_the_deltas():
    kron = make(True)
    parts = list(vectors(2, 3).split([block.size for block in kron.blocks], -1))
    grid = kron.variance_grid(parts, torch.tensor([0.0, 2.0]).double())
    torch.testing.assert_close(grid[0], kron.variance(parts), **EXACT)
    torch.testing.assert_close(grid[1], (kron + torch.tensor(2.0)).variance(parts), **EXACT)


@CASES
def test_logdet_gradient_in_delta_equals_that_of_the_dense_matrix(low_rank, damping):
    deltas = DELTAS.clone().requires_grad_()
    kron = make(low_rank, damping, deltas)
    (gradient,) = torch.autograd.grad(kron.logdet(), deltas)
    (expected,) = torch.autograd.grad(torch.logdet(dense(kron, deltas)), deltas)
    torch.testing.assert_close(gradient, expected, **EXACT)


def test_variance_gradient_in_delta_equals_that_of_the_dense_matrix():
    deltas, W = DELTAS.clone().requires_grad_(), vectors(2, 3)
    kron = make(True, deltas=deltas)
    (gradient,) = torch.autograd.grad(kron.inv_square_form(W).square().sum(), deltas)
    expected = (W @ torch.linalg.inv(dense(kron, deltas)) @ W.mT).square().sum()
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, deltas)[0], **EXACT)


def test_zero_rest_is_a_projection_plus_the_prior():
    kron = make(True, rest=0.0)
    torch.testing.assert_close(kron.bmm(vectors(3)) @ dense(kron), vectors(3), **EXACT)
    torch.testing.assert_close(kron.logdet(), torch.logdet(dense(kron)), **EXACT)


@CASES
def test_adding_scalars_and_one_value_a_tensor(low_rank, damping):
    kron = make(low_rank, damping)
    for added in (torch.tensor(0.4).double(), torch.tensor([0.4]).double(), 2 * DELTAS):
        total = kron + added
        expected = dense(kron, deltas=DELTAS + added)
        torch.testing.assert_close(total.to_matrix(), expected, **EXACT)
        assert total.damping == damping
    torch.testing.assert_close(kron.deltas, DELTAS, rtol=0, atol=0)


@pytest.mark.parametrize("scalar", [0.25, torch.tensor(0.25), torch.tensor([0.25])])
@CASES
def test_multiplying_scales_the_curvature_and_not_the_prior(low_rank, damping, scalar):
    kron = make(low_rank, damping, deltas=None)
    torch.testing.assert_close((kron * scalar).to_matrix(), 0.25 * kron.to_matrix(), **EXACT)
    torch.testing.assert_close((scalar * kron).to_matrix(), 0.25 * kron.to_matrix(), **EXACT)
    with_prior = (kron + DELTAS) * scalar
    torch.testing.assert_close(with_prior.deltas, DELTAS, rtol=0, atol=0)
    assert with_prior.damping == damping


@pytest.mark.parametrize(
    "value", [1.0, "1", torch.ones(2), torch.ones(4), torch.ones(3, 1), torch.ones(0)]
)
def test_adding_something_of_the_wrong_shape_is_an_error(value):
    with pytest.raises(PriorError, match="1 or 3"):
        make(False) + value


def test_wrong_number_of_weights_is_an_error():
    with pytest.raises((RuntimeError, ValueError)):
        make(False).bmm(torch.zeros(SIZE + 1).double())
    with pytest.raises((RuntimeError, ValueError)):
        make(False).inv_square_form(torch.zeros(2, 3, SIZE - 1).double())


def test_wrong_number_of_jacobians_is_an_error():
    kron = make(False)
    parts = list(vectors(4, 3).split([block.size for block in kron.blocks], -1))
    with pytest.raises(ValueError, match="shorter"):
        kron.variance(parts[:-1])


# Against the parent's own algebra -----------------------------------------------------------------


def random_pairs(n_data=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for out, in_, _ in SHAPES:
        a = torch.randn(2 * in_, in_, generator=generator, dtype=torch.float64)
        g = torch.randn(2 * out, out, generator=generator, dtype=torch.float64)
        pairs.append(FactorPair(DenseMoment(g.T @ g), DenseMoment(a.T @ a)))
    return LoraKron(pairs, [side for _, _, side in SHAPES], n_data)


def parents(kron):
    return Kron([[p.outputs.matrix, p.inputs.matrix / kron.n_data] for p in kron.pairs])


@pytest.mark.parametrize("damping", [False, True])
def test_dense_factors_agree_with_the_parents_decomposition(damping):
    kron = random_pairs()
    theirs = parents(kron).decompose(damping=damping)
    theirs = KronDecomposed(theirs.eigenvectors, theirs.eigenvalues, DELTAS, damping)
    ours = kron.decompose(damping=damping) + DELTAS
    W = vectors(2, 3)
    torch.testing.assert_close(ours.logdet(), theirs.logdet(), **EXACT)
    torch.testing.assert_close(ours.diag(), theirs.diag(), **EXACT)
    torch.testing.assert_close(ours.inv_square_form(W), theirs.inv_square_form(W), **EXACT)
    torch.testing.assert_close(ours.to_matrix(), theirs.to_matrix(), **EXACT)
    for exponent in (1, -1, -0.5):
        torch.testing.assert_close(ours.bmm(W, exponent), theirs.bmm(W, exponent), **EXACT)


def test_scaling_agrees_with_the_parents():
    kron = random_pairs()
    ours = kron.decompose() * 0.25 + DELTAS
    theirs = parents(kron).decompose() * 0.25 + DELTAS
    torch.testing.assert_close(ours.to_matrix(), theirs.to_matrix(), **EXACT)


@pytest.mark.parametrize("damping", [False, True])
def test_damping_reaches_the_posterior_through_scaling_and_adding(damping):
    kron = random_pairs().decompose(damping=damping)
    posterior = kron * torch.tensor([2.0]).double() + DELTAS
    expected = LoraKronDecomposed(
        [block.scaled(2**0.5, 2**0.5) for block in kron.blocks], DELTAS, damping
    )
    torch.testing.assert_close(posterior.to_matrix(), dense(expected), **EXACT)


# The streaming factors ----------------------------------------------------------------------------


def test_empty_factors_are_dense_where_short_and_sketched_where_long():
    tensors = find_lora_tensors(tiny_llama())
    kron = LoraKron.empty(tensors, rank=3, dtype=torch.float64)
    assert len(kron) == len(tensors)
    assert kron.n_data == 0
    assert kron.small_outputs == [tensor.role == "A" for tensor in tensors]
    for pair, tensor in zip(kron.pairs, tensors, strict=True):
        small, large = pair.outputs, pair.inputs
        if tensor.role == "B":
            small, large = large, small
        assert isinstance(small, DenseMoment)
        assert small.matrix.shape == (3, 3)
        assert isinstance(large, SketchedMoment)
        assert large.sketch.shape == (max(tensor.shape), 6)


def test_small_side_is_dense_even_above_the_rank():
    tensors = find_lora_tensors(tiny_llama(rank=6))
    kron = LoraKron.empty(tensors, rank=2, dtype=torch.float64)
    smalls = [
        p.outputs if s else p.inputs for p, s in zip(kron.pairs, kron.small_outputs, strict=True)
    ]
    assert all(isinstance(small, DenseMoment) for small in smalls)


def test_merge_adds_factors_and_counts():
    one, two = random_pairs(5, seed=0), random_pairs(3, seed=1)
    outputs = [
        a.outputs.matrix + b.outputs.matrix for a, b in zip(one.pairs, two.pairs, strict=True)
    ]
    inputs = [a.inputs.matrix + b.inputs.matrix for a, b in zip(one.pairs, two.pairs, strict=True)]
    one.merge(two)
    assert one.n_data == 8
    for pair, out, in_ in zip(one.pairs, outputs, inputs, strict=True):
        torch.testing.assert_close(pair.outputs.matrix, out)
        torch.testing.assert_close(pair.inputs.matrix, in_)


def test_decomposition_without_data_is_the_prior_alone():
    tensors = find_lora_tensors(tiny_llama())
    kron = LoraKron.empty(tensors, rank=3, dtype=torch.float64).decompose()
    posterior = kron + torch.tensor(2.0).double()
    size = sum(tensor.weight.numel() for tensor in tensors)
    torch.testing.assert_close(posterior.to_matrix(), 2 * torch.eye(size).double(), **EXACT)


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("rank", [None, 2])
def test_state_round_trip_is_bit_exact(rank, decomposed):
    tensors = find_lora_tensors(tiny_llama())
    kron = LoraKron.empty(tensors, rank, torch.float64)
    generator = torch.Generator().manual_seed(0)
    for pair, tensor in zip(kron.pairs, tensors, strict=True):
        out, in_ = tensor.shape
        pair.outputs.add(torch.randn(9, out, generator=generator, dtype=torch.float64))
        pair.inputs.add(torch.randn(9, in_, generator=generator, dtype=torch.float64))
    kron.n_data = 9
    if decomposed:
        kron.decompose()
    loaded = LoraKron.empty(tensors, rank, torch.float64).load(kron.state())
    assert loaded.n_data == 9
    assert torch.equal(loaded.decompose().to_matrix(), kron.decompose().to_matrix())


def test_state_of_other_shapes_is_refused():
    def empty(rank=None, lora_rank=3, targets=("q_proj", "v_proj")):
        tensors = find_lora_tensors(tiny_llama(rank=lora_rank, targets=targets))
        return LoraKron.empty(tensors, rank, torch.float64)

    with pytest.raises(StateError, match="factors of 4 LoRA tensors"):
        empty(targets=("q_proj",)).load(empty().state())
    with pytest.raises(StateError, match="shape"):
        empty(lora_rank=2).load(empty().state())
    with pytest.raises(StateError, match="rank"):
        empty(rank=2).load(empty().state())
    with pytest.raises(StateError, match="shape"):
        empty(rank=2).load(empty(rank=3).state())


# Inputs that several tensors read -----------------------------------------------------------------


def streamed(sources, rank=2, seed=0, n_data=5):
    """Return factors of four tensors on the same random inputs, kept as `sources` says."""
    shapes = [(2, 8, "A"), (2, 8, "A"), (8, 2, "B"), (2, 8, "A")]
    generator = torch.Generator().manual_seed(seed)
    pairs = [
        FactorPair(
            new_moment(out, rank, torch.float64, "cpu", small=side == "A"),
            new_moment(in_, rank, torch.float64, "cpu", small=side == "B"),
        )
        for out, in_, side in shapes
    ]
    kron = LoraKron(pairs, [side for *_, side in shapes])
    kron.share_inputs(sources)
    shared = torch.randn(9, 8, generator=generator, dtype=torch.float64)
    own = set(kron.own_inputs())
    for index, (out, in_, side) in enumerate(shapes):
        kron.pairs[index].outputs.add(torch.randn(9, out, generator=generator, dtype=torch.float64))
        other = torch.randn(9, in_, generator=generator, dtype=torch.float64)
        if index in own:
            kron.pairs[index].inputs.add(shared if side == "A" else other)
    kron.n_data = n_data
    return kron


def test_shared_inputs_are_kept_once_and_change_nothing():
    kron, apart = streamed([0, 0, 2, 0]), streamed([0, 1, 2, 3])
    assert kron.pairs[1].inputs is kron.pairs[3].inputs is kron.pairs[0].inputs
    assert list(kron.own_inputs()) == [0, 2]
    torch.testing.assert_close(kron.decompose().to_matrix(), apart.decompose().to_matrix(), **EXACT)


@pytest.mark.parametrize(
    ("left", "right"),
    [([0, 0, 2, 0], [0, 0, 2, 0]), ([0, 0, 2, 0], [0, 1, 2, 3]), ([0, 1, 2, 3], [0, 0, 2, 0])],
)
def test_factors_merge_however_their_inputs_are_kept(left, right):
    merged, expected = streamed(left), streamed([0, 1, 2, 3])
    merged.merge(streamed(right, seed=1))
    expected.merge(streamed([0, 1, 2, 3], seed=1))
    assert merged.n_data == 10
    torch.testing.assert_close(
        merged.decompose().to_matrix(), expected.decompose().to_matrix(), **EXACT
    )


def test_shared_inputs_survive_the_state_and_are_saved_once():
    kron = streamed([0, 0, 2, 0])
    state = kron.state()
    assert ["inputs" in pair for pair in state["pairs"]] == [True, False, True, False]
    loaded = streamed([0, 1, 2, 3], seed=3).load(state)
    assert loaded.sources == [0, 0, 2, 0]
    assert torch.equal(loaded.decompose().to_matrix(), kron.decompose().to_matrix())
