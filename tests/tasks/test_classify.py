import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics

from jtl.tasks import Classify, accuracy, confusion, expected_calibration_error, macro_f1
from jtl.wrap import function

N, C = 50, 4


@pytest.fixture(scope="module")
def logits():
    return np.random.default_rng(0).normal(size=(N, C)).astype(np.float32) * 3


@pytest.fixture(scope="module")
def labels():
    return np.random.default_rng(1).integers(0, C, N)


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_over_the_rows_that_count(logits, labels, smoothing):
    model = function(
        lambda params, logits: logits + params["zero"], {"zero": jnp.zeros(())}, returns="logits"
    )
    weight = (np.arange(N) < 30).astype(np.float32)
    batch = {"logits": logits, "label": labels, "weight": weight}
    value, aux = Classify(smoothing=smoothing)(model, batch, None)
    targets = (1 - smoothing) * np.eye(C)[labels] + smoothing / C
    np.testing.assert_allclose(value, -(targets * log_softmax(logits)).sum(-1)[:30].mean(), rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["accuracy"], accuracy(logits[:30], labels[:30]), rtol=1e-6)
    # A batch of padding alone is worth 0, not 0/0.
    gradient = jax.grad(lambda m: Classify()(m, batch | {"weight": 0 * weight}, None)[0])(model).params
    assert float(gradient["zero"]) == 0


def test_metrics_are_those_of_scikit_learn(logits, labels):
    named = logits.argmax(-1)
    assert accuracy(logits, labels) == metrics.accuracy_score(labels, named)
    np.testing.assert_array_equal(confusion(logits, labels), metrics.confusion_matrix(labels, named))
    assert macro_f1(logits, labels) == pytest.approx(metrics.f1_score(labels, named, average="macro"))


def test_a_class_that_never_occurs_counts_zero():
    logits, labels = np.eye(3, dtype=np.float32)[[0, 1, 1]], np.array([0, 1, 1])
    assert macro_f1(logits, labels) == pytest.approx(2 / 3)


def test_calibration_error_by_hand():
    # Confidence 0.9 with 3 of 4 right, confidence 0.6 with 1 of 2 right: (4 * 0.15 + 2 * 0.1) / 6.
    sure = np.array([0.9] * 4 + [0.6] * 2)
    logits, labels = np.log(np.stack([sure, 1 - sure], -1)), np.array([0, 0, 0, 1, 0, 1])
    assert expected_calibration_error(logits, labels) == pytest.approx(0.8 / 6)
