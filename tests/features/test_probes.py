import dataclasses

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier

from jtl.features import fit_knn, fit_logistic, fit_ridge
from jtl.features.probes import GRID


@pytest.fixture(scope="module")
def digits():
    """Real digits, 400 to fit and 300 to test; some pixels are constant, others nearly so."""
    x, y = load_digits(return_X_y=True)
    return x[:400], y[:400], x[400:700], y[400:700]


def standardised(x, other):
    scale = np.where(x.std(0) == 0, 1, x.std(0))
    return (other - x.mean(0)) / scale


@pytest.mark.parametrize("penalty", [1e-3, 0.1])
def test_logistic_agrees_with_sklearn(digits, penalty):
    x, y, x_test, _ = digits
    probe = fit_logistic(x, y, penalties=(penalty,), tolerance=1e-8)
    oracle = LogisticRegression(C=1 / (len(x) * penalty), solver="newton-cholesky", tol=1e-10).fit(
        standardised(x, x), y
    )
    np.testing.assert_allclose(probe.kernel.T, oracle.coef_, atol=1e-5)
    # Softmax is blind to a constant added to all biases.
    np.testing.assert_allclose(
        probe.bias - probe.bias.mean(), oracle.intercept_ - oracle.intercept_.mean(), atol=1e-4
    )
    logits = probe(x_test)
    expected = oracle.decision_function(standardised(x, x_test))
    np.testing.assert_allclose(
        logits - logits.mean(1, keepdims=True), expected - expected.mean(1, keepdims=True), atol=5e-4
    )


def test_logistic_reaches_its_tolerance_on_every_penalty_of_the_grid(digits):
    x, y, *_ = digits
    for penalty in GRID:
        probe = fit_logistic(x, y, penalties=(penalty,))  # warnings are errors
        z = standardised(x, x)
        p = np.exp(probe(x) - probe(x).max(1, keepdims=True))
        error = (p / p.sum(1, keepdims=True) - np.eye(10)[y]) / len(x)
        assert np.abs(z.T @ error + penalty * probe.kernel).max() < 1.01e-6


def test_logistic_says_when_it_does_not_converge():
    x, y = np.array([[0.0], [1.0]]), np.array([0, 1])
    with pytest.warns(RuntimeWarning, match="penalty 0.0: the gradient reached"):
        fit_logistic(x, y, penalties=(0.0,), tolerance=1e-300)


def test_ridge_agrees_with_sklearn(digits):
    x, y, x_test, _ = digits
    for rows in (400, 30):  # more and fewer rows than features
        probe = fit_ridge(x[:rows], y[:rows], classes=10, penalties=(0.05,))
        oracle = Ridge(alpha=rows * 0.05, solver="cholesky").fit(
            standardised(x[:rows], x[:rows]), np.eye(10)[y[:rows]]
        )
        expected = oracle.predict(standardised(x[:rows], x_test))
        np.testing.assert_allclose(probe(x_test), expected, atol=1e-8)


def test_validation_chooses_the_penalty(digits):
    x, y, x_test, y_test = digits
    one_by_one = [fit_logistic(x, y, penalties=(penalty,)) for penalty in GRID]

    def cross_entropy(probe):
        logits = probe(x_test)
        return np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(len(y_test)), y_test])

    best = min(one_by_one, key=cross_entropy)
    assert fit_logistic(x, y, validation=(x_test, y_test)).penalty == best.penalty
    assert GRID[0] < best.penalty < GRID[-1]
    squared = [np.sum((fit_ridge(x, y, penalties=(p,))(x_test) - np.eye(10)[y_test]) ** 2) for p in GRID]
    assert fit_ridge(x, y, validation=(x_test, y_test)).penalty == GRID[int(np.argmin(squared))]


def test_knn_agrees_with_sklearn(digits):
    x, y, x_test, y_test = digits
    probe = fit_knn(x, y, k=7)
    oracle = KNeighborsClassifier(7, metric="cosine", algorithm="brute").fit(x, y)
    votes = np.exp(probe(x_test, rows=64)) * (7 + 10) - 1
    np.testing.assert_allclose(votes / 7, oracle.predict_proba(x_test), atol=1e-9)
    assert np.mean(probe(x_test).argmax(1) == y_test) > 0.85


@pytest.mark.parametrize("fit", [fit_logistic, fit_ridge])
def test_as_head_folds_the_standardisation(digits, fit):
    x, y, x_test, _ = digits
    probe = fit(x, y, penalties=(0.01,))
    head = probe.as_head()
    assert head["kernel"].dtype == head["bias"].dtype == np.float32
    np.testing.assert_allclose(x_test @ head["kernel"] + head["bias"], probe(x_test), atol=1e-4)


@pytest.mark.parametrize("fit", [fit_logistic, fit_ridge])
def test_a_feature_that_is_dead_but_for_rounding_gets_no_large_weight(digits, fit):
    x, y, x_test, _ = digits
    alive = fit(x, y, penalties=(0.01,))
    dead = 1e-9 * np.random.default_rng(0).standard_normal((len(x), 1))
    kernel = fit(np.hstack([x, dead]), y, penalties=(0.01,)).as_head()["kernel"]
    np.testing.assert_allclose(kernel[:-1], alive.as_head()["kernel"], atol=1e-5)
    assert np.abs(kernel[-1]).max() < 1e-3


def test_probes_refuse_bad_input(digits):
    x, y, *_ = digits
    with pytest.raises(ValueError, match="validation must choose"):
        fit_logistic(x, y)
    with pytest.raises(ValueError, match=r"labels must be in 0 ... 4; found 0 ... 9"):
        fit_ridge(x, y, classes=5, penalties=(1.0,))
    with pytest.raises(ValueError, match="1 of 400 rows of features are not finite"):
        fit_logistic(np.where(np.arange(400)[:, None] == 3, np.nan, x), y, penalties=(1.0,))
    with pytest.raises(ValueError, match="k must be in 1 ... 400"):
        fit_knn(x, y, k=401)
    with pytest.raises(ValueError, match="at least one row"):
        fit_knn(x[:0], y[:0])
    with pytest.raises(dataclasses.FrozenInstanceError):
        fit_knn(x, y).k = 3


def test_a_label_for_each_row(digits, no_shape_checks):
    x, y, *_ = digits
    with pytest.raises(ValueError, match="found 399 labels and 400 rows"):
        fit_ridge(x, y[1:], classes=10, penalties=(1.0,))


def test_probe_of_classes_unseen_in_training(digits):
    x, y, *_ = digits
    two = y < 2
    assert fit_logistic(x[two], y[two], classes=10, penalties=(0.1,))(x).shape == (400, 10)
