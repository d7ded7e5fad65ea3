"""What holds for any model, rank, split into batches, padding and number of choices."""

from functools import lru_cache
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import (
    CAUSAL_ARCHITECTURES,
    CHOICE_TOKENS,
    bruteforce_jacobians,
    explicit_ggn,
    frozen,
    letter_batch,
    randn,
    select,
    tiny,
)
from test_contract import precision_of

import laplace_llm
from laplace_llm import MultipleChoiceHead, from_pretrained
from laplace_llm.sketch import new_moment, spectra

EXACT = {"rtol": 1e-7, "atol": 1e-8}
STRUCTURES: dict[str, dict[str, Any]] = {
    "kron": {},
    "kron, expand": {"backend_kwargs": {"kfac_approx": "expand"}},
    "kron, rank 3": {"backend_kwargs": {"rank": 3}},
    "ekfac": {},
    "lowrank": {"max_rank": None},
    "diag": {},
    "full": {},
    "gp": {},
}
# The same examples in every run, as CI has to; `--hypothesis-profile=many` looks further.
settings.register_profile(
    "default", derandomize=True, deadline=None, max_examples=20, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
settings.register_profile(
    "many", deadline=None, max_examples=500, suppress_health_check=list(HealthCheck)
)
settings.load_profile("default")


class Data(NamedTuple):
    """Questions, however they are written down."""

    n: int
    choices: int
    seed: int

    def batch(self, side: str = "right", extra: int = 0) -> dict[str, torch.Tensor]:
        return letter_batch(self.n, seed=self.seed, pad=side, extra=extra, classes=self.choices)


@lru_cache(maxsize=64)
def head(architecture: str, rank: int, choices: int) -> MultipleChoiceHead:
    model = tiny(CAUSAL_ARCHITECTURES[architecture], rank=rank)
    return MultipleChoiceHead(model, CHOICE_TOKENS[:choices])


data = st.builds(Data, st.integers(2, 6), st.integers(2, 5), st.integers(0, 50))
architectures = st.sampled_from(["llama", "gpt2", "opt"])
ranks = st.integers(1, 4)
sides = st.sampled_from(["AB", "B"])
structures = st.sampled_from(sorted(STRUCTURES))
precisions = st.floats(-3, 3).map(lambda exponent: 10.0**exponent)


@st.composite
def written_down(draw: Any, questions: Data) -> list[Any]:
    """Batches of the questions: any order, split, padding side and width."""
    order = draw(st.permutations(range(questions.n)))
    ends = sorted(draw(st.sets(st.integers(1, questions.n - 1))))
    parts = []
    for start, end in zip([0, *ends], [*ends, questions.n], strict=True):
        side = draw(st.sampled_from(["left", "right"]))
        batch = questions.batch(side, draw(st.integers(0, 3)))
        parts.append(select(batch, list(order[start:end])))
    return parts


def fitted(
    questions: Data, architecture: str, rank: int, structure: str, loader: Any = None, **kwargs: Any
) -> Any:
    la = laplace_llm.Laplace(
        head(architecture, rank, questions.choices),
        hessian_structure=structure.partition(",")[0],
        **{**STRUCTURES[structure], **kwargs},
    )
    la.fit([questions.batch()] if loader is None else loader)
    return la


@given(st.data(), data, architectures, ranks, structures, sides)
def test_a_fit_does_not_depend_on_how_questions_are_written_down(
    draws, questions, architecture, rank, structure, tensors
):
    whole = fitted(questions, architecture, rank, structure, tensors=tensors)
    loader = draws.draw(written_down(questions))
    parts = fitted(questions, architecture, rank, structure, loader, tensors=tensors)
    torch.testing.assert_close(precision_of(parts), precision_of(whole), **EXACT)
    torch.testing.assert_close(parts.loss, whole.loss, **EXACT)
    assert parts.n_data == questions.n
    test = Data(3, questions.choices, questions.seed + 1)
    expected = whole(test.batch())
    for batch in draws.draw(written_down(test)):
        labels = batch["input_ids"]
        found = parts(batch)
        assert found.shape == (len(labels), questions.choices)
        for row in found:  # each is one of the rows, whichever order they came in
            assert (expected - row).abs().amax(1).min() < 1e-7


@given(st.data(), data, architectures, ranks, structures)
def test_fits_add_up(draws, questions, architecture, rank, structure):
    whole = fitted(questions, architecture, rank, structure)
    first, *others = draws.draw(written_down(questions))
    parts = fitted(questions, architecture, rank, structure, [first])
    for batch in others:
        parts.fit([batch], override=False)
    torch.testing.assert_close(precision_of(parts), precision_of(whole), **EXACT)


@given(data, architectures, ranks, st.sampled_from(["full", "lowrank", "diag"]), sides, precisions)
def test_the_posterior_and_its_predictions_are_those_of_brute_force(
    questions, architecture, rank, structure, tensors, precision
):
    la = fitted(questions, architecture, rank, structure, tensors=tensors)
    la.prior_precision = precision
    batch, test = questions.batch(), Data(2, questions.choices, questions.seed + 1).batch()
    jacobians = bruteforce_jacobians(la.model, batch, la.tensors)
    dense = explicit_ggn(jacobians, la.model(batch).detach())
    dense = dense.diagonal().diag() if structure == "diag" else dense
    dense = dense + precision * torch.eye(len(dense)).double()
    rows = bruteforce_jacobians(la.model, test, la.tensors)
    expected = torch.stack([row @ torch.linalg.solve(dense, row.T) for row in rows])
    mean, covariance = la._glm_predictive_distribution(test)
    torch.testing.assert_close(mean, la.model(test).detach())
    torch.testing.assert_close(covariance, expected, rtol=1e-6, atol=1e-9 / precision)


@given(data, architectures, ranks, structures, precisions)
def test_variances_are_those_of_a_distribution_and_fall_with_the_prior_precision(
    questions, architecture, rank, structure, precision
):
    la = fitted(questions, architecture, rank, structure)
    test = Data(3, questions.choices, questions.seed + 1).batch()
    values = precision * torch.tensor([1.0, 2.0, 100.0], dtype=torch.float64)
    grid = la.moments_grid(test, values).covariance
    scale = grid.diagonal(dim1=-2, dim2=-1).amax()
    assert torch.equal(grid, grid.mT) or (grid - grid.mT).abs().max() <= 1e-12 * scale
    assert torch.linalg.eigvalsh(grid).min() >= -1e-10 * scale
    assert torch.linalg.eigvalsh(grid[:-1] - grid[1:]).min() >= -1e-10 * scale
    la.prior_precision = precision
    for link in ("qmc", "mean_field", "probit"):
        probabilities = la(test, link_approx=link)
        assert probabilities.min() >= 0
        torch.testing.assert_close(probabilities.sum(1), torch.ones(3).double())


@given(st.data(), data, architectures, st.sampled_from(["kron", "lowrank", "diag"]))
def test_permuted_choices_permute_predictions(draws, questions, architecture, structure):
    la = fitted(questions, architecture, 2, structure)
    order = torch.tensor(draws.draw(st.permutations(range(questions.choices))))
    tokens = [CHOICE_TOKENS[index] for index in order]
    batch = questions.batch()
    other = laplace_llm.Laplace(
        MultipleChoiceHead(la.model.model, tokens), hessian_structure=structure
    )
    other.fit([{**batch, "labels": order.argsort()[batch["labels"]]}])
    for link in ("mean_field", "probit"):
        expected = la(batch, link_approx=link)[:, order]
        torch.testing.assert_close(other(batch, link_approx=link), expected, **EXACT)
    torch.testing.assert_close(other(batch), la(batch)[:, order], rtol=0, atol=2e-3)  # qmc's points


@given(data, architectures, ranks, structures, sides, precisions)
def test_a_round_trip_is_exact(questions, architecture, rank, structure, tensors, precision):
    la = fitted(questions, architecture, rank, structure, tensors=tensors)
    la.prior_precision = precision
    batch = questions.batch("left", 2)
    state, expected = frozen(la.state_dict()), la(batch)
    other = fitted(questions._replace(seed=99), architecture, rank, structure, tensors=tensors)
    other.load_state_dict(la.state_dict())
    with TemporaryDirectory() as folder:
        la.save_pretrained(folder)
        loaded = from_pretrained(la.model.model, folder)
    for each in (other, loaded):
        assert frozen(each.state_dict()) == state
        assert torch.equal(each(batch), expected)


@given(st.data(), data, structures)
def test_an_interrupted_fit_goes_on_from_any_batch(draws, questions, structure):
    loader = draws.draw(written_down(questions))
    at, every = draws.draw(st.integers(0, len(loader))), draws.draw(st.integers(1, 3))

    def broken() -> Any:
        yield from loader[:at]
        raise KeyboardInterrupt

    class Broken:
        def __iter__(self) -> Any:
            return broken()

    with TemporaryDirectory() as folder:
        kwargs = {"checkpoint_dir": folder, "checkpoint_every": every}
        la = fitted(questions, "llama", 2, structure)
        with pytest.raises(KeyboardInterrupt):
            la.fit(Broken(), **kwargs)
        la.fit(loader, **kwargs)
    expected = fitted(questions, "llama", 2, structure, loader)
    assert frozen(la.state_dict()) == frozen(expected.state_dict())


@given(
    st.integers(1, 30), st.integers(5, 40), st.integers(1, 8), st.integers(0, 30),
    st.integers(0, 99),
)  # fmt: skip
def test_sketches_add_up_and_never_exceed_what_they_are_of(rows, dim, rank, cut, seed):
    data = randn(rows, dim, seed=seed) * torch.logspace(0, -3, rows, dtype=torch.float64)[:, None]
    whole = new_moment(dim, rank, torch.float64, "cpu")
    left, right = (new_moment(dim, rank, torch.float64, "cpu") for _ in range(2))
    whole.add(data)
    left.add(data[:cut])
    right.add(data[cut:])
    right.merge(left)
    for mine, theirs in zip(right.tensors(), whole.tensors(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    exact = data.T @ data
    torch.testing.assert_close(whole.trace, exact.trace())
    (spectrum,) = spectra([whole])
    U, values = spectrum.vectors, spectrum.values
    known = (U * values) @ U.T
    assert torch.linalg.eigvalsh(exact - known).min() >= -1e-7 * exact.trace()
    torch.testing.assert_close(spectrum.dense().trace(), exact.trace(), rtol=1e-6, atol=0)
    if rows <= 2 * rank:
        torch.testing.assert_close(spectrum.dense(), exact, rtol=1e-5, atol=1e-6 * exact.trace())
