"""Side by side with laplace-torch: its own classes, factory and backends."""

import json
import os
import subprocess
import sys
from typing import Any

import laplace
import pytest
import torch
from laplace.curvature import AsdlGGN, CurvlinopsEF, CurvlinopsGGN
from models import (
    bruteforce_jacobians,
    choice_batch,
    explicit_ggn,
    letter_batch,
    letter_head,
    mlp_batch,
    scoring_head,
    tiny_bert_classifier,
    tiny_gpt2,
    tiny_llama,
    tiny_mlp,
)
from torch import Tensor, nn

import laplace_llm
from laplace_llm import (
    DiagLoraLaplace,
    EkfacLoraLaplace,
    FullLoraLaplace,
    FunctionalLoraLaplace,
    KronLoraLaplace,
    LowRankLoraLaplace,
    SequenceClassificationHead,
    StreamingEF,
    StreamingGGN,
)
from laplace_llm.adapters import find_lora_tensors
from laplace_llm.structures import STRUCTURES as CLASSES

STRUCTURES = ("kron", "diag", "full")
EXPAND = {"kfac_approx": "expand"}
NN = {"pred_type": "nn", "link_approx": "mc", "n_samples": 5}
MC = {"link_approx": "mc", "n_samples": 5}


def lora(model: nn.Module, structure: str = "kron", batch: Any = None, **kwargs: Any) -> Any:
    likelihood = kwargs.pop("likelihood", "classification")
    la = laplace.Laplace(model, likelihood, "lora", structure, **kwargs)
    la.fit([letter_batch(5, pad=None) if batch is None else batch])
    return la


# The factory --------------------------------------------------------------------------------------

OURS = {
    "lora kron": "laplace_llm.structures.kron.KronLoraLaplace",
    "lora ekfac": "laplace_llm.structures.ekfac.EkfacLoraLaplace",
    "lora lowrank": "laplace_llm.structures.lowrank.LowRankLoraLaplace",
    "lora diag": "laplace_llm.structures.diag.DiagLoraLaplace",
    "lora full": "laplace_llm.structures.full.FullLoraLaplace",
    "lora gp": "laplace_llm.structures.gp.FunctionalLoraLaplace",
}
BUILT_IN = {
    "all full": "laplace.baselaplace.FullLaplace",
    "all kron": "laplace.baselaplace.KronLaplace",
    "all lowrank": "laplace.baselaplace.LowRankLaplace",
    "all diag": "laplace.baselaplace.DiagLaplace",
    "all gp": "laplace.baselaplace.FunctionalLaplace",
    "last_layer full": "laplace.lllaplace.FullLLLaplace",
    "last_layer kron": "laplace.lllaplace.KronLLLaplace",
    "last_layer diag": "laplace.lllaplace.DiagLLLaplace",
    "last_layer gp": "laplace.lllaplace.FunctionalLLLaplace",
    "subnetwork full": "laplace.subnetlaplace.FullSubnetLaplace",
    "subnetwork diag": "laplace.subnetlaplace.DiagSubnetLaplace",
}
# As laplace.Laplace makes its map.
MAP = """
import json
import laplace_llm
from laplace.baselaplace import BaseLaplace
from laplace.laplace import _all_subclasses
print(json.dumps({
    " ".join(cls._key): cls.__module__ + "." + cls.__name__
    for cls in _all_subclasses(BaseLaplace) if hasattr(cls, "_key")
}))
"""


@pytest.mark.slow
def test_keys_in_new_processes():
    """The parent walks a set, whose order differs between processes."""
    runs = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", MAP],
            env={**os.environ, "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("0", "1")
    ]
    for run in runs:
        output, _ = run.communicate(timeout=300)
        assert run.returncode == 0
        assert json.loads(output) == BUILT_IN | OURS


def test_no_class_inherits_a_key():
    """So the order of the set cannot matter."""
    classes = laplace.laplace._all_subclasses(laplace.BaseLaplace)
    ours = [cls for cls in classes if cls.__module__.startswith("laplace_llm")]
    assert {cls for cls in ours if hasattr(cls, "_key")} == set(CLASSES)
    assert all("_key" in vars(cls) for cls in ours if hasattr(cls, "_key"))


@pytest.mark.parametrize(
    ("structure", "cls"),
    [
        ("kron", KronLoraLaplace),
        ("ekfac", EkfacLoraLaplace),
        ("gp", FunctionalLoraLaplace),
        ("lowrank", LowRankLoraLaplace),
        ("diag", DiagLoraLaplace),
        ("full", FullLoraLaplace),
    ],
)
@pytest.mark.parametrize("factory", [laplace.Laplace, laplace_llm.Laplace])
def test_both_factories_give_our_classes(factory, structure, cls):
    la = factory(
        letter_head(), "classification", subset_of_weights="lora", hessian_structure=structure
    )
    assert type(la) is cls


def test_defaults_of_our_factory():
    la = laplace_llm.Laplace(letter_head())
    assert type(la) is KronLoraLaplace
    assert type(la.backend) is StreamingGGN
    assert la.likelihood == "classification"


def test_our_factory_passes_arguments_on():
    la = laplace_llm.Laplace(
        tiny_mlp(), "regression", "lora", "diag", 0.5, prior_precision=3.0, backend=StreamingEF
    )
    assert type(la) is DiagLoraLaplace
    assert (la.likelihood, float(la.sigma_noise), float(la.prior_precision)) == (
        "regression",
        0.5,
        3.0,
    )
    assert type(la.backend) is StreamingEF


@pytest.mark.parametrize(
    ("subset", "structure"), [("all", "kron"), ("all", "diag"), ("last_layer", "full")]
)
def test_other_combinations_go_to_the_parent(subset, structure):
    model = tiny_mlp(dtype=torch.float32).merge_and_unload()
    ours = laplace_llm.Laplace(
        model, "classification", subset_of_weights=subset, hessian_structure=structure
    )
    theirs = laplace.Laplace(model, "classification", subset, structure)
    assert type(ours) is type(theirs)


# The parent's backends ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theirs", "ours"), [(CurvlinopsGGN, StreamingGGN), (CurvlinopsEF, StreamingEF)]
)
@pytest.mark.parametrize("model", [letter_head, lambda: letter_head(tiny_gpt2())])
def test_curvlinops_kron_equals_expand_without_padding(model, theirs, ours):
    la = lora(model(), backend=theirs)
    reference = lora(model(), backend=ours, backend_kwargs=EXPAND)
    torch.testing.assert_close(la.H.to_matrix(), reference.H.to_matrix())
    torch.testing.assert_close(la.log_marginal_likelihood(), reference.log_marginal_likelihood())
    batch = letter_batch(3, seed=1)
    torch.testing.assert_close(la(batch), reference(batch))


def test_curvlinops_does_not_know_of_padding():
    batch = letter_batch(5)
    la = lora(letter_head(), batch=batch, backend=CurvlinopsGGN)
    reference = lora(letter_head(), batch=batch, backend_kwargs=EXPAND)
    assert (la.H.to_matrix() - reference.H.to_matrix()).abs().max() > 1e-3


def reference_for(theirs: type, head: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the GGN or empirical Fisher of a batch, (P, P), by brute force."""
    jacobians = bruteforce_jacobians(head, batch, find_lora_tensors(head))
    logits = head(batch).detach()
    if theirs is not CurvlinopsEF:
        return explicit_ggn(jacobians, logits)
    residual = torch.softmax(logits, 1)
    residual[torch.arange(len(logits)), batch["labels"]] -= 1
    gradients = torch.einsum("nc,ncp->np", residual, jacobians)
    return gradients.T @ gradients


@pytest.mark.parametrize("theirs", [CurvlinopsGGN, CurvlinopsEF, AsdlGGN])
@pytest.mark.parametrize("make", [(letter_head, letter_batch), (scoring_head, choice_batch)])
def test_full_curvature_of_the_parents_backends(make, theirs):
    head, batch = make[0](), make[1](4)
    la = lora(head, "full", batch, backend=theirs)
    expected = reference_for(theirs, head, batch)
    torch.testing.assert_close(la.H, expected, rtol=1e-5, atol=1e-5)
    assert la(batch).shape == (4, 3)


def test_diagonal_of_curvlinops():
    head, batch = letter_head(), letter_batch(4)
    la = lora(head, "diag", batch, backend=CurvlinopsGGN)
    torch.testing.assert_close(la.H, reference_for(CurvlinopsGGN, head, batch).diagonal())


def test_curvlinops_ef_has_no_diagonal_for_mappings():
    """As in the parent, which says so in a ValueError."""
    la = laplace.Laplace(letter_head(), "classification", "lora", "diag", backend=CurvlinopsEF)
    with pytest.raises(ValueError, match="CurvlinopsEF"):
        la.fit([letter_batch(3)])


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("theirs", [CurvlinopsGGN, CurvlinopsEF, AsdlGGN])
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_on_plain_layers_the_parents_backends_equal_ours(likelihood, theirs, structure):
    batch = mlp_batch(6, regression=likelihood == "regression")
    ours = StreamingEF if theirs is CurvlinopsEF else StreamingGGN
    la = lora(tiny_mlp(), structure, batch, backend=theirs, likelihood=likelihood)
    reference = lora(tiny_mlp(), structure, batch, backend=ours, likelihood=likelihood)
    torch.testing.assert_close(la.loss, reference.loss)
    tolerance = {"rtol": 1e-5, "atol": 1e-5}  # curvlinops goes through float32
    torch.testing.assert_close(
        la.log_marginal_likelihood(), reference.log_marginal_likelihood(), **tolerance
    )
    pairs = zip(_tuple(la(batch[0])), _tuple(reference(batch[0])), strict=True)
    for got, expected in pairs:
        torch.testing.assert_close(got, expected, **tolerance)


def _tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def test_asdl_kron_is_the_papers_convention():
    """Inputs and gradients are summed over tokens, without 1/T: the curvature is T times larger."""
    batch = letter_batch(5, pad=None)
    length = batch["input_ids"].shape[1]
    la = lora(letter_head(), batch=batch, backend=AsdlGGN)
    reference = lora(letter_head(), batch=batch, backend_kwargs=EXPAND)
    torch.testing.assert_close(la.H.to_matrix(), length * reference.H.to_matrix())


def test_a_bare_classifier_is_wrapped_for_the_parents_backends():
    la = lora(tiny_bert_classifier(), batch=letter_batch(4), backend=CurvlinopsGGN)
    assert isinstance(la.model, SequenceClassificationHead)
    assert la(letter_batch(2)).shape == (2, 3)


def test_asdl_diag_and_prediction_work():
    la = lora(letter_head(), "diag", backend=AsdlGGN)
    assert bool((la.H >= 0).all())
    assert la(letter_batch(2)).shape == (2, 3)


@pytest.mark.parametrize("theirs", [CurvlinopsGGN, AsdlGGN])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_several_fits_add_up_with_the_parents_backends(structure, theirs):
    together = lora(letter_head(), structure, letter_batch(4, pad=None), backend=theirs)
    parts = laplace.Laplace(letter_head(), "classification", "lora", structure, backend=theirs)
    for half in (slice(0, 2), slice(2, 4)):
        part = {k: v[half] for k, v in letter_batch(4, pad=None).items()}
        parts.fit([part], override=False)
    assert parts.n_data == 4
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(
        parts.log_marginal_likelihood(), together.log_marginal_likelihood(), **tolerance
    )


# Precision ----------------------------------------------------------------------------------------


def mixed(base: torch.dtype) -> nn.Module:
    """Return a head with float32 adapters on a base of the given precision."""
    model = tiny_llama(dtype=torch.float32)
    adapters = {tensor.weight for tensor in find_lora_tensors(model)}
    for parameter in model.parameters():
        if parameter not in adapters:
            parameter.data = parameter.data.to(base)
    return letter_head(model)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_low_precision_base_keeps_everything_in_float32(structure):
    la = lora(mixed(torch.bfloat16), structure)
    la.optimize_prior_precision(method="marglik", n_steps=3)
    assert la._dtype == torch.float32
    values = {
        "prior": la.prior_precision,
        "mean": la.mean,
        "loss": la.loss,
        "marglik": la.log_marginal_likelihood(),
        "prediction": la(letter_batch(2)),
        "samples": la.sample(2),
        "scatter": la.scatter,
    }
    if structure == "kron":
        for index, pair in enumerate(la.H_facs.pairs):
            values |= {f"{index}B": pair.outputs.matrix, f"{index}A": pair.inputs.matrix}
    else:
        values["H"] = la.H
    if structure == "full":  # a dense GGN has no inverse in single precision
        assert values.pop("H").dtype == torch.float64
    assert {name: value.dtype for name, value in values.items()} == dict.fromkeys(
        values, torch.float32
    )


@pytest.mark.parametrize("structure", [*STRUCTURES, "lowrank", "ekfac", "gp"])
def test_low_precision_base_is_close_to_a_float32_base(structure):
    la, reference = (lora(mixed(dtype), structure) for dtype in (torch.bfloat16, torch.float32))
    got, expected = la.log_marginal_likelihood(), reference.log_marginal_likelihood()
    assert abs(float(got - expected)) < 0.05 * abs(float(expected))
    assert (la(letter_batch(4)) - reference(letter_batch(4))).abs().max() < 0.05


def test_low_precision_base_has_the_adapters_own_mean_and_prior():
    """bfloat16 would round both to three digits."""
    la, reference = lora(mixed(torch.bfloat16)), lora(mixed(torch.float32))
    for posterior in (la, reference):
        posterior.prior_precision = 1.2345678
    assert torch.equal(la.mean, reference.mean)
    assert torch.equal(la.scatter, reference.scatter)
    assert torch.equal(la.log_det_prior_precision, reference.log_det_prior_precision)


def test_low_precision_adapters_work():
    la = lora(letter_head(dtype=torch.bfloat16))
    la.optimize_prior_precision(method="marglik", n_steps=3)
    assert la._dtype == torch.float32
    torch.testing.assert_close(la(letter_batch(3)).sum(1), torch.ones(3))
    torch.testing.assert_close(la(letter_batch(3), **NN).sum(1), torch.ones(3))


@pytest.mark.parametrize("structure", [*STRUCTURES, "lowrank", "ekfac", "gp"])
def test_float32_marginal_likelihood_equals_float64(structure):
    single, double = tiny_llama(), tiny_llama()
    single = single.float()
    double.load_state_dict(single.state_dict())
    la, reference = (lora(letter_head(m), structure) for m in (single, double))
    for value in (1e-2, 1.0, 1e2):
        prior = torch.tensor(value)
        torch.testing.assert_close(
            la.log_marginal_likelihood(prior).double(),
            reference.log_marginal_likelihood(prior.double()),
            rtol=1e-4,
            atol=1e-3,
        )


# Damping ------------------------------------------------------------------------------------------


def test_damping_changes_the_posterior_and_matches_its_formula():
    plain, damped = (lora(letter_head(), prior_precision=0.7, damping=d) for d in (False, True))
    blocks = []
    for pair in damped.H_facs.pairs:
        outputs, inputs = pair.outputs.matrix, pair.inputs.matrix / damped.n_data
        root = 0.7**0.5
        blocks.append(
            torch.kron(
                outputs + root * torch.eye(len(outputs)), inputs + root * torch.eye(len(inputs))
            )
        )
    dense = torch.block_diag(*blocks)
    torch.testing.assert_close(damped.posterior_precision.to_matrix(), dense)
    torch.testing.assert_close(damped.log_det_posterior_precision, torch.logdet(dense))

    batch = letter_batch(3, seed=1)
    jacobians = bruteforce_jacobians(damped.model, batch, damped.tensors)
    covariance = jacobians @ torch.linalg.inv(dense) @ jacobians.mT
    torch.testing.assert_close(damped._glm_predictive_distribution(batch)[1], covariance)
    difference = plain._glm_predictive_distribution(batch)[1] - covariance
    assert difference.abs().max() > 1e-3


def test_damping_reaches_the_grid():
    damped, batch = lora(letter_head(), damping=True), letter_batch(3, seed=1)
    grid = damped.moments_grid(batch, torch.tensor([0.1, 5.0])).covariance
    for value, expected in zip((0.1, 5.0), grid, strict=True):
        damped.prior_precision = value
        torch.testing.assert_close(damped._glm_predictive_distribution(batch)[1], expected)


# Random numbers -----------------------------------------------------------------------------------


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("structure", [*STRUCTURES, "lowrank", "ekfac", "gp"])
@pytest.mark.parametrize(
    "draw",
    [
        pytest.param(lambda la, g: la(letter_batch(3), **MC, generator=g), id="mc"),
        pytest.param(lambda la, g: la(letter_batch(3), **NN, generator=g), id="nn"),
        pytest.param(lambda la, g: la.sample(2, generator=g), id="sample"),
        pytest.param(
            lambda la, g: la.predictive_samples(letter_batch(3), n_samples=2, generator=g),
            id="samples-glm",
        ),
        pytest.param(
            lambda la, g: la.functional_samples(letter_batch(3), "nn", n_samples=2, generator=g),
            id="samples-nn",
        ),
    ],
)
def test_a_generators_seed_decides_the_draw(structure, draw):
    la = lora(letter_head(), structure)
    first = draw(la, seeded(1))
    torch.manual_seed(123)
    assert torch.equal(draw(la, seeded(1)), first)
    assert not torch.equal(draw(la, seeded(2)), first)


def test_a_generator_moves_on():
    la, generator = lora(letter_head()), seeded(1)
    first = la(letter_batch(3), **MC, generator=generator)
    assert not torch.equal(la(letter_batch(3), **MC, generator=generator), first)


def test_without_a_generator_the_global_seed_decides():
    la = lora(letter_head())
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append((la(letter_batch(3), **MC), la(letter_batch(3), **NN)))
    for first, again, other in zip(*draws, strict=True):
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
