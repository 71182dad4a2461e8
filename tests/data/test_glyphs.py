"""The glyphs: sizes, whole alphabets held out, no letter that looks like another, the same pixels each time."""

from collections import Counter

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from jtl import data
from jtl.data.sets.digits import font_folder
from jtl.data.sets.glyphs import ALPHABETS, COPIES, SANS, Glyphs, draw, picture


@pytest.fixture(scope="module")
def glyphs():
    loaded = data.load_classes("glyphs")
    return loaded, {s: [source[i] for i in range(len(source))] for s, source in loaded.splits.items()}


def test_sizes_fields_and_classes(glyphs):
    loaded, read = glyphs
    assert {split: len(rows) for split, rows in read.items()} == {
        "train": 12120, "validation": 1600, "test": 3520
    }  # fmt: skip
    assert list(read["train"][0]) == ["image", "label", "alphabet"]
    assert len(loaded.classes) == 862 and loaded.classes[0] == "armenian/0531"
    counts = Counter(one["label"] for rows in read.values() for one in rows)
    assert counts == dict.fromkeys(range(862), COPIES)
    # Labels are the names of characters.
    for one in read["test"][::500]:
        alphabet, point = loaded.classes[one["label"]].split("/")
        assert alphabet == one["alphabet"] and chr(int(point, 16)) in ALPHABETS[alphabet].characters


def test_whole_alphabets_are_held_out(glyphs):
    _, read = glyphs
    own = {split: {one["alphabet"] for one in rows} for split, rows in read.items()}
    assert own["test"] == {"armenian", "georgian", "asomtavruli", "hebrew", "lao"}
    assert own["validation"] == {"tifinagh", "nko", "lisu"}
    assert len(own["train"]) == 8 and not own["train"] & (own["test"] | own["validation"])


def test_no_letter_looks_like_another():
    """Pairs of upright letters by cosine: at most 0.88, and 0.96 if both are in train, but for rounding."""
    folder = font_folder("glyphs")
    split = [own.split for own in ALPHABETS.values() for _ in own.characters]
    pictures = [
        picture(folder / f"{SANS[0]}.ttf", one, side=22).reshape(28, 2, 28, 2).mean((1, 3))
        for own in ALPHABETS.values()
        for one in own.characters
    ]
    x = gaussian_filter(np.stack(pictures), (0, 1, 1)).reshape(len(split), -1)
    x -= x.mean(1, keepdims=True)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    alike = np.triu(x @ x.T, 1)
    both = np.outer(*2 * [np.array(split) == "train"])
    assert alike[both].max() < 0.965 and alike[~both].max() < 0.885
    assert alike.max() > 0.85  # the pictures are not blank


def test_the_same_pixels_each_time_in_two_tones(glyphs, tmp_path):
    _, read = glyphs
    own = ALPHABETS["hebrew"]
    made = draw(font_folder("glyphs"), own.faces, own.characters[0])
    label = Glyphs.CLASSES.index("hebrew/05d0")
    assert {image.tobytes() for image in made} == {
        one["image"].tobytes() for one in read["test"] if one["label"] == label
    }
    assert len({image.tobytes() for image in made}) == COPIES
    images = np.stack([one["image"] for one in read["train"]])
    assert images.shape == (12120, 28, 28, 1) and images.dtype == np.uint8
    assert np.quantile(images.max((1, 2, 3)), 0.01) > 200 and 0.06 < images.mean() / 255 < 0.2
    rim = np.concatenate([images[:, [0, -1]].reshape(12120, -1), images[:, :, [0, -1]].reshape(12120, -1)], 1)
    assert (rim.max(1) > 128).mean() < 0.05  # few letters are cut off


def test_distortions_leave_a_letter_itself(glyphs):
    """The class mean of half of the copies knows the other half far better than chance; pixels alone do not."""
    _, read = glyphs
    rows = sorted(read["validation"], key=lambda one: one["label"])
    x = np.stack([one["image"] for one in rows]).astype(float).reshape(80, COPIES, -1)
    x = gaussian_filter(x.reshape(80, COPIES, 28, 28), (0, 0, 1, 1)).reshape(80, COPIES, -1)
    centres, asked = x[:, :10].mean(1), x[:, 10:].reshape(800, -1)
    distances = np.square(asked).sum(1)[:, None] - 2 * asked @ centres.T + np.square(centres).sum(1)[None]
    right = (distances.argmin(1) == np.repeat(np.arange(80), 10)).mean()
    assert 0.1 < right < 0.6  # chance is 0.012
