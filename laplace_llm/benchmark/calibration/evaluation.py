"""One run: a method on a problem, its predictions on every test set, and what it all cost."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from laplace_llm.benchmark.calibration import coverage
from laplace_llm.benchmark.calibration.costs import Cost
from laplace_llm.benchmark.calibration.method import Method, NotApplicable, Prediction, missing
from laplace_llm.benchmark.calibration.metrics import metrics, question_nll, uncertainty
from laplace_llm.benchmark.calibration.problem import Problem
from laplace_llm.benchmark.calibration.results import FAILED, NOT_APPLICABLE, SKIPPED, Run


@dataclass
class Answers:
    """A method's predictions on a set of batches.

    Attributes
    ----------
    probs : Tensor
        (N, C).
    labels : Tensor
        (N,).
    mutual_information : Tensor, optional
        (N,), where the method has it.
    """

    probs: Tensor
    labels: Tensor
    mutual_information: Tensor | None


def evaluate(
    run: Run,
    method: type[Method],
    problem: Problem,
    tests: Mapping[str, list[Any]],
    save_predictions: bool = False,
) -> Run:
    """Fill in a run; an error becomes its status, and is not raised.

    Parameters
    ----------
    run : Run
        Says which run it is.
    method : type[Method]
    problem : Problem
    tests : Mapping[str, list]
        Labelled batches by name, the task's own first.
    save_predictions : bool, default=False
        Whether to keep every question's probabilities.
    """
    lacking = sorted({f'"{pip}"' for _, pip in missing(method)})
    if lacking:
        run.status, run.reason = SKIPPED, f"pip install {' '.join(lacking)}"
        return run
    try:
        _evaluate(run, method, problem, tests, save_predictions)
    except NotApplicable as reason:
        run.status, run.reason = NOT_APPLICABLE, str(reason)
    except Exception as error:  # a row of the table, whatever it is
        first = (str(error).splitlines() or [""])[0]
        run.status, run.reason = FAILED, f"{type(error).__name__}: {first}"
        run.traceback = traceback.format_exc()
        run.tests, run.costs = {}, {}
    return run


def _evaluate(
    run: Run,
    cls: type[Method],
    problem: Problem,
    tests: Mapping[str, list[Any]],
    save_predictions: bool,
) -> None:
    method = cls()
    bill = _Bill()
    torch.manual_seed(problem.seed)  # whatever ran before
    with bill.of(problem, "fit"):
        method.fit(problem)
    for index, (name, batches) in enumerate(tests.items()):
        torch.manual_seed(problem.seed)
        with bill.of(problem, "predict" if index == 0 else "elsewhere"):
            answers = predictions(method, batches)
        run.tests[name] = _summary(answers, save_predictions)
        if index == 0:
            own = answers
    run.note = method.note
    peak = max(cost.memory for cost in bill.costs.values())
    run.costs = {
        "fit_seconds": bill.costs["fit"].seconds,
        "predict_ms": 1000 * bill.costs["predict"].seconds / len(own.labels),
        "peak_bytes": peak if problem.meter.sees_memory else None,
        "extra_parameters": int(method.extra_parameters),
        "forward_passes": float(method.forward_passes),
        "train_seconds": problem.train_seconds,
    }
    if problem.val:
        _cover(run, method, problem, own)


def _cover(run: Run, method: Method, problem: Problem, own: Answers) -> None:
    if lacking := coverage.lacking():
        run.coverage_reason = f"pip install {lacking}"
        return
    with problem.aside():
        validation = predictions(method, problem.val)
    try:
        run.coverage = coverage.coverage(validation, own)
    except ValueError as error:
        run.coverage_reason = str(error)


@dataclass
class _Bill:
    costs: dict[str, Cost] = field(default_factory=dict)

    @contextmanager
    def of(self, problem: Problem, item: str) -> Iterator[None]:
        """Measure, and add what was shared; see `Problem.share`."""
        problem.charged, problem.charged_memory = 0.0, 0
        with problem.meter.measure() as cost:
            yield
        cost.seconds = max(cost.seconds + problem.charged, 0.0)
        cost.memory = max(cost.memory, problem.charged_memory)
        self.costs[item] = cost


def predictions(method: Method, batches: list[Any]) -> Answers:
    """Return a method's predictions, on the CPU.

    Raises
    ------
    ValueError
        If they are not probabilities.
    """
    probs, information = [], []
    for batch in batches:
        answer = method.predict(batch)
        parts = answer if isinstance(answer, Prediction) else _averaged(answer)
        probs.append(parts.probabilities.detach().double().cpu())
        if parts.mutual_information is not None:
            information.append(parts.mutual_information.detach().double().cpu())
    labels = torch.cat([torch.as_tensor(batch["labels"]).cpu() for batch in batches])
    together = torch.cat(probs)
    sums = together.sum(-1)
    if together.shape[0] != len(labels) or not bool(((sums - 1).abs() < 1e-3).all()):
        raise ValueError(
            f"Expected probabilities ({len(labels)}, C) that sum to one, but got shape "
            f"{tuple(together.shape)} and sums from {float(sums.min()):g} to "
            f"{float(sums.max()):g}. Return probabilities from predict(), not logits."
        )
    together = together / sums[:, None]
    return Answers(together, labels, torch.cat(information) if information else None)


def _averaged(samples: Tensor) -> Prediction:
    """Return the mean of (S, B, C) samples, and their mutual information."""
    if samples.ndim == 2:
        return Prediction(samples)
    mean = samples.double().mean(0)
    entropies = torch.special.entr(samples.double()).sum(-1)
    information = torch.special.entr(mean).sum(-1) - entropies.mean(0)
    return Prediction(mean, information.clamp_min(0))


def _summary(answers: Answers, save_predictions: bool) -> dict[str, Any]:
    """Return what is kept of predictions: metrics, and a few numbers a question."""
    probs, labels = answers.probs, answers.labels
    scores = uncertainty(probs)
    questions = {
        "nll": question_nll(probs, labels).tolist(),
        "confidence": scores["max-probability"].tolist(),
        "correct": (probs.argmax(1) == labels).int().tolist(),
        "entropy": scores["entropy"].tolist(),
    }
    if answers.mutual_information is not None:
        questions["mutual_information"] = answers.mutual_information.tolist()
    if save_predictions:
        questions["probabilities"] = probs.tolist()
        questions["label"] = labels.tolist()
    return {"metrics": metrics(probs, labels), "questions": questions}
