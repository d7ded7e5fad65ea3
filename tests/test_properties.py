"""What holds for any model, rank, split, padding and choices; `properties` draws them."""

import math

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, assume, given, settings
from models import (
    bruteforce_jacobians,
    decaying_rows,
    frozen,
    gather,
    inputs_of,
    kept,
    labels_of,
    randn,
    scoring_head,
    select,
    tiny_llama,
    tiny_tokenizer,
)
from properties import (
    KINDS,
    Problem,
    cut,
    dense_covariance,
    examples,
    problems,
    same,
    splits,
    widened,
)
from torch import Tensor
from torch.nn import functional as F

from laplace_llm import ChoiceScoringCollator, MultipleChoiceCollator, StreamingEF
from laplace_llm.links import CLOSED_FORMS, OF_DIFFERENCES
from laplace_llm.rows import LowRankGGN
from laplace_llm.sketch import DenseMoment, SketchedMoment, spectra

settings.register_profile("unhurried", suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")

SEEDS = st.integers(0, 2**16)
EXACT = ("full", "lowrank", "diag")
PARAMETRIC = ("kron", "ekfac", "lowrank", "diag", "full")
MOVABLE = ("llama letters", "gpt2 letters", "llama scored", "llama packed", "ragged scored")


# The fit ------------------------------------------------------------------------------------------


def arranged(data, problem: Problem, batch) -> list:
    """Return a batch's examples in a drawn order, in drawn batches with drawn padding."""
    parts = cut(batch, data.draw(splits(len(labels_of(batch))), label="batches"))
    sides = KINDS[problem.kind].sides
    if not sides:
        return parts
    paddings = st.tuples(st.integers(0, 3), st.sampled_from(sides))
    return [widened(part, *data.draw(paddings, label="padding")) for part in parts]


def beliefs(la, problem: Problem) -> tuple:
    """Return what a posterior says of other examples, and of its data."""
    moments = la._glm_predictive_distribution(inputs_of(problem.batch(3, seed=9)))
    return (*moments, la.log_marginal_likelihood().detach())


def tolerance(problem: Problem) -> dict[str, float]:
    """Return the tolerance for a fit that summed the same numbers in another order.

    Eigenvectors of eigenvalues that differ by 1e-12 of the largest move by 1e-3 with rounding, and
    the moments along them, which are what ekfac keeps, with them.
    """
    return {"rtol": 1e-4, "atol": 1e-6} if problem.structure == "ekfac" else {}


@examples(30)
@given(st.data(), problems())
def test_a_fit_depends_on_no_split_order_or_padding(data, problem):
    batch = problem.batch()
    la = problem.posterior([batch])
    other = problem.posterior(arranged(data, problem, batch))
    assert other.n_data == la.n_data == problem.n
    same(beliefs(other, problem), beliefs(la, problem), **tolerance(problem))


@examples(12)
@given(st.data(), problems(kinds=MOVABLE))
def test_a_fit_depends_on_no_side_of_padding(data, problem):
    side = {"left": "right", "right": "left"}[problem.side]
    la, other = problem.posterior([problem.batch()]), problem.posterior([problem.batch(side=side)])
    same(beliefs(other, problem), beliefs(la, problem), **tolerance(problem))


@examples(12)
@given(st.data(), problems())
def test_fits_add_up(data, problem):
    batch = problem.batch()
    parts = arranged(data, problem, batch)
    la, other = problem.posterior([batch]), problem.posterior(*[[part] for part in parts])
    assert other.n_data == problem.n
    same(beliefs(other, problem), beliefs(la, problem), **tolerance(problem))


# The posterior ------------------------------------------------------------------------------------


def output_hessians(problem: Problem, logits: Tensor, labels: Tensor) -> Tensor:
    """Return the curvature (B, C, C) in logit space of the problem's backend."""
    p = torch.softmax(logits, -1)
    if problem.options["backend"] is StreamingEF:
        residual = p - F.one_hot(labels, p.shape[1])
        return residual[:, :, None] * residual[:, None, :]
    return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]


@examples(16)
@given(problems(EXACT), st.floats(1e-3, 100))
def test_the_posterior_is_that_of_brute_force(problem, strength):
    batch = problem.batch()
    la = problem.posterior([batch])
    x = inputs_of(batch)
    jacobians, logits = bruteforce_jacobians(la.model, x, la.tensors), la.model(x).detach()
    hessians = output_hessians(problem, logits, labels_of(batch))
    curvature = torch.einsum("ncp,ncd,ndq->pq", jacobians, hessians, jacobians)
    if problem.structure == "diag":
        curvature = curvature.diagonal().diag()
    largest = float(torch.linalg.eigvalsh(curvature)[-1])
    same(dense_curvature(la), curvature, rtol=0, atol=1e-12 * largest)
    # Inverses are as exact as the condition number allows, which is 1 + 1 / strength.
    delta = strength * max(largest, 1e-6)
    la.prior_precision = delta
    expected = torch.linalg.inv(curvature + delta * torch.eye(len(curvature)).to(curvature))
    same(dense_covariance(la), expected, rtol=0, atol=1e-10 / delta)


def dense_curvature(la) -> Tensor:
    if isinstance(la.H, LowRankGGN):
        return kept(la.H)
    return la.H if la.H.ndim == 2 else la.H.diag()


@examples(16)
@given(problems(("kron",), kinds=("llama letters", "gpt2 letters", "bert classes", "mlp")))
def test_factors_are_those_of_their_definition(problem):
    options = {**problem.options, "backend_kwargs": {**problem.options["backend_kwargs"]}}
    options["backend_kwargs"]["rank"] = None
    problem = problem._replace(options=options)
    batch, expand = problem.batch(), options["backend_kwargs"]["kfac_approx"] == "expand"
    la = problem.posterior([batch])
    pairs = [(pair.outputs.matrix, pair.inputs.matrix) for pair in la.H_facs.pairs]
    expected = [[torch.zeros_like(matrix) for matrix in pair] for pair in pairs]
    for index in range(problem.n):
        alone = unpadded(select(batch, [index]))
        inputs, gradients, logits = tokens(la, inputs_of(alone))
        hessian = output_hessians(problem, logits, labels_of(alone))[0]
        for (outputs_sum, inputs_sum), a, g in zip(expected, inputs, gradients, strict=True):
            if expand:
                inputs_sum += a.T @ a / len(a)
                outputs_sum += torch.einsum("ctd,ce,etf->df", g, hessian, g)
            else:
                inputs_sum += torch.outer(a.mean(0), a.mean(0))
                outputs_sum += g.sum(1).T @ hessian @ g.sum(1)
    for pair, sums in zip(pairs, expected, strict=True):
        same(list(pair), sums)


def unpadded(batch):
    """Return a batch of one example without its padding."""
    if not hasattr(batch, "items"):
        return batch
    real = batch["attention_mask"][0].bool()
    return {key: value if key == "labels" else value[:, real] for key, value in batch.items()}


def tokens(la, x) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Return inputs (T, in), gradients (C, T, out) of each tensor and logits, for one example."""
    seen: dict = {}

    def hook(module, args, output):
        output.requires_grad_()
        seen[module] = args[0].detach().flatten(0, -2), output

    handles = [tensor.module.register_forward_hook(hook) for tensor in la.tensors]
    logits = la.model(x)
    for handle in handles:
        handle.remove()
    outputs = [seen[tensor.module][1] for tensor in la.tensors]
    rows = [torch.autograd.grad(value, outputs, retain_graph=True) for value in logits[0]]
    columns = zip(*rows, strict=True)
    gradients = [torch.stack([g.flatten(0, -2) for g in column]) for column in columns]
    return [seen[tensor.module][0] for tensor in la.tensors], gradients, logits.detach()


@examples(16)
@given(problems(PARAMETRIC), st.floats(0.1, 100))
def test_the_evidence_is_that_of_the_dense_formula(problem, delta):
    batch = problem.batch()
    la = problem.posterior([batch], prior_precision=delta)
    with torch.no_grad():
        fit = F.cross_entropy(la.model(inputs_of(batch)), labels_of(batch), reduction="sum")
    ratio = -torch.linalg.slogdet(dense_covariance(la))[1] - la.n_params * math.log(delta)
    expected = -fit - 0.5 * (ratio + delta * la.mean.square().sum())
    same(la.log_marginal_likelihood().detach(), expected, rtol=1e-8)


@examples(16)
@given(problems())
def test_a_state_comes_back_bit_for_bit(problem):
    la = problem.posterior([problem.batch()], prior_precision=3.0)
    other = problem.posterior()
    other.load_state_dict(la.state_dict())
    assert frozen(other.state_dict()) == frozen(la.state_dict())
    x = inputs_of(problem.batch(3, seed=9))
    assert frozen(other(x)) == frozen(la(x))


# Predictions --------------------------------------------------------------------------------------


@examples(20)
@given(problems(), st.floats(0.1, 100))
def test_moments_are_those_of_the_dense_formula(problem, delta):
    la = problem.posterior([problem.batch()], prior_precision=delta)
    x = inputs_of(problem.batch(3, seed=9))
    jacobians, logits = bruteforce_jacobians(la.model, x, la.tensors), la.model(x).detach()
    covariance = dense_covariance(la)
    if problem.structure in ("kron", "ekfac"):
        covariance = torch.linalg.inv(la.posterior_precision.to_matrix())
    mean, f_var = la._glm_predictive_distribution(x)
    same(mean, logits)
    same(f_var, jacobians @ covariance @ jacobians.mT)


@examples(20)
@given(st.data(), problems())
def test_predictions_depend_on_no_split_order_or_padding(data, problem):
    la = problem.posterior([problem.batch()])
    batch = problem.batch(5, seed=9)
    parts = data.draw(splits(5), label="batches")
    link = data.draw(st.sampled_from([*CLOSED_FORMS, "bridge"]), label="link")
    whole = la(inputs_of(batch), link_approx=link)
    sides = KINDS[problem.kind].sides or ("right",)
    for part in parts:
        padding = data.draw(st.tuples(st.integers(0, 3), st.sampled_from(sides)), label="padding")
        alone = la(inputs_of(widened(select(batch, part), *padding)), link_approx=link)
        same(alone, whole[part])


@examples(16)
@given(st.data(), problems(kinds=("llama letters", "llama scored", "mlp")))
def test_permuted_choices_have_permuted_predictions(data, problem):
    order = data.draw(st.permutations(range(problem.choices)), label="order")
    ranks = torch.tensor(order).argsort()
    train, test = problem.batch(), problem.batch(3, seed=9)
    la = problem.posterior([train])

    class Permuted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = la.model

        def forward(self, x):
            return self.model(x)[:, order]

    def relabelled(batch):
        if hasattr(batch, "items"):
            return {**batch, "labels": ranks[batch["labels"]]}
        return batch[0], ranks[batch[1]]

    options = {**problem.options}
    other = type(la)(Permuted(), "classification", **options)
    other.fit([relabelled(train)])
    for link in (*CLOSED_FORMS, "bridge"):
        expected = la(inputs_of(test), link_approx=link)[:, order]
        same(other(inputs_of(test), link_approx=link), expected)


@examples(8)
@given(st.data(), st.integers(2, 5), st.integers(0, 3))
def test_permuted_scored_choices_have_permuted_predictions(data, choices, seed):
    problem = Problem(
        "llama scored", 2, choices, 3, seed, "right", "kron", {"tensors": "AB", "backend": None}
    )
    order = data.draw(st.permutations(range(choices)), label="order")
    la = problem.posterior([problem.batch()])
    batch = problem.batch(3, seed=9)
    keys = ("input_ids", "attention_mask", "choice_mask")
    moved = {key: batch[key][:, order] for key in keys}
    same(la(moved), la(batch)[:, order])


@examples(20)
@given(problems(), st.floats(-6, 4), st.floats(0.01, 3))
def test_variances_are_psd_and_fall_with_the_prior_precision(problem, log_delta, step):
    la = problem.posterior([problem.batch()])
    x = inputs_of(problem.batch(3, seed=9))
    weak, strong = 10**log_delta, 10 ** (log_delta + step)
    mean, (wide, narrow) = la.moments_grid(x, torch.tensor([weak, strong], dtype=torch.float64))
    scale = wide.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True)
    for covariance in (wide, narrow, wide - narrow):
        same(covariance, covariance.mT, rtol=0, atol=1e-12 * float(scale.max()))
        assert bool((torch.linalg.eigvalsh(covariance) >= -1e-10 * scale).all())
    la.prior_precision = weak
    absent = mean == -torch.inf
    for link in (*CLOSED_FORMS, "mc", "bridge"):
        probabilities = la(x, link_approx=link)
        assert bool(((probabilities >= 0) & (probabilities <= 1 + 1e-12)).all())
        same(probabilities.sum(-1), torch.ones(3).double())
        assert bool((probabilities[absent] == 0).all())


# Links --------------------------------------------------------------------------------------------


@st.composite
def moments(draw) -> tuple[Tensor, Tensor]:
    """Draw means (B, C), some of them -inf, and covariances of any rank and scale."""
    rows, choices = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    mean = draw(st.floats(0, 20)) * randn(rows, choices, seed=draw(SEEDS))
    root = randn(rows, choices, draw(st.integers(1, choices)), seed=draw(SEEDS))
    covariance = 10 ** draw(st.floats(-8, 4)) * root @ root.mT
    absent = randn(rows, choices, seed=draw(SEEDS)) > draw(st.sampled_from([0.5, 9]))
    absent[torch.arange(rows), mean.argmax(-1)] = False
    return mean.masked_fill(absent, -torch.inf), covariance


def assume_no_ties(mean: Tensor) -> None:
    """At a tie, which likeliest class is subtracted in 'qmc' is left to rounding."""
    gaps = mean.sort(-1).values.diff(dim=-1)
    assume(bool((gaps.isnan() | (gaps > 1e-3)).all()))  # NaN: inf - inf


@examples(100)
@given(moments(), st.sampled_from(sorted(CLOSED_FORMS)))
def test_links_give_probabilities(drawn, link):
    mean, covariance = drawn
    probabilities = CLOSED_FORMS[link](mean, covariance)
    assert bool(((probabilities >= 0) & (probabilities <= 1 + 1e-12)).all())
    same(probabilities.sum(-1), torch.ones(len(mean)).double())
    assert bool((probabilities[mean == -torch.inf] == 0).all())


@examples(60)
@given(moments(), st.sampled_from(sorted(OF_DIFFERENCES)), st.floats(-30, 30), st.floats(0, 30))
def test_links_of_differences_ignore_what_logits_share(drawn, link, shift, variance):
    mean, covariance = drawn
    assume_no_ties(mean)
    expected = CLOSED_FORMS[link](mean, covariance)
    moved = CLOSED_FORMS[link](mean + shift, covariance + variance)
    # A variance of 30 beside one of 1e-8 leaves 1e-6 of the latter's digits.
    same(moved, expected, rtol=1e-6, atol=1e-6)


@examples(60)
@given(st.data(), moments(), st.sampled_from(sorted(CLOSED_FORMS)))
def test_links_follow_the_order_of_the_choices(data, drawn, link):
    mean, covariance = drawn
    assume_no_ties(mean)
    order = data.draw(st.permutations(range(mean.shape[1])))
    moved = CLOSED_FORMS[link](mean[:, order], covariance[:, order][:, :, order])
    same(moved, CLOSED_FORMS[link](mean, covariance)[:, order], rtol=1e-6, atol=1e-8)


@examples(40)
@given(st.data(), moments())
def test_ties_are_broken_by_no_more_than_the_error_of_integration(data, drawn):
    mean, covariance = drawn
    mean = mean.where(mean == -torch.inf, 0)
    order = data.draw(st.permutations(range(mean.shape[1])))
    moved = CLOSED_FORMS["qmc"](mean[:, order], covariance[:, order][:, :, order])
    same(moved, CLOSED_FORMS["qmc"](mean, covariance)[:, order], rtol=0, atol=0.04)


# Sketches -----------------------------------------------------------------------------------------


@st.composite
def rows_of(draw, dim: int) -> Tensor:
    """Draw rows (n, d), of any rank and decay."""
    n, rank = draw(st.integers(1, 12)), draw(st.integers(1, dim))
    left = decaying_rows(n, rank, decades=draw(st.floats(0, 6)))
    return 10 ** draw(st.floats(-3, 3)) * left @ randn(rank, dim, seed=draw(SEEDS))


def sketched(columns: int, *parts: Tensor) -> SketchedMoment:
    """Return the sketch of rows."""
    dim = parts[0].shape[1]
    zeros = torch.zeros(dim, columns, dtype=torch.float64)
    moment = SketchedMoment(zeros, torch.zeros((), dtype=torch.float64))
    for part in parts:
        moment.add(part)
    return moment


def merged(columns: int, *parts: Tensor) -> SketchedMoment:
    first, *others = [sketched(columns, part) for part in parts]
    for other in others:
        first.merge(other)
    return first


DIM = 16


@examples(40)
@given(st.integers(1, DIM), st.lists(rows_of(DIM), min_size=3, max_size=3))
def test_sketches_add_up_in_any_order(columns, parts):
    a, b, c = parts
    whole = sketched(columns, torch.cat(parts))
    size = float(whole.trace)
    nested = sketched(columns, a)
    nested.merge(merged(columns, b, c))
    for other in (merged(columns, a, b, c), merged(columns, c, b, a), nested):
        same(other.sketch, whole.sketch, rtol=0, atol=1e-13 * size)
        same(other.trace, whole.trace, rtol=1e-13, atol=0)


@examples(60)
@given(st.integers(1, DIM), rows_of(DIM))
def test_a_sketch_never_exceeds_the_matrix_and_keeps_its_trace(columns, rows):
    matrix, size = rows.T @ rows, float(rows.square().sum())
    moment = sketched(columns, rows)
    same(moment.trace, matrix.trace(), rtol=1e-12, atol=0)
    (spectrum,) = spectra([moment])
    found = (spectrum.vectors * spectrum.values) @ spectrum.vectors.T
    assert float(torch.linalg.eigvalsh(matrix - found)[0]) >= -1e-10 * size
    same(spectrum.dense().trace(), matrix.trace(), rtol=1e-9, atol=0)
    assert bool((spectrum.values >= 0).all() & (spectrum.rest >= 0))


@examples(40)
@given(st.data(), st.integers(1, 6))
def test_a_sketch_is_exact_where_its_rank_suffices(data, rank):
    left = randn(data.draw(st.integers(rank, 12)), rank, seed=data.draw(SEEDS))
    rows = left @ randn(rank, DIM, seed=data.draw(SEEDS) + 1)
    columns = data.draw(st.integers(2 * rank, DIM))
    matrix = rows.T @ rows
    (spectrum,) = spectra([sketched(columns, rows)])
    same(spectrum.dense(), matrix, rtol=0, atol=1e-9 * float(matrix.trace()))
    (exact,) = spectra([DenseMoment(matrix)])
    same(exact.dense(), matrix, rtol=0, atol=1e-12 * float(matrix.trace()))


@examples(60)
@given(st.data(), rows_of(DIM), st.integers(1, 12))
def test_truncation_keeps_the_leading_eigenpairs(data, rows, rank):
    ggn = gather(rows, (5, 4, 7), max_rank=rank, batch=len(rows))
    values = torch.linalg.svdvals(rows).square()
    size = float(values.sum())
    same(ggn.trace, values.sum(), rtol=1e-12, atol=0)
    if len(rows) <= rank + max(rank // 4, 1):  # truncated once, at the end
        best = values[rank:].sum()
        same(ggn.lost_trace, best, rtol=0, atol=1e-10 * size)
        same(torch.linalg.matrix_norm(rows.T @ rows - kept(ggn), "nuc"), best, 0, 1e-10 * size)


@examples(60)
@given(st.data(), rows_of(DIM), st.integers(1, 12))
def test_what_truncation_lost_is_what_it_says(data, rows, rank):
    batch = data.draw(st.integers(1, len(rows)))
    ggn = gather(rows, (5, 4, 7), max_rank=rank, batch=batch)
    lost, size = rows.T @ rows - kept(ggn), float(rows.square().sum())
    assert ggn.rank <= rank
    assert float(torch.linalg.eigvalsh(lost)[0]) >= -1e-10 * size
    same(lost.trace(), ggn.lost_trace, rtol=0, atol=1e-10 * size)
    best = torch.linalg.svdvals(rows).square()[rank:].sum()
    assert float(ggn.lost_trace) >= float(best) - 1e-10 * size


# Collators ----------------------------------------------------------------------------------------

WORDS = ("what", "colour", "is", "the", "sky", "sea", "red", "blue", "green", "and")
TEXTS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(" ".join)


@st.composite
def questions(draw) -> list[dict]:
    """Draw rows of 2 to 5 choices, with answers."""
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        choices = draw(st.lists(TEXTS, min_size=2, max_size=5))
        answer = draw(st.integers(0, len(choices) - 1))
        rows.append({"question": draw(TEXTS), "choices": choices, "answer": answer})
    return rows


def words(ids: Tensor) -> str:
    return " ".join(tiny_tokenizer().convert_ids_to_tokens(ids.tolist()))


@examples(40)
@given(questions(), st.sampled_from(["left", "right"]), st.booleans(), st.integers(5, 6))
def test_batches_of_prompts_decode_to_their_questions(rows, side, bos, n_choices):
    collate = MultipleChoiceCollator(tiny_tokenizer(side, bos=bos), n_choices=n_choices)
    batch = collate(rows)
    assert batch["labels"].tolist() == [row["answer"] for row in rows]
    present = batch.get("choice_present", torch.ones(len(rows), n_choices, dtype=torch.bool))
    assert present.sum(1).tolist() == [len(row["choices"]) for row in rows]
    for ids, mask, row in zip(batch["input_ids"], batch["attention_mask"], rows, strict=True):
        asked = words(ids[mask.bool()]).removeprefix("<s> ")
        assert asked.startswith(f"Question : {row['question']} A . {row['choices'][0]} B . ")
        assert asked.endswith("Answer :")


@examples(40)
@given(questions(), st.sampled_from(["left", "right"]), st.booleans(), st.booleans())
def test_batches_of_choices_decode_to_their_questions(rows, side, bos, packed):
    batch = ChoiceScoringCollator(tiny_tokenizer(side, bos=bos), packed=packed)(rows)
    assert batch["labels"].tolist() == [row["answer"] for row in rows]
    for index, row in enumerate(rows):
        part = {key: value[index] for key, value in batch.items()}
        ids, asked = part["input_ids"], f"Question : {row['question']} Answer :"
        for number, choice in enumerate(row["choices"]):
            if packed:
                chosen = part["choice_ids"] == number
                head = ids[part["attention_mask"].bool() & (part["choice_ids"] < 0)]
                assert words(ids[chosen]) == choice
            else:
                chosen, real = part["choice_mask"][number], part["attention_mask"][number].bool()
                head = ids[number][real & ~chosen]
                assert words(ids[number][chosen]) == choice
            assert words(head).removeprefix("<s> ") == asked


@examples(15)
@given(questions(), st.booleans(), st.sampled_from(["sum", "mean"]))
def test_sides_of_padding_and_packing_have_the_same_scores(rows, bos, normalization):
    head = scoring_head(SHARED_MODEL, normalization)
    with torch.no_grad():
        scores = [
            head(ChoiceScoringCollator(tiny_tokenizer(side, bos=bos), packed=packed)(rows))
            for side in ("left", "right")
            for packed in (True, False)
        ]
    for other in scores[1:]:
        same(other, scores[0])


SHARED_MODEL = tiny_llama()
