"""How near generated images are to real ones, and how much they differ among themselves, by features of a network.

The numbers depend on the network, so name it beside them; those of another network, Inception's among them, do not
compare. Both distances want as many generated images as real ones, of the same proportions of classes.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from jtl.errors import InputError


def frechet_distance(x: Float[np.ndarray, "N D"], y: Float[np.ndarray, "M D"]) -> float:
    """``||μx - μy||² + tr(Σx + Σy - 2 (Σx Σy)^½)``: the squared Fréchet distance of two Gaussians with these moments.

    Heusel et al. 2017, https://arxiv.org/abs/1706.08500, equation 6 (there of Inception's features: FID). Few rows make
    it too large, the more so the larger D is (Bińkowski et al. 2018, appendix D): compare figures of one N, and see
    beside them that of real rows against other real rows.

    Raises ValueError for fewer than two rows.
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
    """The unbiased estimate of the squared maximum mean discrepancy under ``k(a, b) = (a·b / D + 1)³``.

    Bińkowski et al. 2018, https://arxiv.org/abs/1801.01401, section 4 (there of Inception's features: KID). Its mean
    does not depend on the number of rows, and it may fall below 0. Raises ValueError for fewer than two rows.
    """
    x, y = _checked(x), _checked(y)

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a: np.ndarray) -> float:
        table = kernel(a, a)
        return (table.sum() - np.trace(table)) / (len(a) * (len(a) - 1))

    return float(within(x) + within(y) - 2 * kernel(x, y).mean())


def diversity(x: Float[np.ndarray, "N D"], label: Int[np.ndarray, " N"]) -> float:
    """The mean distance between two different rows of a class, averaged over the classes with two rows or more.

    Distances are Euclidean. Copies of one image make 0. Raises ValueError if no class has two rows.
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
