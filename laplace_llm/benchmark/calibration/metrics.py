"""What is measured of probabilities: accuracy, proper scores, calibration, selection, OOD."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import (
    binary_auroc,
    multiclass_accuracy,
    multiclass_calibration_error,
)

N_BINS = 15
# The name, the format, and whether higher is better.
METRICS: dict[str, tuple[str, bool]] = {
    "accuracy": (".3f", True),
    "NLL": (".3f", False),
    "Brier": (".3f", False),
    "ECE": (".3f", False),
    "adaptive ECE": (".3f", False),
    "smooth ECE": (".3f", False),
    "AURC": (".3f", False),
}
SCORES = ("max-probability", "entropy", "mutual information")


def metrics(probs: Tensor, labels: Tensor) -> dict[str, float]:
    """Return all `METRICS`; smooth ECE is nan where `relplot` is not installed.

    Parameters
    ----------
    probs : Tensor
        (N, C), summing to one.
    labels : Tensor
        (N,).
    """
    probs, classes = probs.detach().double().cpu(), probs.shape[1]
    labels = labels.cpu()
    confidence, answer = probs.max(1)
    correct = (answer == labels).double()
    ece = multiclass_calibration_error(probs, labels, classes, n_bins=N_BINS)
    return {
        "accuracy": float(multiclass_accuracy(probs, labels, classes, average="micro")),
        "NLL": float(question_nll(probs, labels).mean()),
        "Brier": float((probs - F.one_hot(labels, classes)).square().sum(1).mean()),
        "ECE": float(ece),
        "adaptive ECE": adaptive_ece(confidence, correct),
        "smooth ECE": smooth_ece(confidence, correct),
        "AURC": aurc(confidence, correct),
    }


def question_nll(probs: Tensor, labels: Tensor) -> Tensor:
    """Return each question's negative log likelihood (N,); of 1e-30, at worst."""
    return -probs.gather(1, labels[:, None]).squeeze(1).clamp_min(1e-30).log()


def adaptive_ece(confidence: Tensor, correct: Tensor, n_bins: int = N_BINS) -> float:
    """Return the calibration error over bins of (nearly) equal numbers of questions.

    Source: Nixon et al., *Measuring Calibration in Deep Learning*, CVPR workshops 2019; of the
    top label.

    Parameters
    ----------
    confidence, correct : Tensor
        (N,) the highest probability, and whether that answer is right (1 or 0).
    n_bins : int
    """
    order = confidence.argsort(stable=True)
    bins = torch.tensor_split((correct - confidence)[order], min(n_bins, len(order)))
    return float(sum(part.sum().abs() for part in bins) / len(order))


def smooth_ece(confidence: Tensor, correct: Tensor) -> float:
    """Return the smooth ECE by its authors' package; nan where that is not installed.

    Source: Błasiok and Nakkiran, *Smooth ECE*, ICLR 2024.
    """
    if find_spec("relplot") is None:
        return float("nan")
    from relplot.metrics import smECE

    return float(smECE(confidence.numpy(), correct.numpy()))


def risk_coverage(confidence: Tensor, correct: Tensor) -> tuple[Tensor, Tensor]:
    """Return coverages (N,) and the error rates (N,) among the questions that are answered.

    Questions of the same confidence are answered in any order: each stands for the mean of them.

    Source: Geifman and El-Yaniv, *Selective Classification for Deep Neural Networks*, 2017.
    """
    levels, group = confidence.unique(return_inverse=True)
    zeros = torch.zeros(len(levels), dtype=torch.double)
    wrong = zeros.index_add(0, group, 1 - correct.double())
    count = zeros.index_add(0, group, torch.ones_like(correct, dtype=torch.double))
    order = group.argsort(descending=True, stable=True)
    answered = torch.arange(1, len(confidence) + 1, dtype=torch.double)
    return answered / len(confidence), (wrong / count)[group[order]].cumsum(0) / answered


def aurc(confidence: Tensor, correct: Tensor) -> float:
    """Return the area under the risk-coverage curve: the mean over all coverages."""
    return float(risk_coverage(confidence, correct)[1].mean())


def uncertainty(probs: Tensor) -> dict[str, Tensor]:
    """Return each question's max-probability and entropy, (N,)."""
    return {"max-probability": probs.amax(1), "entropy": torch.special.entr(probs).sum(1)}


def ood_auroc(inside: Tensor, outside: Tensor, falling: bool = False) -> float:
    """Return the AUROC of telling out-of-distribution questions by a score.

    Parameters
    ----------
    inside, outside : Tensor
        (N,) and (M,) scores in and out of distribution.
    falling : bool, default=False
        Whether a lower score means out of distribution.
    """
    scores = torch.cat([inside, outside]).double()
    scores = -scores if falling else scores
    # torchmetrics takes a sigmoid of scores outside [0, 1], which rounds; ranks are safe.
    ranks = scores.unique(return_inverse=True)[1].double()
    target = torch.cat([torch.zeros(len(inside)), torch.ones(len(outside))]).long()
    return float(binary_auroc(ranks / max(float(ranks.max()), 1.0), target))
