"""Overlaps of boxes against hand-made cases and counts of pixels, and suppression against a plain loop."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl.tasks import boxes


def random_boxes(rng, count):
    corner, sides = rng.uniform(0, 50, (count, 2)), rng.uniform(1, 30, (count, 2))
    return np.concatenate([corner, corner + sides], 1).astype(np.float32)


def pixels(box, side=40):
    """The box as a mask, so that areas are counts."""
    mask = np.zeros((side, side), bool)
    left, top, right, bottom = box
    mask[top:bottom, left:right] = True
    return mask


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        ((0, 0, 10, 10), (0, 0, 10, 10), 1.0),
        ((0, 0, 10, 10), (5, 0, 15, 10), 1 / 3),  # shifted by half a side
        ((0, 0, 10, 10), (5, 5, 15, 15), 25 / 175),
        ((0, 0, 10, 10), (2, 2, 4, 4), 0.04),
        ((0, 0, 10, 10), (10, 0, 20, 10), 0.0),
        ((3, 3, 3, 3), (3, 3, 3, 3), 0.0),
    ],
)
def test_iou_by_hand(one, other, shared):
    found = boxes.iou(jnp.array([one], jnp.float32), jnp.array([other], jnp.float32))
    assert found.shape == (1, 1) and float(found[0, 0]) == pytest.approx(shared, abs=1e-6)


def test_iou_counts_pixels():
    rng = np.random.default_rng(0)
    corner = rng.integers(0, 20, (12, 2))
    all_boxes = np.concatenate([corner, corner + rng.integers(1, 20, (12, 2))], 1)
    found = np.asarray(boxes.iou(jnp.array(all_boxes[:5], jnp.float32), jnp.array(all_boxes, jnp.float32)))
    for i in range(5):
        for j in range(12):
            a, b = pixels(all_boxes[i]), pixels(all_boxes[j])
            assert found[i, j] == pytest.approx((a & b).sum() / (a | b).sum(), abs=1e-6)


@pytest.mark.parametrize(
    ("one", "other", "value"),
    [
        ((0, 0, 10, 10), (0, 0, 10, 10), 1.0),
        ((0, 0, 10, 10), (5, 0, 15, 10), 1 / 3),  # the box around both is filled: nothing to subtract
        ((0, 0, 10, 10), (20, 0, 30, 10), -1 / 3),  # a gap as wide as they are: a third of 30 x 10
        ((0, 0, 10, 10), (10, 10, 20, 20), -0.5),  # corner to corner: half of 20 x 20 is empty
    ],
)
def test_giou_by_hand(one, other, value):
    found = boxes.giou(jnp.array(one, jnp.float32), jnp.array(other, jnp.float32))
    assert float(found) == pytest.approx(value, abs=1e-6)


def test_giou_pulls_boxes_that_do_not_touch():
    there = jnp.array([20.0, 0.0, 30.0, 10.0])
    pull = jax.grad(lambda box: boxes.giou(box, there))(jnp.array([0.0, 0.0, 10.0, 10.0]))
    assert float(pull[2]) > 0  # the right edge moves right


def plain_nms(all_boxes, score, label, overlap):
    stay = []
    for i in np.argsort(-score, kind="stable"):
        shared = np.asarray(boxes.iou(jnp.array(all_boxes[i : i + 1]), jnp.array(all_boxes)))[0]
        if score[i] > 0 and not any(label[j] == label[i] and shared[j] > overlap for j in stay):
            stay.append(i)
    return sorted(stay)


@pytest.mark.parametrize("seed", range(5))
def test_nms_is_the_greedy_loop(seed):
    rng = np.random.default_rng(seed)
    all_boxes, score, label = random_boxes(rng, 40), rng.uniform(0, 1, 40), rng.integers(0, 2, 40)
    score = np.where(rng.uniform(size=40) < 0.2, 0.0, score).astype(np.float32)
    stay = jax.jit(partial(boxes.nms, overlap=0.3))(jnp.array(all_boxes), jnp.array(score), jnp.array(label))
    kept = np.flatnonzero(stay).tolist()
    assert kept == plain_nms(all_boxes, score, label, 0.3)
    assert 3 < len(kept) < (score > 0).sum()  # some stay and some go


def test_nms_lets_a_removed_box_remove_nothing():
    """b goes because of a; c, which only b overlaps, stays."""
    row = jnp.array([[0.0, 0.0, 10.0, 10.0], [4.0, 0.0, 14.0, 10.0], [8.0, 0.0, 18.0, 10.0]])
    score, label = jnp.array([0.9, 0.8, 0.7]), jnp.zeros(3, int)
    assert boxes.nms(row, score, label, 0.3).tolist() == [True, False, True]
    assert boxes.nms(row, score, jnp.array([0, 1, 0]), 0.3).tolist() == [True] * 3  # another class
