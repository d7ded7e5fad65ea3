"""Strategies of the property tests: models, ranks, splits, paddings and choices, all small."""

import os
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from hypothesis import settings
from hypothesis import strategies as st
from models import (
    Labelled,
    choice_batch,
    letter_batch,
    letter_head,
    mlp_batch,
    packed_batch,
    ragged_choices,
    ragged_letters,
    scoring_head,
    select,
    tiny_bert_classifier,
    tiny_gpt2,
    tiny_llama,
    tiny_mlp,
)
from torch import Tensor

import laplace_llm
from laplace_llm import StreamingEF, StreamingGGN

# A default run draws the same examples every time. With LAPLACE_LLM_PROPERTIES=thorough every run
# draws other ones, and twenty times as many.
THOROUGH = os.environ.get("LAPLACE_LLM_PROPERTIES") == "thorough"


def examples(count: int) -> settings:
    """Return the settings of a property that is tried on so many examples by default."""
    count *= 20 if THOROUGH else 1
    return settings(
        max_examples=count, deadline=None, derandomize=not THOROUGH, database=None, print_blob=True
    )


class Kind(NamedTuple):
    """How to build a model of some rank, and its batches ``make(n, seed, choices, pad)``."""

    model: Any
    make: Any
    sides: tuple[str, ...] = ("left", "right")  # on which padding may stand


def _letters(n: int, seed: int, choices: int, pad: str) -> Labelled:
    return letter_batch(n, seed=seed, classes=choices, pad=pad)


def _classes(n: int, seed: int, _choices: int, pad: str) -> Labelled:
    return letter_batch(n, seed=seed, classes=3, pad="right")


def _scored(n: int, seed: int, choices: int, pad: str) -> Labelled:
    return choice_batch(n, choices, seed=seed, pad=pad)


def _packed(n: int, seed: int, choices: int, pad: str) -> Labelled:
    return packed_batch(n, choices, seed=seed, pad=pad)


KINDS: dict[str, Kind] = {
    "llama letters": Kind(
        lambda rank, choices: letter_head(tiny_llama(rank=rank), choices), _letters
    ),
    "gpt2 letters": Kind(
        lambda rank, choices: letter_head(tiny_gpt2(rank=rank), choices), _letters
    ),
    "llama scored": Kind(
        lambda rank, _: scoring_head(tiny_llama(rank=rank, targets=("v_proj",))), _scored
    ),
    "llama packed": Kind(
        lambda rank, _: scoring_head(tiny_llama(rank=rank, targets=("v_proj",))), _packed
    ),
    "bert classes": Kind(lambda rank, _: tiny_bert_classifier(rank=rank), _classes, ("right",)),
    "mlp": Kind(
        lambda rank, choices: tiny_mlp(rank=rank, outputs=choices),
        lambda n, seed, choices, pad: mlp_batch(n, seed, outputs=choices),
        sides=(),
    ),
    "ragged letters": Kind(
        lambda rank, _: letter_head(tiny_llama(rank=rank), 4),
        lambda n, seed, choices, pad: ragged_letters(n, seed),
    ),
    "ragged scored": Kind(
        lambda rank, _: scoring_head(tiny_llama(rank=rank, targets=("v_proj",))),
        lambda n, seed, choices, pad: ragged_choices(n, seed, pad),
    ),
}


@lru_cache(maxsize=64)
def built(kind: str, rank: int, choices: int) -> Any:
    return KINDS[kind].model(rank, choices)


class Problem(NamedTuple):
    """A model, its data, and how the posterior is made."""

    kind: str
    rank: int
    choices: int
    n: int
    seed: int
    side: str
    structure: str
    options: dict[str, Any]

    @property
    def model(self) -> Any:
        return built(self.kind, self.rank, self.choices)

    def batch(self, n: int | None = None, seed: int | None = None, side: str | None = None) -> Any:
        """Return examples whose tokens depend on the seed alone."""
        make = KINDS[self.kind].make
        n, seed = self.n if n is None else n, self.seed if seed is None else seed
        return make(n, seed, self.choices, self.side if side is None else side)

    def posterior(self, *loaders: Any, **kwargs: Any) -> Any:
        """Return the posterior, fitted to each loader on top of the others."""
        la = laplace_llm.Laplace(
            self.model, "classification", "lora", self.structure, **self.options, **kwargs
        )
        for index, loader in enumerate(loaders):
            la.fit(loader, override=index == 0)
        return la


STRUCTURES = ("kron", "ekfac", "lowrank", "diag", "full", "gp")


@st.composite
def problems(
    draw: Any, structures: tuple[str, ...] = STRUCTURES, kinds: tuple[str, ...] = tuple(KINDS)
) -> Problem:
    """Draw a problem; sketched factors and both backends included."""
    structure = draw(st.sampled_from(structures))
    options: dict[str, Any] = {"tensors": draw(st.sampled_from(["AB", "B"]))}
    backend = draw(st.sampled_from([StreamingGGN, StreamingEF])) if structure != "gp" else None
    options["backend"] = backend
    if structure in ("kron", "ekfac"):
        options["backend_kwargs"] = {
            "kfac_approx": draw(st.sampled_from(["reduce", "expand"])),
            "rank": draw(st.sampled_from([None, 2, 7])),
        }
    if structure == "lowrank":
        options["max_rank"] = None
    return Problem(
        kind=draw(st.sampled_from(kinds)),
        rank=draw(st.integers(1, 5)),
        choices=draw(st.integers(2, 5)),
        n=draw(st.integers(1, 7)),
        seed=draw(st.integers(0, 3)),
        side=draw(st.sampled_from(["left", "right"])),
        structure=structure,
        options=options,
    )


@st.composite
def splits(draw: Any, n: int) -> list[list[int]]:
    """Draw an order of n examples and its cuts into batches."""
    order = draw(st.permutations(range(n)))
    cuts = sorted(draw(st.sets(st.integers(1, n - 1)))) if n > 1 else []
    return [list(order[a:b]) for a, b in pairwise([0, *cuts, n])]


def cut(batch: Labelled, parts: list[list[int]]) -> list[Any]:
    return [select(batch, part) for part in parts]


def widened(batch: Any, columns: int, side: str) -> Any:
    """Return a batch with columns of padding on either side of every sequence."""
    if not hasattr(batch, "items"):
        return batch
    fill = {"choice_ids": -1}
    length = batch["input_ids"].shape[-1]
    out = {}
    for key, value in batch.items():
        if value.ndim >= 2 and value.shape[-1] == length and key != "choice_present":
            extra = value.new_full((*value.shape[:-1], columns), fill.get(key, 0))
            value = torch.cat([extra, value] if side == "left" else [value, extra], -1)
        out[key] = value
    return out


def dense_covariance(la: Any) -> Tensor:
    """Return the posterior's (P, P) covariance: what it says of the weights themselves."""
    sizes = [tensor.numel for tensor in la.tensors]
    identity = torch.eye(la.n_params, dtype=la._dtype)
    return la._variance([part[None] for part in identity.split(sizes, 1)])[0]


def same(actual: Any, expected: Any, rtol: float = 1e-7, atol: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)
