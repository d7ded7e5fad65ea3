"""Every kind of adapter weight: its Jacobian, its curvature, and its way back into the model."""

import pytest
import torch
from models import (
    HIDDEN,
    KINDS,
    VOCABULARY,
    bruteforce_jacobians,
    chunks,
    explicit_ggn,
    inputs_of,
    letter_batch,
    letter_head,
    snapshot,
    tiny_bert_classifier,
    tiny_conv,
    tiny_llama,
    tiny_mlp,
)
from peft import PeftModel
from torch import nn

from laplace_llm import (
    DiagLoraLaplace,
    EkfacLoraLaplace,
    FullLoraLaplace,
    KronLoraLaplace,
    LowRankLoraLaplace,
    StreamingGGN,
)
from laplace_llm.adapters import find_lora_tensors
from laplace_llm.errors import OptionError, UnsupportedLayerError
from laplace_llm.kernel import training_space
from laplace_llm.laplace import LoraLaplace
from laplace_llm.sketch import spectra

EXACT = {"rtol": 1e-8, "atol": 1e-10}
ALL = pytest.mark.parametrize("kind", KINDS)
STRUCTURES = (
    KronLoraLaplace,
    EkfacLoraLaplace,
    LowRankLoraLaplace,
    DiagLoraLaplace,
    FullLoraLaplace,
)


def fitted(kind: str, structure: type[LoraLaplace] = FullLoraLaplace, **kwargs):
    model, make_batch = KINDS[kind]()
    la, batch = structure(model, **kwargs), make_batch(5)
    la.fit(chunks(batch, 3))
    return la, batch


def roles(la: LoraLaplace) -> set[str]:
    return {tensor.role for tensor in la.tensors}


def peft_model(model: nn.Module) -> PeftModel:
    return next(module for module in model.modules() if isinstance(module, PeftModel))


# Jacobians and curvature --------------------------------------------------------------------------


@pytest.mark.parametrize("tensors", ["AB", "B"])
@ALL
def test_jacobians_are_those_of_autograd(kind, tensors):
    model, make_batch = KINDS[kind]()
    la, x = KronLoraLaplace(model, tensors=tensors), inputs_of(make_batch(4))
    with la._borrowed():
        jacobians, outputs = la._streaming.jacobians(x)
    torch.testing.assert_close(outputs, la.model(x).detach(), **EXACT)
    expected = bruteforce_jacobians(la.model, x, la.tensors)
    assert expected.shape[-1] == la.n_params == len(la.mean)
    torch.testing.assert_close(jacobians, expected, **EXACT)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "conv" in kind or kind == "lora_bias"])
def test_jacobians_can_be_differentiated_in_the_inputs(kind):
    model, make_batch = KINDS[kind]()
    la, x = KronLoraLaplace(model), inputs_of(make_batch(2)).requires_grad_()

    def energy(x):
        with la._borrowed():
            return la._streaming.jacobians(x, enable_backprop=True)[0].square().sum()

    (gradient,) = torch.autograd.grad(energy(x), x)
    step, direction = 1e-5, torch.randn_like(x)
    slope = energy(x.detach() + step * direction) - energy(x.detach() - step * direction)
    torch.testing.assert_close(
        (gradient * direction).sum(), slope.detach() / (2 * step), rtol=1e-5, atol=1e-5
    )


@ALL
def test_the_ggn_is_exact(kind):
    la, batch = fitted(kind)
    x = inputs_of(batch)
    jacobians = bruteforce_jacobians(la.model, x, la.tensors)
    expected = explicit_ggn(jacobians, la.model(x).detach())
    torch.testing.assert_close(la.H, expected, **EXACT)
    torch.testing.assert_close(fitted(kind, DiagLoraLaplace)[0].H, expected.diagonal(), **EXACT)


@ALL
def test_kronecker_factors_are_exact_where_one_input_has_all_the_gradient(kind):
    """With one example of one position and one seed, a tensor's block is a Kronecker product."""
    model, make_batch = KINDS[kind]()
    batch = make_batch(1)
    if isinstance(batch, dict):
        batch = {k: v[:, :1] if v.ndim > 1 else v for k, v in batch.items()}
    elif batch[0].ndim > 2:
        pytest.skip("the windows of a convolution are several positions")
    la = KronLoraLaplace(model)
    la.fit([batch])
    x = inputs_of(batch)
    jacobians = bruteforce_jacobians(la.model, x, la.tensors)
    exact = explicit_ggn(jacobians, la.model(x).detach())
    start = 0
    for tensor, pair in zip(la.tensors, la.H_facs.pairs, strict=True):
        outputs, inputs = (spectra([moment])[0].dense() for moment in (pair.outputs, pair.inputs))
        block = exact[start : start + tensor.numel, start : start + tensor.numel]
        torch.testing.assert_close(torch.kron(outputs, inputs), block, **EXACT)
        start += tensor.numel
    assert start == len(exact)


@pytest.mark.parametrize("dims", [1, 2])
def test_kronecker_factors_of_convolutions_are_those_of_their_patches(dims):
    model, make_batch = KINDS[f"conv{dims}d"]()
    la = KronLoraLaplace(model, backend_kwargs={"rank": 100})
    x, y = make_batch(3)
    la.fit([(x, y)])
    conv = peft_model(model).base_model.model.conv
    unfold = x if dims == 2 else x[:, :, None]
    options = (la.tensors[0].module, (3, 3) if dims == 2 else (1, 3))
    stride, padding = (options[0].stride, options[0].padding)
    stride, padding = ((1, *stride), (0, *padding)) if dims == 1 else (stride, padding)
    patches = nn.functional.unfold(unfold, options[1], padding=padding, stride=stride).mean(-1)
    torch.testing.assert_close(la.H_facs.pairs[0].inputs.matrix, patches.T @ patches, **EXACT)
    hidden = conv.lora_A["default"](x).flatten(2).mean(-1)
    torch.testing.assert_close(la.H_facs.pairs[1].inputs.matrix, hidden.T @ hidden, **EXACT)


@pytest.mark.parametrize("convention", ["reduce", "expand"])
def test_the_input_factor_of_an_embedding_is_that_of_one_hot_tokens(convention):
    model, make_batch = KINDS["embedding"]()
    la = KronLoraLaplace(model, backend_kwargs={"kfac_approx": convention, "rank": VOCABULARY})
    batch = make_batch(4)
    la.fit(chunks(batch, 3))
    expected = torch.zeros(VOCABULARY, VOCABULARY, dtype=torch.float64)
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        hot = nn.functional.one_hot(ids[mask.bool()], VOCABULARY).double()
        hot = hot * (ids[mask.bool()] != 0)[:, None]  # the embedding's own padding index
        mean = hot.mean(0)
        expected += torch.outer(mean, mean) if convention == "reduce" else hot.T @ hot / len(hot)
    (index,) = (i for i, t in enumerate(la.tensors) if t.shape[1] == VOCABULARY)
    torch.testing.assert_close(la.H_facs.pairs[index].inputs.matrix, expected, **EXACT)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", ["dora", "lora_bias", "embedding", "lm_head", "conv2d"])
def test_every_structure_predicts_by_its_own_precision(kind, structure):
    la, batch = fitted(kind, structure)
    la.prior_precision = torch.linspace(0.5, 2, len(la.tensors), dtype=torch.float64)
    x = inputs_of(batch)
    jacobians = bruteforce_jacobians(la.model, x, la.tensors)
    precision = la.posterior_precision
    if issubclass(structure, KronLoraLaplace):
        precision = precision.to_matrix()
    elif structure is LowRankLoraLaplace:
        (vectors, values), prior = precision
        precision = (vectors * values) @ vectors.T + prior.diag()
    elif structure is DiagLoraLaplace:
        precision = precision.diag()
    expected = jacobians @ torch.linalg.inv(precision) @ jacobians.mT
    torch.testing.assert_close(la._glm_predictive_distribution(x)[1], expected, **EXACT)
    assert la.log_marginal_likelihood().isfinite()
    assert la(x).shape == (5, 3)


# Back into the model ------------------------------------------------------------------------------


@ALL
def test_sampled_weights_go_where_they_came_from(kind):
    la, batch = fitted(kind, DiagLoraLaplace)
    x, before = inputs_of(batch), snapshot(la.model)
    samples = la(x, pred_type="nn", link_approx="mc", n_samples=2, generator=torch.Generator())
    assert snapshot(la.model) == before
    generator, expected = torch.Generator(), []
    sizes = [tensor.numel for tensor in la.tensors]
    for _ in range(2):
        drawn = la.sample(1, generator)[0].split(sizes)
        with torch.no_grad():
            for tensor, part in zip(la.tensors, drawn, strict=True):
                rows = slice(None) if tensor.rows is None else list(tensor.rows)
                tensor.weight[rows] = part.view(tensor.weight[rows].shape)
            expected.append(torch.softmax(la.model(x), -1))
    torch.testing.assert_close(samples, sum(expected) / 2, **EXACT)


@ALL
def test_the_prior_mean_of_loo_is_the_model_without_its_adapter(kind):
    la, batch = fitted(kind, DiagLoraLaplace)
    space = training_space(la, [batch])
    with peft_model(la.model).disable_adapter(), torch.no_grad():
        expected = la.model(inputs_of(batch)) @ space.basis
    torch.testing.assert_close(space.initial, expected, **EXACT)
    la.optimize_prior_precision()
    assert la.prior_precision.shape == (1,)


@ALL
def test_the_state_comes_back(kind):
    la, batch = fitted(kind, KronLoraLaplace)
    other = KronLoraLaplace(KINDS[kind]().model)
    other.load_state_dict(la.state_dict())
    x = inputs_of(batch)
    assert torch.equal(other(x), la(x))


# Which weights belong -----------------------------------------------------------------------------


def test_doras_magnitudes_belong_to_the_posterior():
    la = KronLoraLaplace(tiny_bert_classifier(use_dora=True))
    assert roles(la) == {"A", "B", "magnitude"}
    assert roles(KronLoraLaplace(tiny_bert_classifier(use_dora=True), tensors="B")) == {"B"}


def test_lora_biases_belong_to_the_posterior():
    assert roles(KronLoraLaplace(tiny_mlp(lora_bias=True))) == {"A", "B", "bias"}


@pytest.mark.parametrize("kind", ["lm_head", "tied lm_head"])
def test_of_lm_head_the_posterior_holds_the_choices_rows_alone(kind):
    la, _ = fitted(kind, KronLoraLaplace)
    (tensor,) = (t for t in la.tensors if "lm_head" in t.name and t.role == "B")
    assert tensor.weight.shape[0] == VOCABULARY
    assert tensor.shape[0] == 3
    sizes = [max(pair.outputs.matrix.shape) for pair in la.H_facs.pairs]
    assert max(sizes) <= 3 * HIDDEN < VOCABULARY


def test_laplace_torchs_own_classes_see_all_of_lm_head():
    model = tiny_llama(targets=("v_proj", "lm_head"))
    backend = StreamingGGN(letter_head(model), "classification")
    assert max(tensor.shape[0] for tensor in backend.tensors) == VOCABULARY


@pytest.mark.parametrize(
    ("build", "roles_of"),
    [
        (lambda: tiny_bert_classifier(), {"A", "B", "saved"}),
        (lambda: letter_head(tiny_llama(modules_to_save=["lm_head"])), {"A", "B", "saved"}),
    ],
)
def test_modules_to_save_are_taken_in_on_demand(build, roles_of):
    model, batch = build(), letter_batch(5)
    assert roles(KronLoraLaplace(model)) == {"A", "B"}
    la = FullLoraLaplace(model, include_modules_to_save=True)
    assert roles(la) == roles_of
    la.fit(chunks(batch, 3))
    jacobians = bruteforce_jacobians(la.model, batch, la.tensors)
    expected = explicit_ggn(jacobians, la.model(batch).detach())
    torch.testing.assert_close(la.H, expected, **EXACT)
    saved = [t for t in la.tensors if t.role == "saved"]
    assert {t.shape for t in saved} <= {(3, HIDDEN), (3, 1)}
    kron = KronLoraLaplace(model, include_modules_to_save=True)
    kron.fit(chunks(batch, 3))
    assert kron(batch).shape == (5, 3)


def test_other_modules_to_save_are_refused_by_name():
    model = tiny_llama(modules_to_save=["embed_tokens"])
    assert len(KronLoraLaplace(letter_head(model)).tensors) == 8
    with pytest.raises(UnsupportedLayerError, match=r"Embedding in .*embed_tokens"):
        KronLoraLaplace(letter_head(model), include_modules_to_save=True)


@pytest.mark.parametrize("kind", ["dora", "lora_bias", "embedding", "conv2d"])
def test_laplace_torchs_backends_are_refused_for_what_they_do_not_know(kind):
    from laplace.curvature import CurvlinopsGGN

    with pytest.raises(OptionError, match=r"CurvlinopsGGN.*Use the default backend"):
        KronLoraLaplace(KINDS[kind]().model, backend=CurvlinopsGGN)


def test_grouped_convolutions_are_refused_by_name():
    with pytest.warns(UserWarning, match="groups > 1"):  # PEFT's, on merging
        model = tiny_conv(2, conv_kwargs={"groups": 2})
    with pytest.raises(UnsupportedLayerError, match=r"'.*conv'.*grouped"):
        find_lora_tensors(model)
