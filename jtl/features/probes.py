"""Probes: classifiers on frozen features (logistic regression, ridge regression, k nearest neighbours).

All compute in float64 with NumPy and SciPy; logistic regression converges to a stated tolerance.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Array, Float, Int

from jtl.errors import InputError

Features = Float[np.ndarray, "N D"] | Float[Array, "N D"]
Labels = Int[np.ndarray, " N"] | Int[Array, " N"]
Logits = Float[np.ndarray, "N C"]
HeldOut = tuple[Float[np.ndarray, "M D"] | Float[Array, "M D"], Int[np.ndarray, " M"] | Int[Array, " M"]]

GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
LEAST_SPREAD = (
    1e-3  # lower bound of a feature's standard deviation, relative to the root mean square over features
)


@dataclass(frozen=True)
class Linear:
    """A linear probe on standardised features: ``logits = ((x - mean) / scale) @ kernel + bias``.

    Attributes:
        mean: (D,) means of the training features.
        scale: (D,) their standard deviations, but at least a thousandth of the root mean square over features, and 1
            for a constant feature.
        kernel: (D, C).
        bias: (C,).
        penalty: the L2 penalty it was fitted with.
    """

    mean: Float[np.ndarray, " D"]
    scale: Float[np.ndarray, " D"]
    kernel: Float[np.ndarray, "D C"]
    bias: Float[np.ndarray, " C"]
    penalty: float

    def __call__(self, features: Features) -> Logits:
        """Returns the logits (N, C) in float64."""
        return (np.asarray(features, np.float64) - self.mean) / self.scale @ self.kernel + self.bias

    def as_head(self) -> dict[str, np.ndarray]:
        """Returns ``kernel`` (D, C) and ``bias`` (C,) of the equivalent linear layer on raw features, in float32."""
        kernel = self.kernel / self.scale[:, None]
        bias = self.bias - self.mean @ kernel
        return {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}


def fit_logistic(
    features: Features,
    labels: Labels,
    *,
    classes: int | None = None,
    penalties: Sequence[float] = GRID,
    validation: HeldOut | None = None,
    tolerance: float = 1e-6,
) -> Linear:
    """Fits multinomial logistic regression: minimises ``mean cross-entropy + penalty/2 · ||kernel||²``.

    The bias is not penalised. L-BFGS in float64 runs until no entry of the gradient exceeds ``tolerance``, and warns
    if it does not get there. (scikit-learn's ``C`` is ``1 / (N · penalty)``.)

    Args:
        features: (N, D); standardised by this function.
        labels: (N,) in 0 ... classes - 1.
        classes: C; by default the largest label + 1.
        penalties: the candidates.
        validation: held-out features and labels; the penalty with the lowest cross-entropy on them wins.
        tolerance: of the gradient; float64 reaches about 1e-8.

    Raises:
        ValueError: features are empty or not finite, labels are out of range or not one per row, or there are several
            penalties without validation.

    >>> x, y = np.array([[0.0], [1.0], [2.0], [3.0]]), np.array([0, 0, 1, 1])
    >>> fit_logistic(x, y, penalties=(0.1,))(x).argmax(-1)
    array([0, 0, 1, 1])
    """
    from scipy.optimize import minimize

    x, mean, scale, y = _prepare(features, labels, classes)
    D, C = x.shape[1], y.shape[1]
    start = np.zeros((D + 1) * C)

    def solve(penalty: float) -> Linear:
        def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
            kernel, bias = flat[:-C].reshape(D, C), flat[-C:]
            log_p = _log_softmax(x @ kernel + bias)
            error = (np.exp(log_p) - y) / len(x)
            value = -np.sum(log_p * y) / len(x) + penalty / 2 * np.sum(kernel**2)
            return value, np.concatenate([(x.T @ error + penalty * kernel).ravel(), error.sum(0)])

        options = {"gtol": tolerance, "ftol": 0.0, "maxiter": 5000, "maxfun": 10000, "maxcor": 20}
        found = minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
        reached = float(np.abs(objective(found.x)[1]).max())
        if reached > tolerance:
            warnings.warn(
                f"logistic probe, penalty {penalty}: the gradient reached {reached:.1e}, not {tolerance:.0e}",
                RuntimeWarning,
                stacklevel=3,
            )
        return Linear(mean, scale, found.x[:-C].reshape(D, C), found.x[-C:], penalty)

    return _choose(solve, penalties, validation, _cross_entropy)


def fit_ridge(
    features: Features,
    labels: Labels,
    *,
    classes: int | None = None,
    penalties: Sequence[float] = GRID,
    validation: HeldOut | None = None,
) -> Linear:
    """Fits ridge regression on one-hot labels, in closed form.

    It minimises ``mean ||y - logits||² + penalty · ||kernel||²``. One singular value decomposition of the standardised
    features serves all penalties. The bias is not penalised. The logits are not log-probabilities. (scikit-learn's
    ``alpha`` is ``N · penalty``.) Arguments and errors are those of ``fit_logistic``, but the lowest squared error on
    the validation rows chooses among several penalties.
    """
    x, mean, scale, y = _prepare(features, labels, classes)
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    bias = y.mean(0)
    target = u.T @ (y - bias)

    def solve(penalty: float) -> Linear:
        shrunk = s / (s**2 + len(x) * penalty)
        return Linear(mean, scale, vt.T @ (shrunk[:, None] * target), bias, penalty)

    return _choose(solve, penalties, validation, _squared_error)


@dataclass(frozen=True)
class Knn:
    """A k-nearest-neighbour classifier with cosine similarity.

    Attributes:
        bank: (M, D) training features, normalised to length 1.
        votes: (M, C) one-hot labels.
        k: how many neighbours vote.
    """

    bank: Float[np.ndarray, "M D"]
    votes: Float[np.ndarray, "M C"]
    k: int

    def __call__(self, features: Features, rows: int = 1024) -> Logits:
        """Returns ``log((votes + 1) / (k + C))``, the log of the smoothed share of votes.

        Args:
            features: (N, D).
            rows: how many are compared with the bank at once.
        """
        x = _unit(np.asarray(features, np.float64))
        pieces = [x[i : i + rows] for i in range(0, len(x), rows)]
        near = [np.argpartition(piece @ self.bank.T, -self.k)[:, -self.k :] for piece in pieces]
        counts = self.votes[np.concatenate(near)].sum(1)
        return np.log((counts + 1) / (self.k + self.votes.shape[1]))


def fit_knn(features: Features, labels: Labels, *, k: int = 20, classes: int | None = None) -> Knn:
    """Makes a k-nearest-neighbour probe.

    Args:
        features: (N, D).
        labels: (N,) in 0 ... classes - 1.
        k: how many neighbours vote, 1 ... N.
        classes: C; by default the largest label + 1.

    Raises:
        ValueError: ``k`` is out of range, or features or labels are invalid as in ``fit_logistic``.
    """
    x, _, _, votes = _prepare(features, labels, classes, standardise=False)
    if not 1 <= k <= len(x):
        raise InputError(f"k must be in 1 ... {len(x)}, the number of rows; got {k}")
    return Knn(_unit(x), votes, k)


def _prepare(
    features: Features, labels: Labels, classes: int | None, standardise: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    x, label = np.asarray(features, np.float64), np.asarray(labels)
    if not len(x):
        raise InputError("a probe needs at least one row of features")
    if len(x) != len(label):
        raise InputError(f"expected one label a row of features, found {len(label)} labels and {len(x)} rows")
    if not np.isfinite(x).all():
        raise InputError(f"{(~np.isfinite(x)).any(1).sum()} of {len(x)} rows of features are not finite")
    C = int(label.max()) + 1 if classes is None else classes
    if label.min() < 0 or label.max() >= C:
        raise InputError(f"labels must be in 0 ... {C - 1}; found {label.min()} ... {label.max()}")
    mean, scale = np.zeros(x.shape[1]), np.ones(x.shape[1])
    if standardise:
        mean, scale = x.mean(0), x.std(0)
        # A unit that is dead except for rounding would get a weight of millions, which breaks fine-tuning from there.
        floor = LEAST_SPREAD * np.sqrt(np.mean(scale**2))
        scale = np.where(scale > 1e-12 * (1 + np.abs(mean)), np.maximum(scale, floor), 1.0)
    return (x - mean) / scale, mean, scale, np.eye(C)[label]


def _choose(
    solve: Callable[[float], Linear],
    penalties: Sequence[float],
    validation: HeldOut | None,
    cost: Callable[[np.ndarray, np.ndarray], float],
) -> Linear:
    if validation is None:
        if len(penalties) != 1:
            raise InputError(
                f"validation must choose among the penalties {penalties}: pass it, or one penalty"
            )
        return solve(penalties[0])
    features, labels = validation
    return min(map(solve, penalties), key=lambda probe: cost(probe(features), np.asarray(labels)))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(-_log_softmax(logits)[np.arange(len(labels)), labels].mean())


def _squared_error(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(np.square(logits - np.eye(logits.shape[-1])[labels]).sum(-1).mean())


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
