"""Transferability scores against oracles written another way: brute force, dense algebra, hand-solved cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl.features.scores import (
    h_score,
    ledoit_wolf,
    leep,
    logme,
    nce,
    shrunk_h_score,
    weighted_tau,
)


def problem(N, D, classes=3, seed=0, signal=1.0):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(N) % classes)
    centres = signal * rng.normal(size=(classes, D))
    scale = np.geomspace(0.3, 3, D)
    return (centres[labels] + rng.normal(size=(N, D))) * scale, labels


def log_evidence(f, y, alpha, beta):
    """ln N(y; 0, I/β + F Fᵀ/α), from the dense N x N covariance."""
    covariance = np.eye(len(y)) / beta + f @ f.T / alpha
    _, log_det = np.linalg.slogdet(covariance)
    return -0.5 * (len(y) * np.log(2 * np.pi) + log_det + y @ np.linalg.solve(covariance, y))


@pytest.mark.parametrize("N,D", [(40, 5), (12, 30), (20, 20)])
def test_logme_is_the_maximum_of_the_evidence(N, D):
    from scipy.optimize import minimize

    f, labels = problem(N, D, signal=0.5)
    best = []
    for c in range(3):
        y = (labels == c).astype(float)
        runs = [
            minimize(lambda p, y=y: -log_evidence(f, y, *np.exp(p)), start, method="Nelder-Mead",
                     options={"xatol": 1e-9, "fatol": 1e-12, "maxiter": 4000}, bounds=[(-25, 25)] * 2)
            for start in ([0.0, 0.0], [3.0, 2.0], [-2.0, 4.0])
        ]  # fmt: skip
        best.append(-min(run.fun for run in runs) / N)
    np.testing.assert_allclose(logme(f, labels), np.mean(best), rtol=1e-7, atol=1e-8)


def test_logme_formula_at_its_own_alpha_and_beta():
    """The expression in DEFINITIONS, term by term, with the fixed point of α and β iterated one by one."""
    f, labels = problem(60, 7)
    N, D = f.shape
    values = []
    for c in range(3):
        y, alpha, beta = (labels == c).astype(float), 1.0, 1.0
        for _ in range(5000):
            A = alpha * np.eye(D) + beta * f.T @ f
            m = beta * np.linalg.solve(A, f.T @ y)
            sigma = np.linalg.eigvalsh(f.T @ f)
            gamma = np.sum(sigma / (sigma + alpha / beta))
            res = np.sum((y - f @ m) ** 2)
            alpha, beta = gamma / (m @ m), (N - gamma) / res
        penalty = beta * res + alpha * m @ m + N * np.log(2 * np.pi)
        values.append(
            (D * np.log(alpha) + N * np.log(beta) - np.sum(np.log(alpha + beta * sigma)) - penalty) / (2 * N)
        )
    np.testing.assert_allclose(logme(f, labels), np.mean(values), rtol=1e-8)


def test_logme_prefers_informative_features():
    rng = np.random.default_rng(1)
    good, labels = problem(90, 8, signal=2.0)
    weak, _ = problem(90, 8, signal=0.5)
    assert logme(good, labels) > logme(weak, labels) > logme(rng.normal(size=good.shape), labels)


def test_logme_invariances():
    f, labels = problem(50, 6)
    rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(6, 6)))[0]
    value = logme(f, labels)
    np.testing.assert_allclose(logme(1e4 * f @ rotation, labels), value, rtol=1e-8)
    np.testing.assert_allclose(logme(f, 10 - 5 * labels), value, rtol=1e-12)
    np.testing.assert_allclose(logme(np.hstack([f, np.zeros((50, 3))]), labels), value, rtol=1e-8)


def test_logme_of_a_perfect_fit_is_finite():
    labels = np.arange(30) % 3
    assert np.isfinite(logme(np.eye(3)[labels], labels))
    assert np.isfinite(logme(problem(8, 40)[0], np.arange(8) % 2))


def test_float32_input_is_scored_in_float64():
    f, labels = problem(200, 10)
    f32 = f.astype(np.float32)
    assert logme(jnp.asarray(f32), jnp.asarray(labels)) == logme(f32.astype(np.float64), labels)


def test_leep_against_its_definition():
    rng = np.random.default_rng(0)
    theta = rng.dirichlet(np.ones(4), 25)
    labels = rng.integers(0, 3, 25)
    total = 0.0
    for x in range(25):
        expected = 0.0
        for z in range(4):
            p_z = sum(theta[i, z] for i in range(25)) / 25
            p_yz = sum(theta[i, z] for i in range(25) if labels[i] == labels[x]) / 25
            expected += p_yz / p_z * theta[x, z]
        total += np.log(expected)
    np.testing.assert_allclose(leep(theta, labels), total / 25, rtol=1e-12)


def test_leep_with_an_empty_source_class():
    rng = np.random.default_rng(0)
    theta, labels = rng.dirichlet(np.ones(4), 25), rng.integers(0, 3, 25)
    padded = np.insert(theta, 2, 0.0, axis=1)
    with np.errstate(all="raise"):
        assert leep(padded, labels) == pytest.approx(leep(theta, labels), rel=1e-12)


def test_leep_of_hard_predictions_is_nce():
    rng = np.random.default_rng(3)
    source, labels = rng.integers(0, 5, 80), rng.integers(0, 3, 80)
    np.testing.assert_allclose(leep(np.eye(5)[source], labels), nce(source, labels), rtol=1e-12)


def test_nce_by_hand():
    """z=0 holds y = 0, 0, 1, 1 (ln 2 each); z=7 holds y = 5, 5, 5, 5 (certain)."""
    source = np.array([0, 0, 0, 0, 7, 7, 7, 7])
    labels = np.array([0, 0, 1, 1, 5, 5, 5, 5])
    np.testing.assert_allclose(nce(source, labels), -np.log(2) / 2)
    assert nce(labels, source) == 0.0  # z is a function of y


def test_h_score_by_hand():
    """Two classes at (±1, 0), each with noise (0, ±1): the first axis lies between classes, the second within."""
    f = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    labels = np.array([0, 0, 1, 1])
    np.testing.assert_allclose(h_score(f, labels), 1.0)
    np.testing.assert_allclose(h_score(f[:, 1:], labels), 0.0, atol=1e-12)
    # Noise (±1) along the first axis too: variance 1 between classes, 1 within.
    g = np.array([[2.0], [0.0], [0.0], [-2.0]])
    np.testing.assert_allclose(h_score(g, labels), 0.5)


@pytest.mark.parametrize("N,D", [(50, 6), (10, 25)])
def test_h_score_against_dense_algebra(N, D):
    f, labels = problem(N, D)
    f = np.hstack([f, f[:, :1]])  # a singular covariance
    expected_f = np.stack([f[labels == c].mean(0) for c in labels])
    pinv = np.linalg.pinv(np.cov(f, rowvar=False), rcond=1e-10)
    np.testing.assert_allclose(
        h_score(f, labels), np.trace(pinv @ np.cov(expected_f, rowvar=False)), rtol=1e-7
    )
    if N <= D:
        np.testing.assert_allclose(h_score(f, labels), 2.0)  # classes - 1: says nothing


@pytest.mark.parametrize("N,D", [(50, 6), (10, 25), (300, 3)])
def test_ledoit_wolf_against_scikit_learn(N, D):
    from sklearn.covariance import LedoitWolf

    f, labels = problem(N, D)
    theirs = LedoitWolf().fit(f)
    covariance, shrinkage = ledoit_wolf(f)
    np.testing.assert_allclose(shrinkage, theirs.shrinkage_, rtol=1e-9)
    np.testing.assert_allclose(covariance, theirs.covariance_, rtol=1e-9, atol=1e-12)
    expected_f = np.stack([f[labels == c].mean(0) for c in labels])
    between = np.cov(expected_f, rowvar=False, bias=True)
    value = (1 - theirs.shrinkage_) * np.trace(np.linalg.solve(theirs.covariance_, between))
    np.testing.assert_allclose(shrunk_h_score(f, labels), value, rtol=1e-9)


def test_shrunk_h_score_tells_models_apart_where_h_score_cannot():
    good, labels = problem(20, 60, signal=3.0)
    noise = np.random.default_rng(5).normal(size=good.shape)
    np.testing.assert_allclose(h_score(good, labels), h_score(noise, labels))
    assert shrunk_h_score(good, labels) > shrunk_h_score(noise, labels) + 0.2


def test_weighted_tau():
    assert weighted_tau([1.0, 2.0, 3.0, 4.0], [0.1, 0.2, 0.3, 0.4]) == pytest.approx(1.0)
    assert weighted_tau([4.0, 3.0, 2.0, 1.0], [0.1, 0.2, 0.3, 0.4]) == pytest.approx(-1.0)
    # Weight of ranks r, s: 1/(r+1) + 1/(s+1). Swapping the two best costs 1.5 of the weights' sum 5.5 on each side.
    top = weighted_tau([1.0, 2.0, 4.0, 3.0], [0.1, 0.2, 0.3, 0.4])
    bottom = weighted_tau([2.0, 1.0, 3.0, 4.0], [0.1, 0.2, 0.3, 0.4])
    weights = [1 / (r + 1) + 1 / (s + 1) for r in range(4) for s in range(r)]
    assert top == pytest.approx(1 - 2 * 1.5 / sum(weights))
    assert top < bottom
    with pytest.raises(ValueError, match="found 1 scores and 2"):
        weighted_tau([1.0], [1.0, 2.0])


@pytest.mark.parametrize("score", [logme, h_score, shrunk_h_score])
def test_bad_features(score, no_shape_checks):
    f, labels = problem(10, 3)
    with pytest.raises(ValueError, match="1 of 10 rows have NaN or infinity, the first is 4"):
        score(np.where(np.arange(10)[:, None] == 4, np.nan, f), labels)
    with pytest.raises(ValueError, match="expected as many rows, found 10 and 9"):
        score(f, labels[:9])
    with pytest.raises(ValueError, match="at least 2 classes, found only class 7"):
        score(f, np.full(10, 7))


def test_bad_probabilities(no_shape_checks):
    logits = jax.random.normal(jax.random.key(0), (6, 3))
    with pytest.raises(ValueError, match="sum to 1"):
        leep(logits, np.arange(6))
    with pytest.raises(ValueError, match="expected one each an example, found 3 and 2"):
        nce(np.arange(3), np.arange(2))
