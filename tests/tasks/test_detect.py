"""FCOS: targets by hand and by a plain loop, the loss by NumPy, decoding of outputs that say the truth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl.models.feature_pyramid import cells
from jtl.tasks import Detect, average_precision, detect
from jtl.wrap import function

CELLS = cells([(8, 8), (4, 4), (2, 2)], (8, 16, 32))  # of an image of 64 x 64
BOXES = np.array([[10, 10, 30, 34], [16, 12, 28, 24], [2, 30, 62, 62], [0, 0, 0, 0]], np.float32)
LABEL = np.array([3, 1, 0, -1])
MODEL = function(lambda params, x: x, {})  # the loss reads outputs alone


def plain_assign(all_cells, boxes, label, radius, reach):
    """Section 3 of the paper, a cell at a time."""
    strides = sorted(set(all_cells[:, 2]))
    found = []
    for x, y, stride in all_cells:
        low = 0 if stride == strides[0] else reach / 2 * stride
        high = np.inf if stride == strides[-1] else reach * stride
        best = None
        for (left, top, right, bottom), c in zip(boxes, label, strict=True):
            sides = (x - left, y - top, right - x, bottom - y)
            near = max(abs(x - (left + right) / 2), abs(y - (top + bottom) / 2)) < radius * stride
            if c >= 0 and min(sides) > 0 and near and low < max(sides) <= high:
                area = (right - left) * (bottom - top)
                if best is None or area < best[0]:
                    centre = (min(sides[0], sides[2]) / max(sides[0], sides[2])) * (
                        min(sides[1], sides[3]) / max(sides[1], sides[3])
                    )
                    best = (area, c, (left, top, right, bottom), centre**0.5)
        found.append((-1, (0, 0, 0, 0), 0.0) if best is None else best[1:])
    return found


def assigned(reach=2.0):
    return detect.assign(jnp.array(CELLS), jnp.array(BOXES), jnp.array(LABEL), reach=reach)


@pytest.mark.parametrize("reach", [2.0, 4.0, 8.0])
def test_targets_are_those_of_the_plain_loop(reach):
    got, wanted = assigned(reach), plain_assign(CELLS, BOXES, LABEL, 1.5, reach)
    assert got.label.tolist() == [one[0] for one in wanted]
    np.testing.assert_allclose(got.box, [one[1] for one in wanted])
    np.testing.assert_allclose(got.centerness, [one[2] for one in wanted], atol=1e-6)
    assert {-1, 1, 0} <= set(got.label.tolist())


def test_targets_by_hand():
    """A box of 16 x 16 around the centre of a cell of stride 8: that cell is its very middle."""
    box = jnp.array([[12.0, 12.0, 28.0, 28.0]])
    got = detect.assign(jnp.array(CELLS), box, jnp.array([5]))
    middle = next(i for i, cell in enumerate(CELLS.tolist()) if cell == [20.0, 20.0, 8.0])
    assert got.label[middle] == 5 and got.centerness[middle] == 1.0
    assert got.box[middle].tolist() == [12, 12, 28, 28]
    left = middle - 1  # its centre lies at x = 12, on the edge: outside
    assert got.label[left] == -1 and got.centerness[left] == 0
    assert (got.label >= 0).sum() == 1


def test_the_smaller_object_gets_the_cell():
    cell = next(i for i, one in enumerate(CELLS.tolist()) if one == [20.0, 20.0, 8.0])
    assert assigned(8.0).label[cell] == 1  # inside boxes 0 and 1


def outputs_of(rng, rows=2, classes=4):
    draw = lambda *shape: jnp.array(rng.normal(size=shape), jnp.float32)  # noqa: E731
    distances = jnp.exp(draw(rows, len(CELLS), 4)) * 8
    return {"cells": jnp.array(CELLS), "class_logits": draw(rows, len(CELLS), classes), "distances": distances,
            "centerness": draw(rows, len(CELLS))}  # fmt: skip


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def plain_loss(outputs, boxes, label, weight):
    """Equation 2, with the published alpha 0.25 and gamma 2."""
    focal, box_loss, central, count, pull = 0.0, 0.0, 0.0, 0, 0.0
    for row in np.flatnonzero(weight):
        truth = plain_assign(CELLS, boxes[row], label[row], 1.5, 2.0)
        for i, (c, box, centre) in enumerate(truth):
            p = sigmoid(outputs["class_logits"][row, i])
            for k, own in enumerate(p):
                focal += -0.25 * (1 - own) ** 2 * np.log(own) if k == c else -0.75 * own**2 * np.log(1 - own)
            if c < 0:
                continue
            x, y, _ = CELLS[i]
            to_left, to_top, to_right, to_bottom = np.asarray(outputs["distances"][row, i], np.float64)
            mine = (x - to_left, y - to_top, x + to_right, y + to_bottom)
            sides = [min(mine[2], box[2]) - max(mine[0], box[0]), min(mine[3], box[3]) - max(mine[1], box[1])]
            shared = max(sides[0], 0) * max(sides[1], 0)
            union = (mine[2] - mine[0]) * (mine[3] - mine[1]) + (box[2] - box[0]) * (box[3] - box[1]) - shared
            around = (max(mine[2], box[2]) - min(mine[0], box[0])) * (
                max(mine[3], box[3]) - min(mine[1], box[1])
            )
            box_loss += centre * (1 - (shared / union - (around - union) / around))
            q = sigmoid(outputs["centerness"][row, i])
            central += -(centre * np.log(q) + (1 - centre) * np.log(1 - q))
            count, pull = count + 1, pull + centre
    return focal / count, box_loss / pull, central / count


def test_loss_is_numpys():
    outputs = outputs_of(np.random.default_rng(0), rows=3)
    boxes = np.stack([BOXES, BOXES[::-1], BOXES])
    label = np.stack([LABEL, LABEL[::-1], LABEL])
    weight = np.array([1, 1, 0])
    batch = {
        "boxes": jnp.array(boxes),
        "box_label": jnp.array(label),
        "weight": jnp.array(weight, jnp.float32),
    }
    value, parts = jax.jit(lambda outputs, batch: Detect(reach=2.0).value(MODEL, outputs, batch, None))(
        outputs, batch
    )
    wanted = plain_loss(outputs, boxes, label, weight)
    np.testing.assert_allclose(
        [parts[n] for n in ("class_loss", "box_loss", "centerness_loss")], wanted, rtol=1e-5
    )
    assert float(value) == pytest.approx(sum(wanted), rel=1e-5)


def test_loss_without_objects_is_finite_and_pushes_every_class_down():
    outputs = outputs_of(np.random.default_rng(1))
    batch = {"boxes": jnp.zeros((2, 3, 4)), "box_label": -jnp.ones((2, 3), int)}

    def value(logits, distances):
        return Detect().value(
            MODEL, {**outputs, "class_logits": logits, "distances": distances}, batch, None
        )[0]

    pushed, moved = jax.jit(jax.grad(value, (0, 1)))(outputs["class_logits"], outputs["distances"])
    assert (pushed > 0).all() and (moved == 0).all()


def said(boxes, label, classes=4, sure=8.0):
    """Outputs that say exactly what is there."""
    true = jax.vmap(lambda b, c: detect.assign(jnp.array(CELLS), b, c))(jnp.array(boxes), jnp.array(label))
    at = jnp.broadcast_to(jnp.array(CELLS)[:, :2], (*true.label.shape, 2))
    distances = jnp.concatenate([at - true.box[..., :2], true.box[..., 2:] - at], -1)
    logits = sure * (2 * jax.nn.one_hot(true.label, classes) - 1)
    return {"cells": jnp.array(CELLS), "class_logits": logits, "distances": distances,
            "centerness": jnp.where(true.label >= 0, sure * true.centerness, -sure)}  # fmt: skip


def test_true_outputs_are_decoded_to_the_truth():
    boxes, label = np.stack([BOXES, np.zeros_like(BOXES)]), np.stack([LABEL, -np.ones_like(LABEL)])
    found = jax.jit(lambda outputs: detect.decode(outputs, (64, 64), most=5))(said(boxes, label))
    real = np.asarray(found.score[0]) > 0
    got = {
        (int(c), tuple(map(float, box)))
        for c, box in zip(found.label[0][real], found.boxes[0][real], strict=True)
    }
    assert got == {(int(c), tuple(map(float, box))) for c, box in zip(LABEL[:3], BOXES[:3], strict=True)}
    assert (np.asarray(found.score[1]) == 0).all()  # nothing there, nothing found
    assert found.boxes.shape == (2, 5, 4)
    assert average_precision(*map(np.asarray, found), boxes, label)["map"] == pytest.approx(1.0)


def test_one_class_names_an_object_once():
    """One box that two classes claim, the second surer."""
    outputs = {"cells": jnp.array([[4.0, 4.0, 8.0]]), "class_logits": jnp.array([[[1.0, 2.0]]]),
               "distances": jnp.array([[[3.0, 3.0, 3.0, 3.0]]]), "centerness": jnp.array([[5.0]])}  # fmt: skip
    both, one = (detect.decode(outputs, (8, 8), one_class=one_class) for one_class in (False, True))
    assert both.label[0, :2].tolist() == [1, 0] and (both.score[0, :2] > 0).all()
    assert one.label[0, 0] == 1 and (one.score[0] > 0).sum() == 1


def test_boxes_are_cut_at_the_edge():
    outputs = {"cells": jnp.array([[4.0, 4.0, 8.0]]), "class_logits": jnp.array([[[5.0]]]),
               "distances": jnp.array([[[9.0, 1.0, 100.0, 2.0]]]), "centerness": jnp.array([[5.0]])}  # fmt: skip
    found = detect.decode(outputs, (32, 64))
    assert found.boxes[0, 0].tolist() == [0.0, 3.0, 64.0, 6.0]
    assert float(found.score[0, 0]) == pytest.approx(sigmoid(5.0))  # the mean of two alike


# --- average precision -----------------------------------------------------------------------------

SQUARE = np.array([[[0.0, 0.0, 10.0, 10.0]]])
SURE, FIRST = np.array([[0.9]]), np.array([[0]])


def test_perfect_boxes():
    found = average_precision(SQUARE, SURE, FIRST, SQUARE, FIRST)
    assert found == pytest.approx({"map": 1.0, "map_50": 1.0, "map_75": 1.0})


@pytest.mark.parametrize(
    ("shift", "share"),
    [(5.0, 0.0), (1.0, 0.7)],  # IoU 1/3 and 9/11 = 0.818: seven of the ten overlaps 0.50 to 0.95 are below
)
def test_shifted_boxes(shift, share):
    moved = SQUARE + np.array([shift, 0.0, shift, 0.0])
    assert average_precision(moved, SURE, FIRST, SQUARE, FIRST)["map"] == pytest.approx(share)


def test_a_surer_wrong_box_halves_the_precision():
    both = np.concatenate([SQUARE + 40, SQUARE], 1)
    score, label = np.array([[0.9, 0.5]]), np.array([[0, 0]])
    assert average_precision(both, score, label, SQUARE, FIRST)["map_50"] == pytest.approx(0.5)
    less_sure = average_precision(both, score[:, ::-1], label, SQUARE, FIRST)
    assert less_sure["map_50"] == pytest.approx(1.0)  # found before the wrong one


def test_classes_count_alike():
    """One of two classes is found: half. Padding is neither found nor missed."""
    true = np.concatenate([SQUARE, SQUARE + 20, SQUARE * 0], 1)
    label = np.array([[0, 2, -1]])
    assert average_precision(SQUARE, SURE, FIRST, true, label)["map"] == pytest.approx(0.5)
    wrong_class = average_precision(SQUARE, SURE, FIRST + 1, true, label)
    assert wrong_class == {"map": 0.0, "map_50": 0.0, "map_75": 0.0}


def test_nothing_to_find():
    with pytest.raises(ValueError, match="no image has an object"):
        average_precision(SQUARE, SURE, FIRST, SQUARE, FIRST - 1)
