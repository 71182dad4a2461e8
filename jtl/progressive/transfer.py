"""Metrics of a sequence of tasks: average accuracy, forward and backward transfer, transfer scores.

``accuracy`` is always the matrix R (T, T): R[i, j] is the test accuracy on task j after learning tasks 0 ... i, NaN
where it was not measured. The averages are those of Lopez-Paz and Ranzato 2017, "Gradient Episodic Memory for
Continual Learning", https://arxiv.org/abs/1706.08840.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from jtl.errors import InputError

Matrix = Float[np.ndarray, "T T"]
Row = Float[np.ndarray, " T"]
Curve = Sequence[int | float]


def average_accuracy(accuracy: Matrix) -> float:
    """The mean accuracy over tasks after the last task: ``mean_j R[T, j]``."""
    return float(np.mean(_square(accuracy)[-1]))


def backward_transfer(accuracy: Matrix) -> float:
    """Computes ``mean_{j < T} (R[T, j] - R[j, j])``: below 0 where later tasks made earlier ones worse.

    >>> round(backward_transfer(np.array([[0.9, 0.1], [0.6, 0.8]])), 3)
    -0.3
    """
    return float(np.mean((_square(accuracy)[-1] - np.diag(accuracy))[:-1]))


def forward_transfer(accuracy: Matrix, untrained: Row) -> float:
    """Computes ``mean_{j > 1} (R[j - 1, j] - b_j)``: what earlier tasks contribute to a task before it is learned.

    Args:
        accuracy: R.
        untrained: b, the accuracy on each task of the network at initialisation.

    >>> round(forward_transfer(np.array([[0.9, 0.3], [0.6, 0.8]]), np.array([0.1, 0.1])), 3)
    0.2
    """
    before = np.diag(_square(accuracy), k=1)
    return float(np.mean(before - np.asarray(untrained)[1:]))


def backward_matrix(accuracy: Matrix) -> Matrix:
    """Returns ``R[i, j] - R[j, j]`` for i > j, the effect on task j of learning up to task i; NaN elsewhere."""
    change = _square(accuracy) - np.diag(accuracy)[None]
    return np.where(np.tri(len(change), k=-1, dtype=bool), change, np.nan)


def forward_matrix(accuracy: Matrix, untrained: Row) -> Matrix:
    """Returns ``R[i, j] - b_j`` for i < j, what tasks up to i contribute to task j; NaN elsewhere."""
    gain = _square(accuracy) - np.asarray(untrained)[None]
    return np.where(np.tri(len(gain), k=-1, dtype=bool).T, gain, np.nan)


def area(steps: Curve, values: Curve) -> float:
    """The area under a learning curve divided by its length, by the trapezoidal rule: the mean value of the run.

    Raises:
        ValueError: there are fewer than two points, or steps do not ascend.

    >>> area([0, 10, 20], [0.0, 0.5, 0.5])
    0.375
    """
    x, y = np.asarray(steps, np.float64), np.asarray(values, np.float64)
    if len(x) != len(y) or len(x) < 2 or not (np.diff(x) > 0).all():
        raise InputError(
            f"a curve has two points or more, in order of steps; found {len(x)} steps, {len(y)} values"
        )
    return float(np.trapezoid(y, x) / (x[-1] - x[0]))


def transfer_score(steps: Curve, values: Curve, baseline: Curve, chance: float = 0.0) -> float:
    """The area under a learning curve relative to a single column trained on the task alone: above 1 is transfer.

    Rusu et al. 2016, "Progressive Neural Networks", https://arxiv.org/abs/1606.04671, section 5.1.

    Args:
        steps: where both curves were measured.
        values: of the network that learned other tasks before, for example validation accuracies.
        baseline: of the single column.
        chance: the value of an untrained network, subtracted from both; the paper's scores have none.

    Raises:
        ValueError: as ``area`` does.

    >>> round(transfer_score([0, 1], [0.4, 0.8], [0.2, 0.6]), 3)
    1.5
    """
    return (area(steps, values) - chance) / (area(steps, baseline) - chance)


def _square(accuracy: Matrix) -> Matrix:
    shape = np.shape(accuracy)
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] < 2:
        raise InputError(f"expected a square matrix of two tasks or more, R[i, j]; found shape {shape}")
    return np.asarray(accuracy)
