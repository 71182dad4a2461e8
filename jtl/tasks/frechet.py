"""Metrics for generated images, from a network's features: distance to real images, and diversity.

Values depend on the network, so report it; those of another network, such as Inception, are not comparable. Both
distances want as many generated images as real ones, in the same class proportions.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from jtl.errors import InputError


def frechet_distance(x: Float[np.ndarray, "N D"], y: Float[np.ndarray, "M D"]) -> float:
    """Returns the squared Fréchet distance of Gaussians fitted to the features.

    It is ``||μx - μy||² + tr(Σx + Σy - 2 (Σx Σy)^½)``. Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update
    Rule Converge to a Local Nash Equilibrium", https://arxiv.org/abs/1706.08500, equation 6 (on Inception features:
    FID). It is biased upwards for few rows, more so the larger D is (Bińkowski et al. 2018, appendix D): compare values
    at the same N, and report that of real rows against other real rows beside them.

    Raises:
        ValueError: fewer than two rows.
    """
    x, y = _checked(x), _checked(y)
    first, second = (np.atleast_2d(np.cov(rows, rowvar=False)) for rows in (x, y))
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    # Σx Σy has the eigenvalues of the symmetric √Σx Σy √Σx, which are real and at least 0 up to rounding.
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ second @ root), 0)).sum()
    gap = x.mean(0) - y.mean(0)
    return float(gap @ gap + np.trace(first) + np.trace(second) - 2 * shared)


def kernel_distance(x: Float[np.ndarray, "N D"], y: Float[np.ndarray, "M D"]) -> float:
    """Returns the unbiased estimate of the squared maximum mean discrepancy with kernel ``k(a, b) = (a·b / D + 1)³``.

    Bińkowski et al. 2018, "Demystifying MMD GANs", https://arxiv.org/abs/1801.01401, section 4 (on Inception features:
    KID). Its expectation does not depend on the number of rows; it may be negative.

    Raises:
        ValueError: fewer than two rows.
    """
    x, y = _checked(x), _checked(y)

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a: np.ndarray) -> float:
        table = kernel(a, a)
        return (table.sum() - np.trace(table)) / (len(a) * (len(a) - 1))

    return float(within(x) + within(y) - 2 * kernel(x, y).mean())


def diversity(x: Float[np.ndarray, "N D"], label: Int[np.ndarray, " N"]) -> float:
    """Returns the mean Euclidean distance between two rows of a class, averaged over classes with two rows or more.

    Identical rows yield 0.

    Raises:
        ValueError: no class has two rows.
    """
    means = []
    for one in np.unique(label):
        rows = np.asarray(x[label == one], np.float64)
        if len(rows) > 1:
            distances = np.linalg.norm(rows[:, None] - rows[None], axis=-1)
            means.append(distances.sum() / (len(rows) * (len(rows) - 1)))
    if not means:
        raise InputError("diversity compares rows of a class, and no class has two")
    return float(np.mean(means))


def _checked(rows: np.ndarray) -> np.ndarray:
    if rows.ndim != 2 or len(rows) < 2:
        raise InputError(f"expected features (N, D) of two rows or more, found {rows.shape}")
    return np.asarray(rows, np.float64)
