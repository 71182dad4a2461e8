"""Importance weights of source examples, from a domain classifier or from label shift.

Use them as a batch's ``weight``. Computed in float64 with NumPy, over whole sets of stored features or predictions.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Array, Float, Int

from jtl.errors import InputError

Rows = Float[np.ndarray, "_ _"] | Float[Array, "_ _"]
Classes = Int[np.ndarray, " _"] | Int[Array, " _"]


def density_ratio(source: Rows, target: Rows, at: Rows, *, penalty: float = 1e-3) -> Float[np.ndarray, " K"]:
    """Estimates p_target(x) / p_source(x) at each row of ``at``: the odds of a domain classifier, rescaled.

    ``N_s / N_t · p(target | x) / p(source | x)``, by logistic regression on standardised features (Bickel et al. 2009,
    "Discriminative Learning Under Covariate Shift", JMLR 10).

    Args:
        source: features (N_s, D).
        target: features (N_t, D).
        at: features (K, D), usually held-out source rows.
        penalty: factor of half the squared weights, added to the mean log loss.

    Raises:
        ValueError: an array is empty or not finite, or feature sizes differ.
    """
    from sklearn.linear_model import LogisticRegression

    s, t, x = (np.asarray(rows, np.float64) for rows in (source, target, at))
    if not len(s) or not len(t) or not s.shape[1] == t.shape[1] == x.shape[1]:
        raise InputError(f"expected rows of one size; found source {s.shape}, target {t.shape}, at {x.shape}")
    if not all(np.isfinite(rows).all() for rows in (s, t, x)):
        raise InputError("features must be finite")
    both = np.concatenate([s, t])
    centre, scale = both.mean(0), both.std(0)
    scale[scale == 0] = 1.0
    strength = 1 / (penalty * len(both))
    fitted = LogisticRegression(C=strength, max_iter=5000).fit(
        (both - centre) / scale, np.arange(len(both)) >= len(s)
    )
    return len(s) / len(t) * np.exp(fitted.decision_function((x - centre) / scale))


def label_shift(
    source_predictions: Classes, source_labels: Classes, target_predictions: Classes, classes: int
) -> Float[np.ndarray, " C"]:
    """Estimates p_target(y) / p_source(y) for each class from a classifier's confusion matrix (BBSE).

    Solves ``Σ_j P_source(ŷ = i, y = j) w_j = P_target(ŷ = i)`` and sets negative results to 0. It assumes that p(x |
    y) is the same in both domains. Lipton, Wang and Smola 2018, "Detecting and Correcting for Label Shift with Black
    Box Predictors", https://arxiv.org/abs/1802.03916.

    Args:
        source_predictions: (N,) the classifier's predictions for *held-out* source rows.
        source_labels: (N,) their labels.
        target_predictions: (M,) its predictions for target rows.
        classes: C.

    Raises:
        ValueError: the input is empty or mismatched, labels are outside the classes, or the confusion matrix is
            singular (a class never occurs, or is never distinguished from others).
    """
    told, label, seen = (
        np.asarray(values) for values in (source_predictions, source_labels, target_predictions)
    )
    if not len(told) or not len(seen) or len(told) != len(label):
        raise InputError(
            f"found {len(told)} source predictions, {len(label)} labels, {len(seen)} target predictions"
        )
    if min(told.min(), label.min(), seen.min()) < 0 or max(told.max(), label.max(), seen.max()) >= classes:
        raise InputError(f"labels must lie in 0 ... {classes - 1}")
    confusion = np.zeros((classes, classes))
    np.add.at(confusion, (told, label), 1 / len(told))
    if np.linalg.matrix_rank(confusion) < classes:
        raise InputError(
            "the classifier's confusion matrix is singular: every class must occur among the source rows and be told"
        )
    return np.maximum(np.linalg.solve(confusion, np.bincount(seen, minlength=classes) / len(seen)), 0.0)
