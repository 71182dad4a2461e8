"""Label-free scores and importance weights against NumPy, SciPy and cases solved by hand."""

import numpy as np
import pytest

from jtl.domain import density_ratio, label_shift, protocol


def softmax(z):
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def entropy(p):
    return -sum(x * np.log(x) for x in p if x > 0)


Z = 2 * np.random.default_rng(0).normal(size=(23, 4))


def test_scores_by_definition():
    p = softmax(Z)
    mean_entropy = np.mean([entropy(row) for row in p])
    assert protocol.negative_entropy(Z) == pytest.approx(-mean_entropy)
    assert protocol.mutual_information(Z) == pytest.approx(entropy(p.mean(0)) - mean_entropy)
    assert protocol.source_validation(Z, Z.argmax(-1)) == 1.0
    labels = Z.argmax(-1).copy()
    labels[:5] = (labels[:5] + 1) % 4
    assert protocol.source_validation(Z, labels) == pytest.approx(18 / 23)


@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_soft_neighbourhood_density(chunk):
    p = softmax(Z)
    p = p / np.linalg.norm(p, axis=1, keepdims=True)
    rows = []
    for i in range(len(p)):
        others = np.array([p[i] @ p[j] / 0.05 for j in range(len(p)) if j != i])
        rows.append(entropy(softmax(others)))
    assert protocol.soft_neighbourhood_density(Z, chunk=chunk) == pytest.approx(np.mean(rows))


def test_clusters_and_extremes():
    tight = np.repeat(20 * np.eye(4), 6, 0)
    assert protocol.soft_neighbourhood_density(tight) == pytest.approx(np.log(5), abs=1e-3)
    huge = 1e4 * np.eye(4)
    assert protocol.negative_entropy(huge) == 0 and protocol.mutual_information(huge) == pytest.approx(
        np.log(4)
    )


def test_the_control_variate_leaves_the_mean_and_lowers_the_variance():
    rng = np.random.default_rng(0)
    w, loss = rng.gamma(1.0, 1.0, 40), rng.random(40)
    wl = w * loss
    eta = -np.cov(wl, w, ddof=1)[0, 1] / np.var(w, ddof=1)
    assert protocol.controlled_risk(w, loss) == pytest.approx(wl.mean() + eta * (w.mean() - 1))
    assert protocol.controlled_risk(np.ones(40), loss) == pytest.approx(loss.mean())
    draws = [(rng.gamma(1.0, 1.0, 60), rng.random(60)) for _ in range(400)]  # E w = 1, E wl = 0.5
    controlled = np.array([protocol.controlled_risk(*d) for d in draws])
    plain = np.array([np.mean(a * b) for a, b in draws])
    assert controlled.mean() == pytest.approx(0.5, abs=0.02) and controlled.std() < 0.7 * plain.std()


def gaussians(N=4000, M=2000, seed=0):
    """p_s = N(0, I), p_t = N((1, 0), I), so p_t / p_s = exp(x_1 - 1/2)."""
    rng = np.random.default_rng(seed)
    source, target = rng.normal(size=(N, 2)), rng.normal(size=(M, 2)) + [1.0, 0.0]
    return source, target


def test_the_density_ratio_of_two_gaussians():
    source, target = gaussians()
    at = np.array([[-1.0, 0.3], [0.0, 0.0], [1.0, -1.0], [2.0, 1.0]])
    np.testing.assert_allclose(density_ratio(source, target, at), np.exp(at[:, 0] - 0.5), rtol=0.2)
    assert density_ratio(source, target, source).mean() == pytest.approx(1, abs=0.1)
    # Half as many target rows change nothing: the classes' shares are divided out.
    fewer = density_ratio(source, target[:500], at)
    np.testing.assert_allclose(fewer, np.exp(at[:, 0] - 0.5), rtol=0.35)
    # A constant column is no 0/0.
    flat = [np.c_[rows, np.ones(len(rows))] for rows in (source, target, at)]
    np.testing.assert_allclose(density_ratio(*flat), density_ratio(source, target, at), rtol=1e-3)


def test_dev_estimates_the_risk_on_the_target():
    source, target = gaussians()
    validation = np.random.default_rng(5).normal(size=(3000, 2))
    error = lambda x: (x[:, 0] > 0.8).astype(float)  # noqa: E731  # worse on the target
    found = -protocol.deep_embedded_validation(source, target, validation, error(validation))
    assert error(validation).mean() == pytest.approx(0.21, abs=0.03)
    assert found == pytest.approx(error(target).mean(), abs=0.05)


def test_label_shift_solves_for_the_target_shares():
    rng = np.random.default_rng(0)
    confusion = np.array(
        [[0.8, 0.1, 0.1], [0.1, 0.7, 0.2], [0.1, 0.2, 0.7]]
    )  # of told, given the label (column)
    told = lambda y: np.array([rng.choice(3, p=confusion[:, c]) for c in y])  # noqa: E731
    source, target = rng.choice(3, 6000, p=[0.5, 0.3, 0.2]), rng.choice(3, 6000, p=[0.2, 0.2, 0.6])
    found = label_shift(told(source), source, told(target), 3)
    np.testing.assert_allclose(found, np.array([0.2, 0.2, 0.6]) / [0.5, 0.3, 0.2], rtol=0.1)
    exact = label_shift(np.array([0, 0, 1]), np.array([0, 0, 1]), np.array([0, 1, 1, 1]), 2)
    np.testing.assert_allclose(exact, [0.25 / (2 / 3), 0.75 / (1 / 3)])


def test_bad_input_is_refused():
    one = np.array([0, 0, 0])
    with pytest.raises(ValueError, match="singular"):
        label_shift(one, np.array([0, 1, 1]), one, 2)
    with pytest.raises(ValueError, match="0 ... 1"):
        label_shift(one, np.array([0, 1, 2]), one, 2)
    with pytest.raises(ValueError, match="2 labels"):
        label_shift(one, np.array([0, 1]), one, 2)
    source, target = gaussians(10, 10)
    with pytest.raises(ValueError, match="rows of one size"):
        density_ratio(source, target, target[:, :1])
    with pytest.raises(ValueError, match="finite"):
        density_ratio(source, target, target * np.nan)
    with pytest.raises(ValueError, match="rows of one size"):
        density_ratio(source, target[:0], target)
    with pytest.raises(ValueError, match="expected one each, at least 2"):
        protocol.deep_embedded_validation(source, target, target, np.zeros(3))
    with pytest.raises(ValueError, match="finite"):
        protocol.negative_entropy(Z * np.inf)
    with pytest.raises(ValueError, match="two rows"):
        protocol.soft_neighbourhood_density(Z[:1])
    with pytest.raises(ValueError, match="expected one each"):
        protocol.source_validation(Z, np.zeros(3, int))
