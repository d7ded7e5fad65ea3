"""laplace-torch's own last-layer Laplace approximations, with its own rules for the prior.

They run on the last layer's cached features, which gives the numbers that they give on the head
(its Jacobians are those of the linear layer) without passes over the language model. All options
are laplace-torch's defaults: scalar prior precision, 100 grid points, probit predictive. Only the
grid's loss is a function instead of the default metric, which adds up over the whole grid (on TREC
and SST-2 its last value then wins).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from laplace import Laplace
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from laplace_llm.benchmark.calibration.features import (
    LastLayerMethod,
    LinearHead,
    labelled_features,
)
from laplace_llm.benchmark.calibration.linear import seeded
from laplace_llm.benchmark.calibration.method import NotApplicable, register
from laplace_llm.benchmark.calibration.metrics import question_nll

if TYPE_CHECKING:
    from laplace_llm.benchmark.calibration.problem import Problem

STRUCTURES = {"diag": "diag", "kron": "kron", "full": "full", "gp": "functional GP"}
RULES = ("marglik", "gridsearch")


class LastLayerLaplace(LastLayerMethod):
    """One structure with one rule for the prior precision.

    Attributes
    ----------
    structure : {'diag', 'kron', 'full', 'gp'}
        laplace-torch's ``hessian_structure``.
    rule : {'marglik', 'gridsearch'}
        laplace-torch's ``method`` of `optimize_prior_precision`.
    max_size, max_size_cpu : int
        Weights up to which the full structure is tried. It decomposes a matrix of that many rows
        for each of 100 steps or grid points: ten minutes at 3,456 on a CPU's core.
    max_gp_size : int
        Training points times classes that the functional posterior's kernel is made of.
    """

    structure: ClassVar[str]
    rule: ClassVar[str]
    max_size: ClassVar[int] = 20_000
    max_size_cpu: ClassVar[int] = 2_000
    max_gp_size: ClassVar[int] = 2_000
    batch_size: ClassVar[int] = 256

    def fit_features(self, problem: Problem) -> None:
        """Fit the curvature and choose the prior precision.

        Raises
        ------
        NotApplicable
            If the full Hessian is too large for the device.
        """
        features, labels = labelled_features(problem, "train")
        self._seed, self._device = problem.seed, features.device
        model = LinearHead(problem.head).eval()
        n_weights = sum(p.numel() for p in model.parameters())
        on_cpu = features.device.type == "cpu"
        limit = self.max_size_cpu if on_cpu else self.max_size
        if self.structure == "full" and n_weights > limit:
            raise NotApplicable(
                f"the full Hessian of {n_weights} weights is too large for this device (at most "
                f"{limit} weights{'; a GPU takes more' * on_cpu})"
            )
        options: dict[str, Any] = {"last_layer_name": "layer"}
        if self.structure == "gp":
            # The kernel over all training points and classes is dense.
            options["n_subset"] = min(len(features), self.max_gp_size // problem.n_classes)
            options["seed"] = problem.seed
        self._pred_type = "gp" if self.structure == "gp" else "glm"
        self._la = Laplace(
            model,
            "classification",
            subset_of_weights="last_layer",
            hessian_structure=self.structure,
            **options,
        )
        with self._quiet():
            self._la.fit(self._loader(features, labels))
            validation = None
            if self.rule == "gridsearch":
                validation = self._loader(*labelled_features(problem, "val"))
            self._la.optimize_prior_precision(
                pred_type=self._pred_type,
                method=self.rule,
                val_loader=validation,
                loss=negative_log_likelihood,
            )
        self.note = f"prior precision {float(self.prior_precision):.3g}"
        n_classes, width = model.layer.weight.shape
        self.extra_parameters = {
            "diag": n_weights,
            "kron": n_classes**2 + width**2,
            "full": n_weights**2,
            "gp": options.get("n_subset", 0) * (options.get("n_subset", 0) * n_classes + width),
        }[self.structure]

    def predict_features(self, features: Tensor) -> Tensor:
        """Return the probit predictive (B, C)."""
        with self._quiet():
            return self._la(features, pred_type=self._pred_type, link_approx="probit").detach()

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Leave the global random state, which data loaders draw from, and ignore warnings.

        These are on the link (its default is the one used), on marglik with a functional posterior
        and on recomputing that one.
        """
        with warnings.catch_warnings(), seeded(self._seed, self._device):
            warnings.simplefilter("ignore")
            yield

    def _loader(self, features: Tensor, labels: Tensor) -> DataLoader[Any]:
        return DataLoader(TensorDataset(features, labels), batch_size=self.batch_size)

    @property
    def prior_precision(self) -> Tensor:
        """What the rule chose."""
        return torch.as_tensor(self._la.prior_precision)


def negative_log_likelihood(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return the mean NLL of labels (N,) under probabilities (N, C)."""
    return question_nll(probabilities, labels).mean()


def _method(structure: str, rule: str) -> type[LastLayerLaplace]:
    attributes = {
        "__doc__": f"Last-layer Laplace, {STRUCTURES[structure]}, {rule}.",
        "__module__": __name__,
        "name": f"last-layer Laplace {STRUCTURES[structure]}, {rule}",
        "structure": structure,
        "rule": rule,
        "tuned": rule == "gridsearch",
    }
    return type(f"LastLayerLaplace_{structure}_{rule}", (LastLayerLaplace,), attributes)


METHODS = [register(_method(structure, rule)) for structure in STRUCTURES for rule in RULES]
