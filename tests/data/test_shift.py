"""Shifts that can be worked out by hand."""

import colorsys

import numpy as np
import pytest

import jtl.data as data
from jtl.data import DataError
from jtl.data.sets.shift import (
    Shifted,
    add_noise,
    class_colours,
    label_shift_indices,
    printed,
    random_colours,
    recolour,
    rotate,
)

LABEL = np.repeat([0, 1, 2], [50, 30, 20])


def pictures(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("shape", [(8, 8, 1), (5, 9, 9, 3), (2, 3, 6, 6, 1)])
def test_rotate(shape):
    images = pictures(*shape)
    for turns in range(-3, 4):
        found = rotate(images, 90.0 * turns)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, np.rot90(images, turns, axes=(-3, -2)))
    assert rotate(images, 45.0)[..., 0, 0, :].max() == 0  # black moves into the corners


def test_rotation_is_about_the_centre_and_there_is_a_way_back():
    image = np.zeros((29, 29, 1), np.uint8)
    image[14, 14:24] = 200  # from the centre to the right
    up = rotate(image, 45.0)
    assert up[9, 19, 0] > 80 and up[19, 19, 0] == 0  # now to the upper right
    wide = np.zeros((29, 29, 1), np.uint8)
    wide[8:21, 8:21] = 200
    assert np.abs(rotate(rotate(wide, 30.0), -30.0).astype(int) - wide).mean() < 12


def test_recolour():
    images = np.array([[[[0], [255]]], [[[51], [102]]]], np.uint8)  # (2, 1, 2, 1)
    colours = np.array([[255, 0, 10], [100, 255, 0]], np.uint8)
    found = recolour(images, colours)
    assert found.dtype == np.uint8
    assert found.tolist() == [[[[0, 0, 0], [255, 0, 10]]], [[[20, 51, 0], [40, 102, 0]]]]
    np.testing.assert_array_equal(recolour(images[1], colours[1]), found[1])


def test_random_colours():
    colours = random_colours(2000, seed=1)
    assert colours.shape == (2000, 3) and colours.dtype == np.uint8
    assert (colours.max(1) == 255).all() and (colours.min(1) == 0).all()  # full and bright
    hues = [colorsys.rgb_to_hsv(*(colour / 255))[0] for colour in colours]
    assert np.histogram(hues, 4, (0, 1))[0].min() > 400
    np.testing.assert_array_equal(colours, random_colours(2000, seed=1))
    assert (colours != random_colours(2000, seed=2)).any()
    assert random_colours(0, seed=0).shape == (0, 3)


@pytest.mark.parametrize("agreement", [0.0, 1 / 3, 0.9, 1.0])
def test_class_colours(agreement):
    label = np.tile([0, 1, 2], 3000)
    colours = class_colours(label, 3, agreement, seed=5)
    own = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]])
    shown = (colours[:, None] == own).all(-1)
    assert (shown.sum(1) == 1).all()
    for k in range(3):
        share = shown[label == k].mean(0)
        expected = np.full(3, (1 - agreement) / 2)
        expected[k] = agreement
        np.testing.assert_allclose(share, expected, atol=0.04)


def test_noise():
    images = np.full((50, 20, 20, 1), 128, np.uint8)
    noisy = add_noise(images, 10.0, seed=(1, 2))
    assert noisy.dtype == np.uint8
    assert abs(noisy.mean() - 128) < 0.3 and abs(noisy.std() - 10) < 0.3
    np.testing.assert_array_equal(noisy, add_noise(images, 10.0, seed=(1, 2)))
    assert (noisy != add_noise(images, 10.0, seed=(1, 3))).mean() > 0.9
    np.testing.assert_array_equal(add_noise(images, 0.0, seed=0), images)
    black = add_noise(np.zeros((50, 20, 20, 1), np.uint8), 10.0, seed=0)
    assert black.max() < 80 and 0.4 < (black == 0).mean() < 0.6  # cut at 0, not wrapped around


def test_label_shift():
    chosen = label_shift_indices(LABEL, [0.1, 0.5, 0.4], 50, seed=3)
    assert np.bincount(LABEL[chosen]).tolist() == [5, 25, 20] and len(set(chosen.tolist())) == 50
    assert LABEL[chosen].tolist() != sorted(LABEL[chosen])
    np.testing.assert_array_equal(chosen, label_shift_indices(LABEL, np.array([0.1, 0.5, 0.4]), 50, seed=3))
    assert set(chosen) != set(label_shift_indices(LABEL, [0.1, 0.5, 0.4], 50, seed=4))
    # every example may be first
    firsts = {label_shift_indices(LABEL, [1.0, 0.0, 0.0], 1, seed)[0] for seed in range(400)}
    assert firsts == set(range(50))


@pytest.mark.parametrize(
    ("proportions", "n", "counts"),
    [
        ([1 / 3, 1 / 3, 1 / 3], 10, [4, 3, 3]),
        ([0.7, 0.2, 0.1], 10, [7, 2, 1]),
        ([0.0, 1.0, 0.0], 30, [0, 30, 0]),
        ([0.25, 0.25, 0.5], 7, [2, 2, 3]),  # 1.75, 1.75, 3.5
    ],
)
def test_counts_add_up(proportions, n, counts):
    chosen = label_shift_indices(LABEL, proportions, n, seed=0)
    assert np.bincount(LABEL[chosen], minlength=3).tolist() == counts


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: label_shift_indices(LABEL, [0.2, 0.2, 0.6], 50, 0), "need 30 of class 2, which has 20: .* about 33"),
        (lambda: label_shift_indices(LABEL, [0.5, 0.6, 0.1], 5, 0), r"sum to 1, found \[0.5, 0.6, 0.1\]"),
        (lambda: label_shift_indices(LABEL, [1.5, -0.5, 0.0], 5, 0), "should be 0 or more"),
        (lambda: label_shift_indices(LABEL, [0.5, 0.5], 5, 0), "labels lie in 0 to 2; expected 0 to 1"),
        (lambda: label_shift_indices(LABEL, [0.5, 0.5, 0.0], 0, 0), "cannot draw 0 examples"),
        (lambda: class_colours(LABEL, 3, 1.5, 0), "an agreement of 0 to 1; found 3 and 1.5"),
        (lambda: class_colours(LABEL, 1, 1.0, 0), "two classes or more"),
        (lambda: class_colours(LABEL, 2, 1.0, 0), "labels lie in 0 to 2"),
        (lambda: add_noise(pictures(2, 2, 1), -1.0, 0), "0 grey levels or more, found -1.0"),
    ],
)  # fmt: skip
def test_impossible_shifts(make, message):
    with pytest.raises(DataError, match=message):
        make()


def test_shifted():
    images = pictures(6, 4, 4, 1)
    rows = [{"image": one, "label": i % 3, "face": "a"} for i, one in enumerate(images)]
    colours = class_colours(data.labels(rows), 3, 1.0, seed=0)
    shifted = Shifted(rows, lambda image, place: recolour(image, colours[place]))
    assert isinstance(shifted, data.Source) and len(shifted) == 6
    assert data.labels(shifted).tolist() == [0, 1, 2] * 2
    np.testing.assert_array_equal(
        [one["image"] for one in (shifted[i] for i in range(6))], recolour(images, colours)
    )
    assert shifted[4]["label"] == 1 and shifted[4]["face"] == "a"
    assert rows[4]["image"].shape == (4, 4, 1)
    few = data.subset(shifted, 3, seed=0)
    np.testing.assert_array_equal(few[0]["image"], shifted[few.indices[0]]["image"])


def test_printed_by_hand():
    """One pixel of full ink casts a shadow two rows down and one to the right; half ink lets half of it through."""
    grey = np.zeros((4, 3, 1), np.uint8)
    grey[0, 0], grey[2, 1] = 255, 51
    found = printed(grey, ink=(200, 0, 0), shadow=(0, 0, 100), paper=(250, 250, 250), offset=(2, 1))
    wanted = np.full((4, 3, 3), 250)
    wanted[0, 0] = 200, 0, 0
    wanted[2, 1] = 40, 0, 80  # a fifth of the ink over the shadow
    np.testing.assert_array_equal(found, wanted)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(printed(grey[None])[0], printed(grey))
