"""Distances between generated and real images: known values, SciPy and scikit-learn."""

import numpy as np
import pytest
from scipy.linalg import sqrtm
from sklearn.metrics.pairwise import polynomial_kernel

from jtl.tasks import diversity, frechet_distance, kernel_distance


def exact(count, mean, covariance, seed=0):
    """Rows whose sample mean and covariance are exactly these."""
    rows = np.random.default_rng(seed).normal(size=(count, len(mean)))
    rows -= rows.mean(0)
    rows = rows @ np.linalg.inv(np.linalg.cholesky(np.cov(rows, rowvar=False))).T
    return rows @ np.linalg.cholesky(covariance).T + mean


def test_two_gaussians_by_hand():
    """Diagonal covariances: Σ (μ - ν)² + (σ - τ)²."""
    x = exact(50, np.array([0.0, 1.0]), np.diag([4.0, 9.0]))
    y = exact(80, np.array([3.0, 1.0]), np.diag([1.0, 16.0]), seed=1)
    assert frechet_distance(x, y) == pytest.approx(3**2 + (2 - 1) ** 2 + (3 - 4) ** 2)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("count", [200, 6])  # of 6 rows the covariances are singular
def test_frechet_is_scipys(count):
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(count, 10)) @ rng.normal(size=(10, 10)), rng.normal(size=(count, 10)) + 0.5
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    gap = x.mean(0) - y.mean(0)
    # Of singular products SciPy's root is good to half of the digits.
    wanted = gap @ gap + np.trace(a + b - 2 * np.real(sqrtm(a @ b)))
    assert frechet_distance(x, y) == pytest.approx(wanted, rel=1e-6 if count > 10 else 1e-3)


def test_kernel_is_scikit_learns():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(7, 4)), rng.normal(size=(9, 4)) + 0.3
    k = lambda a, b: polynomial_kernel(a, b, degree=3, gamma=1 / 4, coef0=1)  # noqa: E731
    same = [np.mean([k(a, a)[i, j] for i in range(len(a)) for j in range(len(a)) if i != j]) for a in (x, y)]
    assert kernel_distance(x, y) == pytest.approx(sum(same) - 2 * k(x, y).mean())


def test_the_kernel_estimate_has_no_bias():
    """Where both are alike its mean is 0; the Fréchet distance is above 0 by chance."""
    rng = np.random.default_rng(4)
    pairs = [rng.normal(size=(2, 20, 5)) for _ in range(200)]
    found = np.array([kernel_distance(x, y) for x, y in pairs])
    assert abs(found.mean()) < 3 * found.std() / 200**0.5
    assert min(frechet_distance(x, y) for x, y in pairs) > 0.1


def test_diversity_by_hand():
    """Class 0: a triangle of sides 3, 4 and 5; class 1: two copies; class 2 has one row."""
    x = np.array([[0, 0], [3, 0], [0, 4], [7, 7], [7, 7], [9, 9]], float)
    label = np.array([0, 0, 0, 1, 1, 2])
    assert diversity(x, label) == pytest.approx((4 + 0) / 2)
    with pytest.raises(ValueError, match="no class has two"):
        diversity(x, np.arange(6))


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_one_row_has_no_distance(distance):
    with pytest.raises(ValueError, match="two rows or more"):
        distance(np.ones((5, 3)), np.ones((1, 3)))
