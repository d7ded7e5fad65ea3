"""The kernel of training examples, against brute-force Jacobians and real passes of the model."""

import math

import pytest
import torch
from models import (
    HEADS,
    bruteforce_jacobians,
    by_size,
    chunks,
    inputs_of,
    labels_of,
    letter_batch,
    letter_head,
    mlp_batch,
    randn,
    select,
    snapshot,
    tiny_llama,
    tiny_mlp,
)
from peft import PeftModel

from laplace_llm import DiagLoraLaplace, KronLoraLaplace
from laplace_llm.adapters import find_lora_tensors
from laplace_llm.contrasts import contrasts
from laplace_llm.errors import DataError
from laplace_llm.kernel import _gram, training_space

EXACT = {"rtol": 1e-8, "atol": 1e-10}
EACH_HEAD = pytest.mark.parametrize("head", HEADS)


def posterior(head, **kwargs):
    """Return a posterior (that needs no curvature here) and a batch."""
    setup = HEADS[head]()
    return DiagLoraLaplace(setup.model, **kwargs), setup.make_batch(6)


def lora_b(la):
    return find_lora_tensors(la.model, la.adapter, "B")


def exact_kernel(la, x, basis):
    """Return ``J J^T`` of the lora_B tensors, projected on contrasts."""
    jacobians = bruteforce_jacobians(la.model, x, lora_b(la))
    rows = (basis.mT @ jacobians).flatten(0, 1)
    return rows @ rows.T


def basis_of(classes=3):
    return contrasts(classes, torch.zeros(()).double())


def project(outputs):
    """Return the contrasts of each row's own choices, one row after the other."""
    basis = own_contrasts(outputs)
    rows = [row.nan_to_num(neginf=0) @ own for row, own in zip(outputs, basis, strict=True)]
    return torch.stack(rows)


def own_contrasts(outputs):
    """Return (B, C, C - 1): those of the first c of C choices, then zeros."""
    basis = torch.zeros(*outputs.shape, outputs.shape[1] - 1).double()
    for row, own in zip(outputs, basis, strict=True):
        c = int(row.isfinite().sum())
        own[:c, : c - 1] = basis_of(c)
    return basis


def assert_same_space(left, right):
    for name in ("trained", "initial", "kernel"):
        torch.testing.assert_close(getattr(left, name), getattr(right, name), **EXACT)
    assert torch.equal(left.labels, right.labels)
    assert left.factor == right.factor


# What it consists of ------------------------------------------------------------------------------


@EACH_HEAD
@pytest.mark.parametrize("tensors", ["AB", "B"])
def test_kernel_is_that_of_bruteforce_jacobians(head, tensors):
    """Of the lora_B tensors, whichever the posterior is over."""
    la, batch = posterior(head, tensors=tensors)
    space = training_space(la, chunks(batch, 4))
    outputs = la.model(inputs_of(batch)).detach()
    expected = exact_kernel(la, inputs_of(batch), own_contrasts(outputs))
    assert space.kernel.shape == (6 * (outputs.shape[1] - 1),) * 2
    torch.testing.assert_close(space.kernel, expected, **EXACT)


@EACH_HEAD
def test_outputs_are_the_models_with_and_without_its_adapter(head):
    la, batch = posterior(head, temperature=0.25)
    space, x = training_space(la, chunks(batch, 4)), inputs_of(batch)
    (peft_model,) = (m for m in la.model.modules() if isinstance(m, PeftModel))
    with torch.no_grad():
        trained = la.model(x)
        with peft_model.disable_adapter():
            initial = la.model(x)
        for tensor in lora_b(la):
            tensor.weight.zero_()
        torch.testing.assert_close(la.model(x), initial, **EXACT)
    assert not torch.allclose(trained, initial, atol=1e-3)
    assert (space.present is None) == bool(trained.isfinite().all())
    torch.testing.assert_close(space.trained, project(trained), **EXACT)
    torch.testing.assert_close(space.initial, project(initial), **EXACT)
    assert torch.equal(space.labels, labels_of(batch))
    assert space.factor == 4.0
    assert not space.regression


def test_regression_keeps_the_outputs_and_knows_the_noise():
    la = DiagLoraLaplace(tiny_mlp(outputs=2), "regression", sigma_noise=0.5)
    x, y = mlp_batch(7, outputs=2, regression=True)
    space = training_space(la, chunks((x, y), 3))
    expected = exact_kernel(la, x, torch.eye(2).double())
    torch.testing.assert_close(space.kernel, expected, **EXACT)
    torch.testing.assert_close(space.trained, la.model(x).detach(), **EXACT)
    assert torch.equal(space.labels, y)
    assert space.factor == 4.0
    assert space.regression


def test_reward_models_are_trained_as_classifiers():
    x, y = mlp_batch(6, outputs=2)
    spaces = [
        training_space(DiagLoraLaplace(tiny_mlp(outputs=2), likelihood), [(x, y)])
        for likelihood in ("reward_modeling", "classification")
    ]
    assert spaces[0].kernel.shape == (6, 6)
    assert_same_space(*spaces)


# What does not matter -----------------------------------------------------------------------------


@EACH_HEAD
def test_batch_size_does_not_matter(head):
    la, batch = posterior(head)
    whole = training_space(la, [batch])
    for size in (1, 5):
        assert_same_space(training_space(la, chunks(batch, size)), whole)
    order = [4, 0, 5, 2, 1, 3]
    shuffled = training_space(la, [select(batch, order)])
    torch.testing.assert_close(shuffled.trained, whole.trained[order], **EXACT)
    n = whole.trained.shape[1]
    rows = torch.tensor([n * i + k for i in order for k in range(n)])
    torch.testing.assert_close(shuffled.kernel, whole.kernel[rows][:, rows], **EXACT)


@pytest.mark.parametrize("pad", ["left", "right"])
def test_padding_does_not_matter(pad):
    la = DiagLoraLaplace(letter_head())
    expected = training_space(la, [letter_batch(6)])
    for extra in (0, 5):
        padded = letter_batch(6, pad=pad, extra=extra)
        assert_same_space(training_space(la, [padded]), expected)


def test_absent_choices_add_nothing_to_the_kernel():
    """Each example's block is that of a batch of its own, with its own number of choices."""
    la, batch = posterior("ragged scored")
    space = training_space(la, [batch])
    size = space.trained.shape[1]
    for index, row in enumerate(by_size(batch)):
        alone = training_space(la, [row])
        assert alone.present is None
        k = alone.trained.shape[1]
        block = slice(index * size, index * size + k)
        torch.testing.assert_close(space.kernel[block, block], alone.kernel, **EXACT)
        torch.testing.assert_close(space.trained[index, :k], alone.trained[0], **EXACT)
        torch.testing.assert_close(space.initial[index, :k], alone.initial[0], **EXACT)
        assert not space.kernel[index * size + k : (index + 1) * size].any()


# Approximations -----------------------------------------------------------------------------------


def projected(la, batch, width, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("laplace_llm.kernel.FEATURE_WIDTH", width)
        return training_space(la, [batch]).kernel


@pytest.mark.parametrize("targets", [("v_proj",), ("q_proj", "v_proj", "o_proj", "up_proj")])
@pytest.mark.parametrize("width", [2, 4])
def test_projected_kernel_is_within_its_bound(targets, width, monkeypatch):
    """Off the diagonal 5 sigma of the docstring; on it, where k_ii counts twice, sqrt(2) times."""
    la, batch = DiagLoraLaplace(letter_head(targets=targets)), letter_batch(12)
    exact = exact_kernel(la, batch, basis_of())
    kernel = projected(la, batch, width, monkeypatch)
    assert not torch.allclose(kernel, exact, rtol=0.01)
    torch.testing.assert_close(kernel, kernel.T)
    own = exact.diagonal().sqrt()
    sigma = own.outer(own) / math.sqrt(width * len(lora_b(la)))
    errors = ((kernel - exact) / sigma / (1 + torch.eye(24).double()).sqrt()).abs()
    assert errors.max() < 5
    assert errors.square().mean() < 4


def test_projected_kernel_is_unbiased(monkeypatch):
    """Averaged over 64 wide layers' worth of directions it is the exact one to 15 %."""
    la, batch = DiagLoraLaplace(tiny_mlp(hidden=400, outputs=3)), mlp_batch(5)
    exact = exact_kernel(la, batch[0], basis_of())
    own = exact.diagonal().sqrt()
    errors = (training_space(la, [batch]).kernel - exact) / own.outer(own)
    assert 1e-4 < errors.abs().max() < 5 * math.sqrt(2 / 64)
    wider = (projected(la, batch, 399, monkeypatch) - exact) / own.outer(own)
    assert wider.square().mean() < errors.square().mean()
    assert torch.equal(
        projected(la, batch, 400, monkeypatch), projected(la, batch, 999, monkeypatch)
    )
    torch.testing.assert_close(projected(la, batch, 400, monkeypatch), exact, **EXACT)


def test_projection_is_the_same_in_every_pass(monkeypatch):
    la, batch = DiagLoraLaplace(letter_head()), letter_batch(6)
    kernels = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        kernels.append(projected(la, batch, 3, monkeypatch))
    assert torch.equal(*kernels)


def test_the_first_examples_stand_for_all_of_too_many(monkeypatch):
    la, batch = DiagLoraLaplace(letter_head()), letter_batch(9)
    monkeypatch.setattr("laplace_llm.kernel.MAX_OUTPUTS", 8)
    seen = []

    def loader():
        for part in chunks(batch, 2):
            seen.append(part)
            yield part

    space = training_space(la, loader())
    assert len(seen) == 2  # 4 examples of 2 contrasts
    assert_same_space(space, training_space(la, [select(batch, slice(0, 4))]))
    regression = DiagLoraLaplace(tiny_mlp(), "regression")
    batches = chunks(mlp_batch(9, regression=True), 1)
    assert len(training_space(regression, batches).labels) == 3  # of 3 outputs


def test_gram_of_single_precision_keeps_small_eigenvalues():
    """Rows that differ by 1e-5 of their length are told apart, which float32 products cannot."""
    rows = (1e3 * (randn(1, 300) + 1e-5 * randn(5, 300, seed=1))).float()
    expected = rows.double() @ rows.double().T
    for columns in (7, 300, 8192):
        gram = _gram(rows, columns)
        assert gram.dtype == torch.float64
        torch.testing.assert_close(gram, expected, rtol=1e-14, atol=0)
    smallest = torch.linalg.svdvals(rows.double())[-1].square()
    torch.testing.assert_close(torch.linalg.eigvalsh(gram)[0], smallest, rtol=1e-4, atol=0)


def test_single_precision_models_have_a_double_kernel():
    single = DiagLoraLaplace(letter_head(tiny_llama(torch.float32)))
    space = training_space(single, [letter_batch(6)])
    expected = training_space(DiagLoraLaplace(letter_head()), [letter_batch(6)])
    for name in ("trained", "initial", "kernel"):
        result, truth = getattr(space, name), getattr(expected, name)
        assert result.dtype == torch.float64
        torch.testing.assert_close(result, truth, rtol=0, atol=1e-4 * float(truth.abs().max()))


# The model is borrowed ----------------------------------------------------------------------------


def used_model():
    """Return a model in the midst of training: modes, flags and gradients."""
    model = letter_head(tiny_llama(lora_dropout=0.5)).train()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 == 0)
        parameter.grad = torch.full_like(parameter, float(index))
    return model


def test_the_model_is_left_alone():
    model = used_model()
    before = snapshot(model)
    space = training_space(KronLoraLaplace(model), chunks(letter_batch(6), 4))
    assert snapshot(model) == before
    assert_same_space(space, training_space(KronLoraLaplace(model.eval()), [letter_batch(6)]))


def test_grad_mode_does_not_matter():
    la, batch = DiagLoraLaplace(letter_head()), letter_batch(4)
    expected = training_space(la, [batch])
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            space = training_space(la, [batch])
        assert_same_space(space, expected)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_model_is_left_alone_after_an_error_in_the_loader(error):
    def loader():
        yield letter_batch(3)
        raise error("broken")

    model = used_model()
    la, before = KronLoraLaplace(model), snapshot(model)
    with pytest.raises(error, match="broken"):
        training_space(la, loader())
    assert snapshot(model) == before


def spoiled(change):
    batch = letter_batch(3)
    change(batch)
    return [letter_batch(3), letter_batch(2), batch]


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (lambda: spoiled(lambda b: b.update(labels=torch.tensor([0, 7, 1]))), "got 7.*in batch 2"),
        (lambda: spoiled(lambda b: b.update(labels=torch.zeros(2).long())), "3 examples.*batch 2"),
        (lambda: spoiled(lambda b: b.pop("labels")), "labels under 'labels'.*in batch 2"),
        (lambda: [letter_batch(3), 5], r"an \(X, y\) pair, but got a int.*in batch 1"),
        (lambda: [], "at least one batch"),
        (
            lambda: [letter_batch(3), {**letter_batch(3), "labels": torch.zeros(3, 1).long()}],
            r"\(3, 1\).*in batch 1",
        ),
    ],
)
def test_bad_batches_are_named(loader, message):
    model = letter_head()
    la, before = DiagLoraLaplace(model), snapshot(model)
    with pytest.raises(DataError, match=message):
        training_space(la, loader())
    assert snapshot(model) == before
