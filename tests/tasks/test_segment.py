"""Segmentation: losses by NumPy, metrics against scikit-learn's own, pixels of no class."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import f1_score, jaccard_score

from jtl.tasks import Dice, Segment, pixel_confusion, segmentation_scores
from jtl.wrap import function

MODEL = function(lambda params, x: x, {})  # the losses read outputs alone


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 4, 6, 5)).astype(np.float32)
    mask = rng.integers(0, 4, (3, 4, 6)).astype(np.int32)  # class 4 is not there
    mask[0, 1], mask[2] = 255, np.where(mask[2] > 1, 255, mask[2])
    return logits, mask


def value(loss, logits, mask, **fields):
    batch = {"mask": jnp.array(mask), **fields}
    return jax.jit(lambda logits, batch: loss.value(MODEL, {"pixel_logits": logits}, batch, None))(
        logits, batch
    )


def softmax(x):
    e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_cross_entropy_is_the_mean_over_known_pixels(case):
    logits, mask = case
    weight = jnp.array([1.0, 0.0, 1.0])
    real = (mask < 5) & (np.array([1, 0, 1]) > 0)[:, None, None]
    chance = softmax(logits)[real]
    wanted = -np.log(chance[np.arange(len(chance)), mask[real]]).mean()
    found, metrics = value(Segment(), logits, mask, weight=weight)
    assert float(found) == pytest.approx(wanted, rel=1e-5)
    assert float(metrics["pixel_accuracy"]) == pytest.approx((chance.argmax(-1) == mask[real]).mean())


def test_dice_is_numpys(case):
    logits, mask = case
    chance, real = softmax(logits), mask < 5
    ratios = []
    for c in range(4):
        p, t = chance[..., c][real], (mask[real] == c).astype(float)
        ratios.append(2 * (p * t).sum() / ((p**2).sum() + (t**2).sum()))
    assert float(value(Dice(), logits, mask)[0]) == pytest.approx(1 - np.mean(ratios), rel=1e-5)


def test_true_masks_cost_nothing(case):
    _, mask = case
    sure = 50 * jax.nn.one_hot(mask, 5)
    assert float(value(Segment(), sure, mask)[0]) == pytest.approx(0, abs=1e-6)
    assert float(value(Dice(), sure, mask)[0]) == pytest.approx(0, abs=1e-6)


def test_pixels_of_no_class_get_no_gradient(case):
    logits, mask = case
    loss = Segment() + Dice()
    slope = jax.jit(
        jax.grad(lambda x: loss.value(MODEL, {"pixel_logits": x}, {"mask": jnp.array(mask)}, None)[0])
    )
    found = np.asarray(slope(jnp.array(logits)))
    assert (found[mask == 255] == 0).all() and (found[mask != 255] != 0).any(-1).all()


def test_nothing_known_is_no_nan(case):
    logits, mask = case
    for loss in (Segment(), Dice()):
        assert np.isfinite(float(value(loss, logits, np.full_like(mask, 255))[0]))


def test_sizes_that_differ():
    with pytest.raises(ValueError, match="differ in size: the sides of images must be multiples"):
        Segment().value(
            MODEL, {"pixel_logits": jnp.zeros((1, 4, 4, 2))}, {"mask": jnp.zeros((1, 4, 5), int)}, None
        )


def test_scores_are_scikit_learns():
    rng = np.random.default_rng(1)
    true, named = rng.integers(0, 5, (6, 7, 8)), rng.integers(0, 5, (6, 7, 8))
    true[0] = 255
    real = true != 255
    scores = segmentation_scores(pixel_confusion(zip(true, named, strict=True), 5))
    assert scores["mean_iou"] == pytest.approx(jaccard_score(true[real], named[real], average="macro"))
    assert scores["mean_dice"] == pytest.approx(f1_score(true[real], named[real], average="macro"))
    assert scores["pixel_accuracy"] == pytest.approx((true == named)[real].mean())


def test_scores_by_hand():
    """Half of four pixels of class 1 found, one pixel of background called 1; class 2 is nowhere."""
    true, named = np.array([[1, 1, 1, 1, 0, 0]]), np.array([[1, 1, 0, 0, 1, 0]])
    confusion = pixel_confusion([(true, named)], 3)
    assert confusion.tolist() == [[1, 1, 0], [2, 2, 0], [0, 0, 0]]
    scores = segmentation_scores(confusion)
    assert scores["mean_iou"] == pytest.approx((1 / 4 + 2 / 5) / 2)
    assert scores["mean_dice"] == pytest.approx((2 / 5 + 4 / 7) / 2)
