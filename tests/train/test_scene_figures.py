"""Boxes and masks over images: what is drawn where."""

import numpy as np
import pytest
from matplotlib.patches import Rectangle

from jtl.report import figures


def test_boxes_lie_on_the_edges_of_their_pixels():
    pictures = [np.zeros((8, 10, 3), np.uint8), np.ones((8, 10, 1), np.uint8)]
    found, true = (
        [np.array([[2.0, 3, 6, 8]]), np.zeros((0, 4))],
        [np.array([[2.0, 3, 6, 7]]), np.array([[0.0, 0, 9, 9]])],
    )
    first, second = figures.boxes(pictures, found, [["7 (0.90)"], []], true).axes
    drawn = [(p.get_xy(), p.get_width(), p.get_height()) for p in first.patches if isinstance(p, Rectangle)]
    assert drawn[-1] == ((1.5, 2.5), 4.0, 5.0) and drawn[0] == ((1.5, 2.5), 4.0, 4.0)  # pixel 2 begins at 1.5
    assert [text.get_text() for text in first.texts] == ["7 (0.90)"]
    assert len(second.patches) == 2 and not second.texts  # what is there, twice for its dashes
    assert len(figures.boxes(pictures, found, [["7"], []]).axes[1].patches) == 0
    with pytest.raises(ValueError, match="no images to draw"):
        figures.boxes([], [], [])


def test_masks_leave_background_and_void_clear():
    mask = np.array([[0, 1], [2, 255]])
    panels = figures.masks(
        [np.zeros((2, 2, 3), np.uint8)], {"true": [mask], "found": [mask]}, ["sky", "sea", "ship"]
    ).axes
    assert [axes.get_ylabel() for axes in panels] == ["", "true", "found"]
    shades = np.asarray(panels[1].images[1].get_array())
    assert shades[0, 0, 3] == shades[1, 1, 3] == 0 and shades[0, 1, 3] > 0
    assert not np.array_equal(shades[0, 1], shades[1, 0])
    every = figures.masks(
        [np.zeros((2, 2, 3), np.uint8)], {"true": [mask]}, ["sky", "sea", "ship"], clear=None
    ).axes
    assert np.asarray(every[1].images[1].get_array())[0, 0, 3] > 0


def test_strips_put_images_where_they_belong():
    """Three images of 2 x 2 in lines of two, white gaps and a white end; bytes and shares of 1 alike."""
    images = np.zeros((3, 2, 2, 3), np.uint8)
    images[1, ..., 0], images[2, ..., 1] = 255, 51
    figure = figures.strips({"three": images, "one": np.full((1, 2, 2, 1), 0.5)}, columns=2)
    assert [axes.get_ylabel() for axes in figure.axes] == ["three", "one"]
    first, second = (np.asarray(axes.images[0].get_array()) for axes in figure.axes)
    assert first.shape == (5, 5, 3) and second.shape == (2, 5, 3)
    np.testing.assert_array_equal(first[:2, :2], 0)
    np.testing.assert_array_equal(first[:2, 3:], [[[1, 0, 0]] * 2] * 2)
    np.testing.assert_allclose(first[3:, :2], [[[0, 0.2, 0]] * 2] * 2)
    assert (first[2] == 1).all() and (first[:, 2] == 1).all() and (first[3:, 3:] == 1).all()
    assert (second[:, :2] == 0.5).all() and (second[:, 2:] == 1).all()
    with pytest.raises(ValueError, match="no images to draw"):
        figures.strips({})
