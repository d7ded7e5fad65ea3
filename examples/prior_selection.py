"""How should the prior precision be chosen? Every rule, over tasks, training sizes and seeds.

Fine-tunes an adapter for each cell of the grid, chooses the prior precision by every rule and
prints the test NLL of each, beside the trained model (MAP), temperature scaling and the best prior
precision in hindsight. Adapters and results are cached: killed and started again, it goes on, and
a finished run prints its tables at once. ``--structures`` compares the posteriors' structures.

Reads ``DATA_DIR/TASK.{train,test}.jsonl`` of rows ``{"question", "choices", "answer"}``.
"""

from __future__ import annotations

import argparse
import json
import random
import time
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import torch
from laplace import Laplace
from peft import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from quickstart import build_head, fine_tune, fit_temperature
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from laplace_llm import shared_moments_grid
from laplace_llm.benchmark.models import SMOLLM2, load_model
from laplace_llm.function_space import FunctionSpace
from laplace_llm.kernel import training_space
from laplace_llm.links import CLOSED_FORMS, quasi_monte_carlo
from laplace_llm.moments import Moments
from laplace_llm.tuning.evidence import linear_mode_evidence
from laplace_llm.tuning.leave_one_out import held_out, smoothed_nll, thinned
from laplace_llm.tuning.val_grad import Interpolation, descend

GRID = torch.logspace(-4, 5, 55)
TASKS: dict[str, dict[str, Any]] = {
    "trec": {
        "head": "words",
        "prompt": "Question: {question}\nThe answer is a",
        "epochs": 8,
        "lr": 5e-4,
    },
    "sst2": {"head": "words", "prompt": "Review: {question}\nSentiment:", "epochs": 6, "lr": 5e-4},
    "openbookqa": {"head": "scored", "prompt": None, "epochs": 6, "lr": 1e-3},
    "arc-easy": {
        "head": "scored",
        "prompt": None,
        "epochs": 2,
        "lr": 5e-4,
        "normalization": "mean",
    },
}


def main() -> None:
    """Run what is not cached yet, then print the tables."""
    args = parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    cells = list(product(args.seeds, args.sizes, args.tasks))
    results = {}
    for number, (seed, size, task) in enumerate(cells, 1):
        name = f"{task}-{size}-{seed}"
        path = args.cache / f"{name}.{'structures' if args.structures else 'moments'}.pt"
        if not path.exists() and not args.tables:
            print(f"[{number}/{len(cells)}] {task}, {size} training questions, seed {seed}")
            cell = make_cell(args, task, size, seed)
            torch.save(structures(cell) if args.structures else collect(cell), path)
        if path.exists():
            results[task, size, seed] = _cached(path, args.structures)
    if args.structures:
        print(structure_table(results))
    else:
        print(rule_table(results), cell_table(results), link_table(results), sep="\n\n")


def _cached(path: Path, structures: bool) -> dict[str, Any]:
    """Return a cell's results; the rules are applied once to what was collected."""
    if structures:
        return torch.load(path)
    table = path.with_suffix(".json")
    if not table.exists() or table.stat().st_mtime < path.stat().st_mtime:
        table.write_text(json.dumps(rules(torch.load(path))))
    return json.loads(table.read_text())


def parse_args() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data-dir", type=Path, required=True)
    add("--model", default=SMOLLM2)
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    add("--sizes", nargs="+", type=int, default=[50, 100, 300])
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--val", type=int, default=50)
    add("--test", type=int, default=150)
    add("--structures", action="store_true", help="compare structures instead of rules")
    add("--tables", action="store_true", help="print what is cached, run nothing")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--cache", type=Path, default=Path("outputs/prior_selection"))
    return parser.parse_args()


class Cell:
    """A fine-tuned model under its head, and its labelled batches.

    Parameters
    ----------
    head : torch.nn.Module
        Maps a batch to (B, C) logits.
    loaders : dict[str, Iterable]
        Batches under "train", "val" and "test".
    """

    def __init__(self, head: nn.Module, loaders: dict[str, Any]) -> None:
        self.head = head
        self.loaders = loaders
        self.labels = {
            name: torch.cat([batch["labels"] for batch in loader])
            for name, loader in loaders.items()
        }

    def laplace(self, structure: str, **kwargs: Any) -> Any:
        """Return a fitted posterior."""
        la = Laplace(self.head, "classification", "lora", structure, **kwargs)
        la.fit(self.loaders["train"])
        return la


def make_cell(args: argparse.Namespace, task: str, size: int, seed: int) -> Cell:
    """Return a cell of the grid; its adapter is trained, or comes from the cache."""
    defaults = {"normalization": "sum", "separate": False}
    options = argparse.Namespace(**{**defaults, **TASKS[task]})
    train, test = (
        [json.loads(line) for line in (args.data_dir / f"{task}.{split}.jsonl").open()]
        for split in ("train", "test")
    )
    width = len(train[0]["choices"])
    train, test = ([r for r in rows if len(r["choices"]) == width] for rows in (train, test))
    random.Random(seed).shuffle(train)
    random.Random(0).shuffle(test)
    rows = {
        "train": train[:size],
        "val": train[1000 : 1000 + args.val],
        "test": test[: args.test],
    }
    torch.manual_seed(seed)
    model, tokenizer = load_model(args.model)
    torch.manual_seed(seed)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    peft_model = get_peft_model(model, lora).to(args.device)
    head, collate = build_head(options, peft_model, tokenizer, train)
    path = args.cache / f"{task}-{size}-{seed}.pt"
    if path.exists():
        set_peft_model_state_dict(peft_model, torch.load(path))
        head.eval()
    else:
        generator = torch.Generator().manual_seed(seed)
        shuffled = DataLoader(
            rows["train"], 8, shuffle=True, collate_fn=collate, generator=generator
        )
        fine_tune(head, peft_model, shuffled, options.epochs, options.lr)
        torch.save(get_peft_model_state_dict(peft_model), path)
    # Rows of like length share a batch; the order makes no difference to what follows.
    for part in rows.values():
        part.sort(key=lambda row: len(row["question"]) + max(map(len, row["choices"])))
    loaders = {name: DataLoader(part, 8, collate_fn=collate) for name, part in rows.items()}
    return Cell(head, loaders)


def collect(cell: Cell) -> dict[str, Any]:
    """Return all that the rules need of a cell, as tensors: the passes over the model.

    The latent moments of validation and test questions under every prior precision of `GRID`, the
    function space of the training questions, and what the marginal likelihood chooses.
    """
    kron, exact = cell.laplace("kron"), cell.laplace("lowrank", max_rank=None)
    saved: dict[str, Any] = {"space": vars(training_space(kron, cell.loaders["train"]))}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The marginal likelihood chose")
        for name, la in (("kron", kron), ("exact", exact)):
            la.optimize_prior_precision(method="marglik")
            saved["marglik", name] = la.prior_precision.item()
    for split in ("val", "test"):
        batches = tqdm(cell.loaders[split], desc=f"[Moments, {split}]")
        parts = [shared_moments_grid([kron, exact], batch, GRID) for batch in batches]
        for index, name in enumerate(("kron", "exact")):
            moments = [part[index] for part in parts]
            saved[split, name] = (
                torch.cat([m.mean for m in moments]).cpu(),
                torch.cat([m.covariance for m in moments], 1).cpu(),
            )
        saved[split, "labels"] = cell.labels[split]
    return saved


def rules(saved: dict[str, Any]) -> dict[str, Any]:
    """Return the test NLL of every rule on a cell, from what `collect` returned."""
    space = FunctionSpace(**saved["space"])
    val, val_labels = Moments(*saved["val", "kron"]), saved["val", "labels"]
    interval = torch.logspace(-4, 4, 100)
    chosen = {
        "loo (default)": loo(space, thinned(interval)),
        "marglik": saved["marglik", "kron"],
        "marglik, exact GGN": saved["marglik", "exact"],
        "marglik, linear mode": linear_mode_evidence(space, interval),
        "gridsearch on 50": GRID[int(losses_on(val, val_labels).argmin())],
        "val_grad on 50": descend(
            GRID,
            val.covariance[:, None],
            lambda v: F.nll_loss(quasi_monte_carlo(val.mean, v).log(), val_labels),
        ),
    }
    chosen = {name: float(value) for name, value in chosen.items()}
    labels = saved["test", "labels"]
    test = {name: Moments(*saved["test", name]) for name in ("kron", "exact")}
    mean = test["kron"].mean
    temperature = fit_temperature(val.mean, val_labels)
    at = {
        name: _at(test["exact" if "exact" in name else "kron"], value)
        for name, value in chosen.items()
    }
    curves = {name: losses_on(moments, labels) for name, moments in test.items()}
    best = test["kron"].at(int(curves["kron"].argmin()))
    return {
        "accuracy": float((mean.argmax(-1) == labels).float().mean()),
        "MAP": float(F.cross_entropy(mean, labels)),
        "temperature scaling on 50": float(F.cross_entropy(mean / temperature, labels)),
        "hindsight": {name: float(losses.min()) for name, losses in curves.items()},
        "chosen": chosen,
        "nll": {name: _nll(quasi_monte_carlo(*moments), labels) for name, moments in at.items()},
        "links": {
            name: {
                where: _nll(link(*moments), labels)
                for where, moments in (("hindsight", best), ("loo", at["loo (default)"]))
            }
            for name, link in LINKS.items()
        },
    }


def _at(moments: Moments, value: float) -> Moments:
    """Return the moments at a prior precision between those of `GRID`."""
    interpolation = Interpolation(GRID.to(moments.covariance), moments.covariance[:, None])
    return Moments(moments.mean, interpolation(torch.tensor([value]).log()))


def loo(space: FunctionSpace, interval: Tensor) -> Tensor:
    """Return what ``optimize_prior_precision()`` chooses, from the function space alone."""
    moments = held_out(space, interval)
    losses = [
        smoothed_nll(quasi_monte_carlo(*moments.at(g)), space.labels) for g in range(len(interval))
    ]
    return interval[int(torch.stack(losses).argmin())]


def losses_on(moments: Moments, labels: Tensor) -> Tensor:
    """Return the NLL (G,) under every prior precision of the moments."""
    grid = range(len(moments.covariance))
    return torch.tensor([_nll(quasi_monte_carlo(*moments.at(g)), labels) for g in grid])


def _nll(probs: Tensor, labels: Tensor) -> float:
    return float(F.nll_loss(probs.clamp_min(1e-30).log(), labels))


def monte_carlo(mean: Tensor, covariance: Tensor, samples: int = 10_000) -> Tensor:
    """Return the joint Monte-Carlo estimate that the links are compared with."""
    values, vectors = torch.linalg.eigh(covariance.double())
    root = (vectors * values.clamp_min(0).sqrt()[:, None, :]).to(mean)
    total = torch.zeros_like(mean)
    for _ in range(samples // 500):
        noise = torch.randn(500, mean.shape[1], dtype=mean.dtype)
        total += torch.softmax(mean[:, None] + noise @ root.mT, -1).mean(1)
    return total / (samples // 500)


LINKS = {**CLOSED_FORMS, "mc": monte_carlo}


STRUCTURES: dict[str, dict[str, Any]] = {
    "exact GGN": {"structure": "lowrank", "max_rank": None},
    "exact GGN, B only": {"structure": "lowrank", "max_rank": None, "tensors": "B"},
    "low-rank GGN, 128": {"structure": "lowrank", "max_rank": 128},
    "low-rank GGN, 32": {"structure": "lowrank", "max_rank": 32},
    "functional GP": {"structure": "gp"},
    "functional GP, 25 questions": {"structure": "gp", "n_subset": 25},
    "kron (default)": {"structure": "kron"},
    "kron, B only": {"structure": "kron", "tensors": "B"},
    "kron, exact sides": {"structure": "kron", "backend_kwargs": {"rank": 512}},
    "ekfac (default)": {"structure": "ekfac"},
    "ekfac, exact sides": {"structure": "ekfac", "backend_kwargs": {"rank": 512}},
    "kron, rank 10": {"structure": "kron", "backend_kwargs": {"rank": 10}},
    "kron, expand": {"structure": "kron", "backend_kwargs": {"kfac_approx": "expand"}},
    "kron, Monte-Carlo": {"structure": "kron", "backend_kwargs": {"stochastic": True}},
    "kron, ASDL (the paper)": {"structure": "kron", "backend": "asdl"},
    "diag": {"structure": "diag"},
}


def structures(cell: Cell) -> dict[str, Any]:
    """Return every structure's errors against the exact posterior, and its costs."""
    posteriors, rows = {}, {}
    for name, options in STRUCTURES.items():
        options = dict(options)
        if options.pop("backend", None) == "asdl":
            from laplace.curvature.asdl import AsdlGGN

            options["backend"] = AsdlGGN
        started = time.time()
        la = posteriors[name] = cell.laplace(options.pop("structure"), **options)
        rows[name] = {"fit": time.time() - started, "numbers": _numbers(la)}
    labels = cell.labels["test"]
    means: dict[str, list[Tensor]] = {name: [] for name in posteriors}
    covariances: dict[str, list[Tensor]] = {name: [] for name in posteriors}
    errors: dict[str, list[Tensor]] = {name: [] for name in posteriors}
    for batch in tqdm(cell.loaders["test"], desc="[Test]"):
        moments = shared_moments_grid(list(posteriors.values()), batch, GRID)
        reference = moments[0].covariance
        for name, m in zip(posteriors, moments, strict=True):
            means[name].append(m.mean)
            covariances[name].append(m.covariance)
            difference = (m.covariance - reference).flatten(-2).norm(dim=-1)
            errors[name].append(difference / reference.flatten(-2).norm(dim=-1))
    best = None
    for name, la in posteriors.items():
        losses = losses_on(Moments(torch.cat(means[name]), torch.cat(covariances[name], 1)), labels)
        own = int(losses.argmin())
        best = own if best is None else best
        la.prior_precision = GRID[best]
        started = time.time()
        for batch in list(cell.loaders["test"])[:2]:
            la(batch)
        rows[name] |= {
            "error": float(torch.cat(errors[name], 1)[best].mean()),
            "logdet": float(la.log_det_ratio),
            "predict": (time.time() - started) / min(16, len(labels)),
            "nll": float(losses[own]),
            "best": float(GRID[own]),
        }
    return rows


def _numbers(la: Any) -> int:
    """Return how many numbers a posterior keeps."""
    if hasattr(la.H, "store"):
        return la.H.store.count * la.H.store.columns
    if hasattr(la, "H_facs"):
        # q, k and v share the factor of their input.
        moments = {id(m): m for p in la.H_facs.pairs for m in (p.outputs, p.inputs)}
        shapes = [m.matrix.shape if hasattr(m, "matrix") else m.shape for m in moments.values()]
        corrected = getattr(la, "H_moments", None)
        shapes += [sums.shape for sums in corrected.kept + corrected.totals] if corrected else []
        return sum(shape.numel() for shape in shapes)
    return la.H.numel()


def rule_table(results: dict) -> str:
    """Return how far each rule is above hindsight, over all cells."""
    rows = []
    for name in ["MAP", "temperature scaling on 50", *next(iter(results.values()))["nll"]]:
        above, against_map, choices = [], [], []
        for result in results.values():
            nll = result.get(name, result["nll"].get(name))
            above.append(nll - result["hindsight"]["kron"])
            against_map.append(nll - result["MAP"])
            choices.append(result["chosen"].get(name))
        span = f"{min(choices):.2g} to {max(choices):.2g}" if choices[0] else ""
        rows.append(
            f"| {name:25} | {_mean(above):.3f} | {max(above):.3f} | {max(against_map):+.3f} "
            f"| {span:16} |"
        )
    gaps = [r["hindsight"]["kron"] - r["hindsight"]["exact"] for r in results.values()]
    header = (
        f"| rule, over {len(results)} cells | above hindsight, mean | worst | worst against MAP "
        "| prior precisions |\n| --- | ---: | ---: | ---: | --- |\n"
    )
    return (
        header
        + "\n".join(rows)
        + (
            f"\n\nKronecker against exact, each at its best prior: mean {_mean(gaps):+.4f}, "
            f"from {min(gaps):+.4f} to {max(gaps):+.4f}."
        )
    )


def cell_table(results: dict) -> str:
    """Return the test NLL of the main rules, cell by cell (seeds averaged)."""
    names = ["MAP", "temperature scaling on 50", "loo (default)", "gridsearch on 50", "marglik"]
    lines = [
        "| task | questions | seeds | accuracy | " + " | ".join([*names, "hindsight"]) + " |",
        "| --- | ---: | ---: | ---: |" + " ---: |" * (len(names) + 1),
    ]
    for task, size in dict.fromkeys((task, size) for task, size, _ in results):
        group = [r for (t, s, _), r in results.items() if (t, s) == (task, size)]
        cells = [_mean([r.get(n, r["nll"].get(n)) for r in group]) for n in names]
        cells.append(_mean([r["hindsight"]["kron"] for r in group]))
        lines.append(
            f"| {task} | {size} | {len(group)} | {_mean([r['accuracy'] for r in group]):.3f} | "
            + " | ".join(f"{cell:.3f}" for cell in cells)
            + " |"
        )
    return "\n".join(lines)


def link_table(results: dict) -> str:
    """Return each link's test NLL, at the best prior precision and at the chosen one."""
    lines = [
        "| link | hindsight prior | loo prior | worst against mc |",
        "| --- | ---: | ---: | ---: |",
    ]
    for link in LINKS:
        at = {
            where: [r["links"][link][where] for r in results.values()]
            for where in ("hindsight", "loo")
        }
        worst = max(
            abs(r["links"][link][where] - r["links"]["mc"][where])
            for r in results.values()
            for where in at
        )
        lines.append(
            f"| {link} | {_mean(at['hindsight']):.3f} | {_mean(at['loo']):.3f} | {worst:.3f} |"
        )
    return "\n".join(lines)


def structure_table(results: dict) -> str:
    """Return every structure's errors and costs, averaged over the cells."""
    lines = [
        f"| structure, over {len(results)} cells | covariance error | log det error | test NLL at "
        "its best prior | numbers kept | fit | prediction a question |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in STRUCTURES:
        rows = [result[name] for result in results.values()]
        exact = [result["exact GGN"] for result in results.values()]
        logdet = _mean([r["logdet"] / e["logdet"] - 1 for r, e in zip(rows, exact, strict=True)])
        lines.append(
            f"| {name} | {_mean([r['error'] for r in rows]):.3f} | {logdet:+.0%} "
            f"| {_mean([r['nll'] for r in rows]):.3f} "
            f"| {_mean([r['numbers'] for r in rows]) / 1e6:.1f} M "
            f"| {_mean([r['fit'] for r in rows]):.0f} s "
            f"| {_mean([r['predict'] for r in rows]):.2f} s |"
        )
    return "\n".join(lines)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
