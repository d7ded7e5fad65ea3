"""The example that compares rules for the prior precision, on a tiny model."""

import json
import sys

import prior_selection
import pytest
import torch
from models import chunks, letter_batch, letter_head
from prior_selection import GRID, LINKS, STRUCTURES, Cell, collect, rules, structures
from torch.nn import functional as F

ARGV = ["prior_selection.py", "--data-dir", "nowhere", "--tasks", "trec", "--sizes", "50"]


def cell():
    sizes = {"train": 12, "val": 6, "test": 8}
    batches = {name: letter_batch(n, seed=i) for i, (name, n) in enumerate(sizes.items())}
    return Cell(letter_head(), {name: chunks(batch, 4) for name, batch in batches.items()})


def test_rules_choose_and_score_what_the_posterior_itself_does():
    tiny = cell()
    saved = collect(tiny)
    result = json.loads(json.dumps(rules(saved)))
    logits = torch.cat([tiny.head(batch).detach() for batch in tiny.loaders["test"]])
    assert result["MAP"] == pytest.approx(float(F.cross_entropy(logits, tiny.labels["test"])))
    la = tiny.laplace("kron")
    for rule, options in {
        "loo (default)": {},
        "marglik, linear mode": {"method": "marglik", "evidence": "linear_mode"},
        "gridsearch on 50": {
            "val_loader": tiny.loaders["val"],
            "log_prior_prec_max": 5,
            "grid_size": len(GRID),
        },
        "marglik": {"method": "marglik"},
    }.items():
        la.optimize_prior_precision(**options)
        assert result["chosen"][rule] == pytest.approx(la.prior_precision.item(), rel=1e-4)
        losses = [
            F.nll_loss(la(batch).log(), batch["labels"], reduction="sum")
            for batch in tiny.loaders["test"]
        ]
        assert result["nll"][rule] == pytest.approx(float(sum(losses)) / 8, rel=1e-2)
    assert set(result["links"]) == set(LINKS)
    assert result["links"]["qmc"]["loo"] == pytest.approx(result["nll"]["loo (default)"])
    assert result["links"]["mc"]["loo"] == pytest.approx(result["nll"]["loo (default)"], abs=0.02)


def test_structures_are_measured_against_the_exact_one():
    result = structures(cell())
    assert list(result) == list(STRUCTURES)
    assert result["exact GGN"]["error"] == 0
    assert all(row["error"] > 1e-3 for name, row in result.items() if "GGN" not in name)
    # 12 examples of 3 classes have 24 rows, which rank 32 holds.
    assert result["low-rank GGN, 128"]["error"] < 1e-9
    table = prior_selection.structure_table({("trec", 50, 0): result})
    assert all(f"| {name} |" in table for name in STRUCTURES)


def test_finished_cells_are_not_run_again(tmp_path, monkeypatch, capsys):
    made = []

    def make_cell(_args, task, size, seed):
        made.append((task, size, seed))
        return cell()

    monkeypatch.setattr(prior_selection, "make_cell", make_cell)
    monkeypatch.setattr(sys, "argv", [*ARGV, "--seeds", "0", "--cache", str(tmp_path)])
    prior_selection.main()
    first = capsys.readouterr().out
    assert made == [("trec", 50, 0)]
    monkeypatch.setattr(sys, "argv", [*ARGV, "--seeds", "0", "1", "--cache", str(tmp_path)])
    prior_selection.main()
    assert made == [("trec", 50, 0), ("trec", 50, 1)]
    monkeypatch.setattr(sys, "argv", [*ARGV, "--seeds", "0", "--tables", "--cache", str(tmp_path)])
    prior_selection.main()
    assert len(made) == 2
    assert capsys.readouterr().out.endswith(first.split("\n", 1)[1])
    assert "loo (default)" in first
    assert "| trec | 50 | 1 |" in first
