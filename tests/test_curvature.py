"""Streaming backends equal brute force, curvlinops and the formulas they claim."""

import math

import pytest
import torch
from laplace import DiagLaplace, FullLaplace, KronLaplace
from laplace import Laplace as ParentLaplace
from laplace.curvature import CurvlinopsEF, CurvlinopsGGN, EFInterface
from models import (
    HEADS,
    bruteforce_jacobians,
    choice_batch,
    chunks,
    explicit_ggn,
    inputs_of,
    labels_of,
    letter_batch,
    letter_head,
    mlp_batch,
    scoring_head,
    select,
    tiny_bert_classifier,
    tiny_gpt2,
    tiny_mlp,
    tiny_opt,
)
from torch.nn import functional as F
from torch.utils.data import DataLoader

from laplace_llm import (
    KronLoraLaplace,
    LoraSubnetMask,
    SequenceClassificationHead,
    StreamingEF,
    StreamingGGN,
)
from laplace_llm.adapters import find_lora_tensors
from laplace_llm.errors import AdapterError, OptionError
from laplace_llm.factors import LoraKron

EXACT = {"rtol": 1e-8, "atol": 1e-12}


def freeze_all_but_lora(model):
    weights = {tensor.weight for tensor in find_lora_tensors(model)}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in weights)
    return model


def setup(head, n=5, seed=0):
    """Return a model whose only trainable parameters are LoRA's, and a batch."""
    model, make_batch = HEADS[head]()
    if head == "bare":
        model = SequenceClassificationHead(model)
    return freeze_all_but_lora(model), make_batch(n, seed=seed)


def regression_setup(n=7, outputs=2):
    return tiny_mlp(outputs=outputs), mlp_batch(n, outputs=outputs, regression=True)


def factors(backend, *batches):
    """Return every tensor's two factors, summed over batches."""
    state = LoraKron.empty(backend.tensors, 1000, backend.dtype)
    for batch in batches:
        backend.accumulate_kron(state, inputs_of(batch), labels_of(batch))
    assert state.n_data == sum(len(labels_of(batch)) for batch in batches)
    return [matrix for p in state.pairs for matrix in (p.outputs.matrix, p.inputs.matrix)]


def loss_gradients(model, batch, tensors):
    """Return (B, P): the loss's gradient of each example, by plain autograd."""
    logits = model(inputs_of(batch))
    losses = F.cross_entropy(logits, labels_of(batch), reduction="none")
    weights = [tensor.weight for tensor in tensors]
    rows = [torch.autograd.grad(loss, weights, retain_graph=True) for loss in losses]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


# Jacobians, full and diagonal ---------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
def test_jacobians_equal_brute_force(head):
    model, batch = setup(head)
    backend = StreamingGGN(model, "classification")
    jacobians, outputs = backend.jacobians(inputs_of(batch))
    expected = bruteforce_jacobians(model, inputs_of(batch), backend.tensors)
    torch.testing.assert_close(jacobians, expected, **EXACT)
    torch.testing.assert_close(outputs, model(inputs_of(batch)).detach(), **EXACT)
    assert not jacobians.requires_grad


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_opt])
def test_jacobians_of_other_architectures_equal_brute_force(build):
    model, batch = letter_head(build()), letter_batch(4)
    backend = StreamingGGN(model, "classification")
    expected = bruteforce_jacobians(model, batch, backend.tensors)
    torch.testing.assert_close(backend.jacobians(batch)[0], expected, **EXACT)


def test_jacobians_agree_with_the_parents_own():
    model, (x, _) = tiny_mlp(), mlp_batch(5)
    expected, outputs = CurvlinopsGGN(model, "classification").jacobians(x)
    jacobians, ours = StreamingGGN(model, "classification").jacobians(x)
    torch.testing.assert_close(jacobians, expected, **EXACT)
    torch.testing.assert_close(ours, outputs, **EXACT)


def test_jacobians_can_be_differentiated_in_the_inputs():
    model, (x, _) = tiny_mlp(), mlp_batch(3)
    x.requires_grad_()
    gradients = []
    for backend in (StreamingGGN, CurvlinopsGGN):
        jacobians, _ = backend(model, "classification").jacobians(x, enable_backprop=True)
        gradients += torch.autograd.grad(jacobians.square().sum(), x)
    torch.testing.assert_close(*gradients, **EXACT)


@pytest.mark.parametrize("head", HEADS)
def test_full_and_diag_equal_the_explicit_ggn(head):
    model, batch = setup(head)
    backend = StreamingGGN(model, "classification")
    jacobians = bruteforce_jacobians(model, inputs_of(batch), backend.tensors)
    logits = model(inputs_of(batch)).detach()
    expected = explicit_ggn(jacobians, logits)
    loss, full = backend.full(inputs_of(batch), labels_of(batch))
    torch.testing.assert_close(full, expected, **EXACT)
    torch.testing.assert_close(
        loss, F.cross_entropy(logits, labels_of(batch), reduction="sum"), **EXACT
    )
    loss, diag = backend.diag(inputs_of(batch), labels_of(batch))
    torch.testing.assert_close(diag, expected.diagonal(), **EXACT)
    torch.testing.assert_close(
        loss, F.cross_entropy(logits, labels_of(batch), reduction="sum"), **EXACT
    )


def test_regression_equals_the_explicit_ggn():
    model, (x, y) = regression_setup()
    backend = StreamingGGN(model, "regression")
    expected = explicit_ggn(bruteforce_jacobians(model, x, backend.tensors), None)
    loss, full = backend.full(x, y)
    torch.testing.assert_close(full, expected, **EXACT)
    torch.testing.assert_close(loss, 0.5 * (model(x) - y).square().sum().detach(), **EXACT)
    torch.testing.assert_close(backend.diag(x, y)[1], expected.diagonal(), **EXACT)


@pytest.mark.parametrize("head", HEADS)
def test_empirical_fisher_equals_outer_products_of_gradients(head):
    model, batch = setup(head)
    backend = StreamingEF(model, "classification")
    rows = loss_gradients(model, batch, backend.tensors)
    gradients, loss = backend.gradients(inputs_of(batch), labels_of(batch))
    torch.testing.assert_close(gradients, rows, **EXACT)
    logits = model(inputs_of(batch)).detach()
    torch.testing.assert_close(
        loss, F.cross_entropy(logits, labels_of(batch), reduction="sum"), **EXACT
    )
    full = backend.full(inputs_of(batch), labels_of(batch))[1]
    torch.testing.assert_close(full, rows.T @ rows, **EXACT)
    diag = backend.diag(inputs_of(batch), labels_of(batch))[1]
    torch.testing.assert_close(diag, rows.square().sum(0), **EXACT)


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_empirical_fisher_agrees_with_the_parents_own(likelihood):
    model = tiny_mlp(outputs=2)
    x, y = mlp_batch(5, outputs=2, regression=likelihood == "regression")
    ours, theirs = StreamingEF(model, likelihood), EFInterface(model, likelihood)
    for name in ("full", "diag", "gradients"):
        for left, right in zip(getattr(ours, name)(x, y), getattr(theirs, name)(x, y), strict=True):
            torch.testing.assert_close(left, right.detach(), **EXACT)


def test_subnetwork_indices_choose_columns():
    model, batch = setup("letters")
    indices = torch.tensor([3, 50, 51, 200])
    whole = StreamingGGN(model, "classification")
    part = StreamingGGN(model, "classification", subnetwork_indices=indices)
    y = labels_of(batch)
    expected = whole.full(batch, y)[1][indices][:, indices]
    torch.testing.assert_close(part.full(batch, y)[1], expected)
    torch.testing.assert_close(part.diag(batch, y)[1], whole.diag(batch, y)[1][indices])
    torch.testing.assert_close(part.jacobians(batch)[0], whole.jacobians(batch)[0][..., indices])
    torch.testing.assert_close(
        part.gradients(batch, y)[0], whole.gradients(batch, y)[0][:, indices]
    )


# Kronecker factors --------------------------------------------------------------------------------


def recorded(model, batch, tensors):
    """Return each tensor's inputs (rows, in) and one gradient (rows, out) for each output."""
    calls = [[] for _ in tensors]
    handles = [
        tensor.module.register_forward_hook(
            lambda _module, args, output, call=call: call.extend([args[0].detach(), output])
        )
        for tensor, call in zip(tensors, calls, strict=True)
    ]
    logits = model(inputs_of(batch))
    for handle in handles:
        handle.remove()
    outputs = [output for _, output in calls]
    gradients = [
        torch.autograd.grad(column.sum(), outputs, retain_graph=True) for column in logits.unbind(1)
    ]
    inputs = [activation for activation, _ in calls]
    return logits.detach(), inputs, list(zip(*gradients, strict=True))


@pytest.mark.parametrize("approx", ["reduce", "expand"])
@pytest.mark.parametrize("head", HEADS)
def test_factors_equal_the_formula_on_recorded_activations(head, approx):
    model, batch = setup(head, n=4)
    backend = StreamingGGN(model, "classification", kfac_approx=approx)
    logits, inputs, gradients = recorded(model, batch, backend.tensors)
    p = torch.softmax(logits, -1)
    hessians = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    if head == "mlp":
        masks = torch.ones(4, 1, dtype=torch.bool)
    else:
        masks = batch["attention_mask"].reshape(4, -1).bool()
        assert not masks.all()
    expected = []
    for a, g in zip(inputs, gradients, strict=True):
        a = a.reshape(4, -1, a.shape[-1])
        g = torch.stack([c.reshape(4, -1, c.shape[-1]) for c in g], 1)  # (B, C, S, out)
        A, B = 0, 0
        for n, mask in enumerate(masks):
            if approx == "reduce":
                mean, total = a[n, mask].mean(0), g[n][:, mask].sum(1)
                A = A + torch.outer(mean, mean)
                B = B + total.T @ hessians[n] @ total
            else:
                A = A + a[n, mask].T @ a[n, mask] / mask.sum()
                B = B + torch.einsum("cso,cd,dsp->op", g[n][:, mask], hessians[n], g[n][:, mask])
        expected += [B, A]
    for ours, matrix in zip(factors(backend, batch), expected, strict=True):
        torch.testing.assert_close(ours, matrix, **EXACT)


def unpadded(head):
    if head == "letters":
        return letter_head(), letter_batch(4, pad=None)
    return letter_head(tiny_gpt2(), classes=4), letter_batch(4, pad=None, classes=4)


@pytest.mark.parametrize(
    ("ours", "theirs"), [(StreamingGGN, CurvlinopsGGN), (StreamingEF, CurvlinopsEF)]
)
@pytest.mark.parametrize("head", ["letters", "gpt2"])
def test_expand_without_padding_equals_curvlinops(head, ours, theirs):
    model, batch = unpadded(head)
    y, N = labels_of(batch), 9
    loss, kron = ours(model, "classification", kfac_approx="expand").kron(batch, y, N)
    expected_loss, expected = theirs(model, "classification").kron(batch, y, N)
    torch.testing.assert_close(loss, expected_loss, **EXACT)
    assert len(kron.kfacs) == len(expected.kfacs)
    for pair, expected_pair in zip(kron.kfacs, expected.kfacs, strict=True):
        for matrix, expected_matrix in zip(pair, expected_pair, strict=True):
            torch.testing.assert_close(matrix, expected_matrix, **EXACT)


@pytest.mark.parametrize(
    ("ours", "theirs"), [(StreamingGGN, CurvlinopsGGN), (StreamingEF, CurvlinopsEF)]
)
def test_regression_equals_curvlinops(ours, theirs):
    model, (x, y) = regression_setup()
    loss, kron = ours(model, "regression", kfac_approx="expand").kron(x, y, 7)
    expected_loss, expected = theirs(model, "regression").kron(x, y, 7)
    torch.testing.assert_close(loss, expected_loss, **EXACT)
    # The parent spreads the factor 1/2 over both matrices of a pair, so products are compared.
    for (B, A), (expected_B, expected_A) in zip(kron.kfacs, expected.kfacs, strict=True):
        torch.testing.assert_close(torch.kron(B, A), torch.kron(expected_B, expected_A), **EXACT)


def test_reduce_equals_expand_for_one_token():
    model, (x, y) = tiny_mlp(), mlp_batch(5)
    reduce = factors(StreamingGGN(model, "classification", kfac_approx="reduce"), (x, y))
    expand = factors(StreamingGGN(model, "classification", kfac_approx="expand"), (x, y))
    for left, right in zip(reduce, expand, strict=True):
        torch.testing.assert_close(left, right, **EXACT)


def test_reduce_is_the_default():
    model, batch = setup("letters")
    ours = factors(StreamingGGN(model, "classification"), batch)
    reduce = factors(StreamingGGN(model, "classification", kfac_approx="reduce"), batch)
    expand = factors(StreamingGGN(model, "classification", kfac_approx="expand"), batch)
    assert all(torch.equal(left, right) for left, right in zip(ours, reduce, strict=True))
    assert not all(torch.allclose(left, right) for left, right in zip(ours, expand, strict=True))


# Backward passes and Monte Carlo ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "classes", "passes"),
    [
        (lambda m: StreamingGGN(m, "classification"), 2, 1),
        (lambda m: StreamingGGN(m, "classification"), 4, 3),
        (lambda m: StreamingGGN(m, "classification", stochastic=True), 4, 1),
        (lambda m: StreamingGGN(m, "classification", stochastic=True, mc_samples=3), 4, 3),
        (lambda m: StreamingEF(m, "classification"), 4, 1),
    ],
)
def test_number_of_backward_passes(monkeypatch, backend, classes, passes):
    backend, batch = backend(letter_head(classes=classes)), letter_batch(3, classes=classes)
    state = LoraKron.empty(backend.tensors, None, backend.dtype)
    calls, grad = [], torch.autograd.grad

    def counted(*args, **kwargs):
        calls.append(args)
        return grad(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    backend.accumulate_kron(state, batch, batch["labels"])
    assert len(calls) == passes


def test_monte_carlo_fisher_converges_to_the_exact_one():
    repeats, samples = 4000, 2
    model, (x, y) = tiny_mlp(), mlp_batch(3)
    exact = StreamingGGN(model, "classification")
    jacobians = bruteforce_jacobians(model, x, exact.tensors)
    p = torch.softmax(model(x).detach(), -1)
    residuals = p[:, None, :] - torch.eye(3).double()  # [n, label, c]
    squares = torch.einsum("nyc,ncp->nyp", residuals, jacobians).square()
    expected = torch.einsum("ny,nyp->p", p, squares)
    variance = torch.einsum("ny,nyp->np", p, squares.square())
    variance = variance - torch.einsum("ny,nyp->np", p, squares).square()
    deviation = (variance.sum(0) / (repeats * samples)).sqrt()
    sampled = StreamingGGN(model, "classification", stochastic=True, mc_samples=samples)
    torch.manual_seed(0)
    diag = sampled.diag(x.repeat(repeats, 1), y.repeat(repeats))[1] / repeats
    torch.testing.assert_close(exact.diag(x, y)[1], expected, **EXACT)
    assert ((diag - expected).abs() <= 5 * deviation).all()
    assert (deviation < 0.05 * expected.max()).all()


def test_monte_carlo_fisher_of_regression_converges_to_the_exact_one():
    repeats = 4000
    model, (x, y) = regression_setup(n=3)
    exact = StreamingGGN(model, "regression")
    jacobians = bruteforce_jacobians(model, x, exact.tensors)
    variances = jacobians.square().sum(1)  # (n, P); a squared normal has variance 2 sigma^4
    deviation = (2 * variances.square().sum(0) / repeats).sqrt()
    sampled = StreamingGGN(model, "regression", stochastic=True)
    torch.manual_seed(0)
    diag = sampled.diag(x.repeat(repeats, 1), y.repeat(repeats, 1))[1] / repeats
    assert ((diag - exact.diag(x, y)[1]).abs() <= 5 * deviation).all()


# Invariance ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("approx", ["reduce", "expand"])
@pytest.mark.parametrize("head", HEADS)
def test_sums_do_not_depend_on_batch_size_or_order(head, approx):
    model, batch = setup(head)
    backend = StreamingGGN(model, "classification", kfac_approx=approx)
    pieces = [select(batch, [3, 1]), select(batch, [4, 0, 2])]
    for left, right in zip(factors(backend, *pieces), factors(backend, batch), strict=True):
        torch.testing.assert_close(left, right, **EXACT)
    diag = sum(backend.diag(inputs_of(b), labels_of(b))[1] for b in pieces)
    torch.testing.assert_close(diag, backend.diag(inputs_of(batch), labels_of(batch))[1], **EXACT)


PADDINGS = [("left", 0), ("right", 5), ("left", 5)]


@pytest.mark.parametrize("approx", ["reduce", "expand"])
@pytest.mark.parametrize(("side", "extra"), PADDINGS)
@pytest.mark.parametrize(
    ("model", "make_batch"),
    [(letter_head, letter_batch), (scoring_head, choice_batch)],
    ids=["letters", "scored"],
)
def test_results_do_not_depend_on_padding(model, make_batch, side, extra, approx):
    backend = StreamingGGN(model(), "classification", kfac_approx=approx)
    batch, other = make_batch(4), make_batch(4, pad=side, extra=extra)
    assert not torch.equal(batch["attention_mask"], other["attention_mask"])
    for left, right in zip(factors(backend, other), factors(backend, batch), strict=True):
        torch.testing.assert_close(left, right, **EXACT)
    y = batch["labels"]
    torch.testing.assert_close(backend.full(other, y)[1], backend.full(batch, y)[1], **EXACT)
    torch.testing.assert_close(backend.jacobians(other)[0], backend.jacobians(batch)[0], **EXACT)


def test_an_absent_mask_means_that_all_tokens_are_real():
    backend = StreamingGGN(letter_head(), "classification")
    batch = letter_batch(4, pad=None)
    bare = {key: value for key, value in batch.items() if key != "attention_mask"}
    for left, right in zip(factors(backend, bare), factors(backend, batch), strict=True):
        torch.testing.assert_close(left, right, **EXACT)


# Options ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [StreamingGGN, StreamingEF])
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"last_layer": True}, "last layer"),
        ({"kfac_approx": "mean"}, "'reduce' or 'expand'"),
        ({"rank": 0}, "rank"),
        ({"mc_samples": 0}, "mc_samples"),
    ],
)
def test_wrong_options_are_refused(backend, option, message):
    with pytest.raises(OptionError, match=message):
        backend(tiny_mlp(), "classification", **option)


def test_empirical_fisher_draws_no_labels():
    with pytest.raises(OptionError, match="StreamingGGN"):
        StreamingEF(tiny_mlp(), "classification", stochastic=True)


def test_non_integer_number_of_samples_is_refused():
    with pytest.raises(OptionError, match="mc_samples"):
        StreamingGGN(tiny_mlp(), "classification", mc_samples=1.5)


def test_other_trainable_parameters_are_refused():
    model = SequenceClassificationHead(tiny_bert_classifier())
    assert any(p.requires_grad for n, p in model.named_parameters() if "classifier" in n)
    with pytest.raises(AdapterError, match="classifier"):
        StreamingGGN(model, "classification")
    StreamingGGN(freeze_all_but_lora(model), "classification")


def test_frozen_lora_tensors_are_refused():
    model = tiny_mlp().requires_grad_(False)
    with pytest.raises(AdapterError, match="lora_A"):
        StreamingGGN(model, "classification")


# In the parent's own classes ----------------------------------------------------------------------


def loader_of(batch, size):
    """Return a DataLoader, whose dataset the parent asks for its length."""
    n = len(labels_of(batch))
    return DataLoader(range(n), batch_size=size, collate_fn=lambda index: select(batch, index))


PARENTS = {"kron": KronLaplace, "diag": DiagLaplace, "full": FullLaplace}


@pytest.mark.parametrize("structure", PARENTS)
@pytest.mark.parametrize("head", ["letters", "bare", "mlp"])
def test_backend_works_in_the_parents_own_classes(head, structure):
    model, batch = setup(head, n=6)
    la = PARENTS[structure](
        model, "classification", prior_precision=0.7, backend=StreamingGGN, backend_kwargs={}
    )
    la.fit(loader_of(batch, 4))
    backend = StreamingGGN(model, "classification")
    jacobians = bruteforce_jacobians(model, inputs_of(batch), backend.tensors)
    if structure == "kron":
        precision = la.posterior_precision.to_matrix()
        ours = KronLoraLaplace(model, "classification", prior_precision=0.7)
        ours.fit(chunks(batch, 4))
        torch.testing.assert_close(ours.posterior_precision.to_matrix(), precision, **EXACT)
    else:
        precision = explicit_ggn(jacobians, model(inputs_of(batch)).detach())
        if structure == "diag":
            precision = precision.diagonal().diag()
        precision = precision + 0.7 * torch.eye(len(precision)).double()
    mean, variance = la._glm_predictive_distribution(inputs_of(batch))
    torch.testing.assert_close(mean, model(inputs_of(batch)).detach(), **EXACT)
    expected = jacobians @ torch.linalg.inv(precision) @ jacobians.mT
    torch.testing.assert_close(variance, expected, rtol=1e-7, atol=1e-10)
    weights = torch.cat([tensor.weight.detach().flatten() for tensor in backend.tensors])
    ratio = torch.logdet(precision) - len(precision) * math.log(0.7)
    loss = F.cross_entropy(model(inputs_of(batch)), labels_of(batch), reduction="sum").detach()
    evidence = -loss - 0.5 * (ratio + 0.7 * weights.square().sum())
    torch.testing.assert_close(la.log_marginal_likelihood().detach(), evidence, **EXACT)
    probabilities = la(inputs_of(batch))
    torch.testing.assert_close(probabilities.sum(1), torch.ones(6).double())


@pytest.mark.parametrize("structure", PARENTS)
def test_backend_in_the_parents_classes_refuses_other_trainable_parameters(structure):
    model = SequenceClassificationHead(tiny_bert_classifier())
    la = PARENTS[structure](model, "classification", backend=StreamingGGN)
    with pytest.raises(AdapterError, match="classifier"):
        la.fit(loader_of(letter_batch(4), 4))


# The parent's subnetwork --------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("base", ["frozen", "trainable"])
def test_lora_mask_in_the_parents_subnetwork_laplace(base, structure):
    model, (x, y) = tiny_mlp(), mlp_batch(6)
    if base == "trainable":
        model.requires_grad_(True)
    tensors = find_lora_tensors(model)
    mask = LoraSubnetMask(model)
    indices = mask.select()
    weights = torch.cat([tensor.weight.detach().flatten() for tensor in tensors])
    assert torch.equal(mask.parameter_vector[indices], weights)
    assert mask.n_params_subnet == len(weights)
    la = ParentLaplace(
        model,
        "classification",
        subset_of_weights="subnetwork",
        hessian_structure=structure,
        subnetwork_indices=indices,
        backend=StreamingGGN if base == "frozen" else CurvlinopsGGN,
    )
    la.fit(loader_of((x, y), 4))
    jacobians = bruteforce_jacobians(model, x, tensors)
    expected = explicit_ggn(jacobians, model(x).detach())
    torch.testing.assert_close(
        la.H, expected if structure == "full" else expected.diagonal(), **EXACT
    )
    torch.testing.assert_close(la(x).sum(1), torch.ones(6).double())


def test_lora_mask_covers_the_adapter_in_a_frozen_language_model():
    model = letter_head()
    mask = LoraSubnetMask(model).get_subnet_mask()
    assert mask.all()
    assert len(mask) == sum(tensor.weight.numel() for tensor in find_lora_tensors(model))


def test_lora_mask_refuses_a_frozen_adapter():
    with pytest.raises(AdapterError, match="is_trainable"):
        LoraSubnetMask(tiny_mlp().requires_grad_(False))
