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
from quickstart import SMOLLM2, build_head, fine_tune, fit_temperature, load_model, map_logits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from laplace_llm import shared_moments_grid

GRID = torch.logspace(-4, 5, 37)
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
RULES = {
    "loo (default)": {"method": "loo"},
    "marglik": {"method": "marglik"},
    "marglik, linear mode": {"method": "marglik", "evidence": "linear_mode"},
    "gridsearch on 50": {"method": "gridsearch"},
    "val_grad on 50": {"method": "val_grad"},
}
LINKS = {
    "probit": {},
    "mean_field": {},
    "qmc": {},
    "mc": {"n_samples": 1000},
}


def main() -> None:
    """Run what is not cached yet, then print the tables."""
    args = parse_args()
    folder = args.cache / ("structures" if args.structures else "rules")
    folder.mkdir(parents=True, exist_ok=True)
    cells = list(product(args.seeds, args.sizes, args.tasks))
    results = {}
    for number, (seed, size, task) in enumerate(cells, 1):
        path = folder / f"{task}-{size}-{seed}.json"
        if not path.exists() and not args.tables:
            print(f"[{number}/{len(cells)}] {task}, {size} training questions, seed {seed}")
            cell = make_cell(args, task, size, seed)
            path.write_text(json.dumps(structures(cell) if args.structures else rules(cell)))
        if path.exists():
            results[task, size, seed] = json.loads(path.read_text())
    if args.structures:
        print(structure_table(results))
    else:
        print(rule_table(results), cell_table(results), link_table(results), sep="\n\n")


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
    add("--test", type=int, default=200)
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


def rules(cell: Cell) -> dict[str, Any]:
    """Return the test NLL of every rule on a cell, and what it took."""
    started = time.time()
    kron, exact = cell.laplace("kron"), cell.laplace("lowrank", max_rank=None)
    chosen, seconds = {}, {}
    for name, options in RULES.items():
        seconds[name] = -time.time()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The marginal likelihood chose")
            kron.optimize_prior_precision(val_loader=_val(cell, options), **options)
        seconds[name] += time.time()
        chosen[name] = kron.prior_precision.item()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The marginal likelihood chose")
        exact.optimize_prior_precision(method="marglik")
    chosen["marglik, exact GGN"] = exact.prior_precision.item()

    values = torch.tensor([*GRID.tolist(), *chosen.values()])
    labels = cell.labels["test"]
    nlls: dict[str, list[Tensor]] = {"kron": [], "exact": []}
    map_probs, link_moments = [], []
    for batch in tqdm(cell.loaders["test"], desc="[Test]"):
        moments = shared_moments_grid([kron, exact], batch, values)
        map_probs.append(moments[0].mean.softmax(-1))
        link_moments.append(moments[0])
        for name, la, m in zip(nlls, (kron, exact), moments, strict=True):
            nlls[name].append(
                torch.stack([_nlls(la(m.at(g)), batch["labels"]) for g in range(len(values))])
            )
    losses = {name: torch.cat(parts, 1).mean(1).tolist() for name, parts in nlls.items()}
    probs = torch.cat(map_probs).cpu()
    logits = probs.log()
    temperature = fit_temperature(map_logits(cell.head, cell.loaders["val"]), cell.labels["val"])
    best = min(range(len(GRID)), key=losses["kron"].__getitem__)
    result = {
        "accuracy": float((probs.argmax(-1) == labels).float().mean()),
        "MAP": float(_nlls(probs, labels).mean()),
        "temperature scaling on 50": float(F.cross_entropy(logits / temperature, labels)),
        "grid": {name: values[: len(GRID)] for name, values in losses.items()},
        "chosen": chosen,
        "nll": dict(zip(chosen, losses["kron"][len(GRID) :], strict=True)),
        "seconds": seconds,
        "links": {},
    }
    result["nll"]["marglik, exact GGN"] = losses["exact"][-1]
    for link, options in LINKS.items():
        at = {"hindsight": best, "loo": len(GRID) + list(chosen).index("loo (default)")}
        result["links"][link] = {
            where: float(
                torch.cat(
                    [
                        _nlls(kron(m.at(index), link_approx=link, **options), batch["labels"])
                        for m, batch in zip(link_moments, cell.loaders["test"], strict=True)
                    ]
                ).mean()
            )
            for where, index in at.items()
        }
    result["total seconds"] = time.time() - started
    return result


def _val(cell: Cell, options: dict[str, Any]) -> DataLoader | None:
    return cell.loaders["val"] if options["method"] in ("gridsearch", "val_grad") else None


def _nlls(probs: Tensor, labels: Tensor) -> Tensor:
    return F.nll_loss(probs.cpu().clamp_min(1e-30).log(), labels, reduction="none")


STRUCTURES: dict[str, dict[str, Any]] = {
    "exact GGN": {"structure": "lowrank", "max_rank": None},
    "exact GGN, B only": {"structure": "lowrank", "max_rank": None, "tensors": "B"},
    "low-rank GGN, 128": {"structure": "lowrank", "max_rank": 128},
    "low-rank GGN, 32": {"structure": "lowrank", "max_rank": 32},
    "kron (default)": {"structure": "kron"},
    "kron, B only": {"structure": "kron", "tensors": "B"},
    "kron, rank 64": {"structure": "kron", "backend_kwargs": {"rank": 64}},
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
    nlls: dict[str, list[Tensor]] = {name: [] for name in posteriors}
    errors: dict[str, list[Tensor]] = {name: [] for name in posteriors}
    for batch in tqdm(cell.loaders["test"], desc="[Test]"):
        moments = shared_moments_grid(list(posteriors.values()), batch, GRID)
        reference = moments[0].covariance
        for (name, la), m in zip(posteriors.items(), moments, strict=True):
            nlls[name].append(
                torch.stack([_nlls(la(m.at(g)), batch["labels"]) for g in range(len(GRID))])
            )
            difference = (m.covariance - reference).flatten(-2).norm(dim=-1)
            errors[name].append(difference / reference.flatten(-2).norm(dim=-1))
    best = None
    for name, la in posteriors.items():
        losses = torch.cat(nlls[name], 1).mean(1)
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
        pairs = [m for p in la.H_facs.pairs for m in (p.outputs, p.inputs)]
        return sum((m.matrix if hasattr(m, "matrix") else m.sketch).numel() for m in pairs)
    return la.H.numel()


def rule_table(results: dict) -> str:
    """Return how far each rule is above hindsight, over all cells."""
    rows = []
    for name in ["MAP", "temperature scaling on 50", *next(iter(results.values()))["nll"]]:
        above, against_map, choices = [], [], []
        for result in results.values():
            nll = result.get(name, result["nll"].get(name))
            above.append(nll - min(result["grid"]["kron"]))
            against_map.append(nll - result["MAP"])
            choices.append(result["chosen"].get(name))
        span = f"{min(choices):.2g} to {max(choices):.2g}" if choices[0] else ""
        rows.append(
            f"| {name:25} | {_mean(above):.3f} | {max(above):.3f} | {max(against_map):+.3f} "
            f"| {span:16} |"
        )
    gaps = [min(r["grid"]["kron"]) - min(r["grid"]["exact"]) for r in results.values()]
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
        cells.append(_mean([min(r["grid"]["kron"]) for r in group]))
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
