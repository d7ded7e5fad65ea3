"""Split conformal prediction sets by MAPIE: how large sets are that cover at a given rate.

THR, also LAC, takes the classes above a threshold (Sadinle, Lei and Wasserman, 2019); APS takes
the likeliest classes up to a total (Romano, Sesia and Candes, NeurIPS 2020), here without
randomisation, so that sets are never empty and cover at least at the rate.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal, NamedTuple

import numpy as np
from torch import Tensor

REQUIRES = {"mapie": "mapie>=1.6"}
METHODS = ("THR", "APS")


class ConformalSets(NamedTuple):
    """What a method's sets came to on the test set."""

    coverage: float
    size: float


def conformal_sets(
    method: Literal["THR", "APS"],
    val_probs: Tensor,
    val_labels: Tensor,
    test_probs: Tensor,
    test_labels: Tensor,
    alpha: float = 0.1,
) -> ConformalSets:
    """Return coverage and mean size of sets that should hold the label at the rate 1 - alpha.

    Parameters
    ----------
    method : {'THR', 'APS'}
        The conformity score.
    val_probs, val_labels : Tensor
        (N, C) and (N,) that the threshold comes from. Nothing else may have been tuned on them,
        else coverage is no longer guaranteed.
    test_probs, test_labels : Tensor
        (M, C) and (M,).
    alpha : float, default=0.1
        Rate of misses allowed.

    Raises
    ------
    ImportError
        If MAPIE is not installed.
    ValueError
        If `method` is unknown, `alpha` no rate, or there are too few validation labels for it.
    """
    if method not in METHODS:
        raise ValueError(f"Expected method to be one of {METHODS}, but got {method!r}.")
    if not 0 < alpha < 1:
        raise ValueError(f"Expected alpha between 0 and 1, but got {alpha}.")
    needed = int(np.ceil(1 / alpha - 1 - 1e-9))
    if len(val_labels) < needed:
        raise ValueError(
            f"Expected at least {needed} validation labels for alpha={alpha}, but got "
            f"{len(val_labels)}. Take more, or a larger alpha."
        )
    try:
        from mapie.classification import SplitConformalClassifier
    except ImportError as error:
        raise ImportError(f'First: pip install "{REQUIRES["mapie"]}"') from error

    conformal = SplitConformalClassifier(
        _probabilities_as_they_are(val_probs.shape[1]),
        confidence_level=1 - alpha,
        conformity_score="lac" if method == "THR" else "aps",
        prefit=True,
    )
    with warnings.catch_warnings():
        # A class without a validation question is no matter: scores are not kept by class.
        warnings.filterwarnings("ignore", message=".*unique labels")
        conformal.conformalize(_array(val_probs), val_labels.cpu().numpy())
    options = {} if method == "THR" else {"include_last_label": True}
    _, sets = conformal.predict_set(_array(test_probs), conformity_score_params=options)
    covered = sets[np.arange(len(sets)), test_labels.cpu().numpy(), 0]
    return ConformalSets(float(covered.mean()), float(sets[:, :, 0].sum(1).mean()))


def _array(probs: Tensor) -> np.ndarray[Any, Any]:
    """Return probabilities that sum to 1 in double precision, which MAPIE checks."""
    probs = probs.detach().double().cpu()
    return (probs / probs.sum(1, keepdim=True)).numpy()


def _probabilities_as_they_are(n_classes: int) -> Any:
    """Return what scikit-learn calls a fitted classifier, whose inputs are its probabilities."""
    from sklearn.base import BaseEstimator, ClassifierMixin

    class Identity(ClassifierMixin, BaseEstimator):
        classes_ = np.arange(n_classes)
        n_features_in_ = n_classes

        def fit(self, x: Any, y: Any) -> Identity:
            return self

        def predict(self, x: Any) -> Any:
            return np.asarray(x).argmax(1)

        def predict_proba(self, x: Any) -> Any:
            return np.asarray(x)

        def __sklearn_is_fitted__(self) -> bool:
            return True

    return Identity()
