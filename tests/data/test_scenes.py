"""Scenes: a pure function of the seed, boxes that hold their ink, and nothing shared by train and test."""

import numpy as np
import pytest

from experiments.data.scenes import BOARD, SIZES, load_scenes
from jtl.data import annotated
from jtl.data.batches.loader import Batches
from jtl.data.encode.image import Preprocess

HOW = Preprocess(size=(64, 64), mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.fixture(scope="module")
def scenes():
    return load_scenes(64, train=60, validation=5, test=60)


def rows_of(source):
    return [source[i] for i in range(len(source))]


def test_the_same_again_and_another_seed_differs(scenes):
    again, other = (load_scenes(64, train=60, validation=5, test=60, seed=seed) for seed in (0, 1))
    for split in ("train", "test"):
        for one, two in zip(rows_of(scenes.splits[split]), rows_of(again.splits[split]), strict=True):
            assert all(np.array_equal(one[name], two[name]) for name in one)
    assert not np.array_equal(scenes.splits["train"][3]["image"], other.splits["train"][3]["image"])
    assert np.array_equal(scenes.splits["test"][3]["image"], other.splits["test"][3]["image"])


def test_boxes_hold_the_ink(scenes):
    tight = 0
    for row in rows_of(scenes.splits["train"]):
        mask = row["mask"][..., 0]
        assert row["image"].shape == (64, 64, 3) and row["image"].dtype == np.uint8
        assert 1 <= len(row["box_label"]) <= 4
        assert set(np.unique(mask)) <= {0, *(row["box_label"] + 1)}
        covered = np.zeros((64, 64), bool)
        for (left, top, right, bottom), digit in zip(row["boxes"].astype(int), row["box_label"], strict=True):
            assert 0 <= left < right <= 64 and 0 <= top < bottom <= 64
            assert SIZES[0] * 64 - 2 <= max(right - left, bottom - top) <= SIZES[1] * 64 + 1
            own = mask[top:bottom, left:right] == digit + 1
            covered[top:bottom, left:right] = True
            tight += own[0].any() and own[-1].any() and own[:, 0].any() and own[:, -1].any()
        assert not mask[~covered].any()
    assert tight > 100  # all but those that another digit lies on


def test_ink_differs_from_what_it_lies_on(scenes):
    for row in rows_of(scenes.splits["train"])[:20]:
        ink = row["mask"][..., 0] > 0
        (left, top, right, bottom) = row["boxes"][0].astype(int)
        part, own = row["image"][top:bottom, left:right].astype(float), ink[top:bottom, left:right]
        assert np.abs(part[own].mean(0) - part[~own].mean(0)).max() > 20


def test_train_and_test_share_no_digit_and_no_tile(scenes):
    digits = {split: {one.tobytes() for one in scenes.splits[split].digits} for split in scenes.splits}
    assert not digits["train"] & digits["test"] and not digits["validation"] & digits["test"]
    rows, columns = 427 // BOARD, 640 // BOARD
    train = {(r, c) for r in range(rows) for c in range(columns) if (r + c) % 3}
    assert len(train) == 16 and rows * columns == 24


def test_all_digits_occur(scenes):
    seen = np.concatenate([row["box_label"] for row in rows_of(scenes.splits["train"])])
    assert set(seen.tolist()) == set(range(10)) and scenes.classes == tuple("0123456789")


def test_batches_of_boxes(scenes):
    split = annotated.with_boxes(scenes.splits["train"], HOW, 6)
    batch = Batches(split, 8)[0]
    assert batch["image"].shape == (8, 64, 64, 3) and batch["boxes"].shape == (8, 6, 4)
    for i, boxes, label in zip(batch["index"], batch["boxes"], batch["box_label"], strict=True):
        row = scenes.splits["train"][int(i)]
        got = sorted((int(c), *map(float, box)) for box, c in zip(boxes, label, strict=True) if c >= 0)
        assert got == sorted(
            (int(c), *map(float, box)) for box, c in zip(row["boxes"], row["box_label"], strict=True)
        )
    few = annotated.with_boxes(scenes.splits["train"], HOW, 1)
    first = max(np.prod(box[2:] - box[:2]) for box in scenes.splits["train"][0]["boxes"])
    assert (
        np.prod(few.fields["boxes"][0, 0, 2:] - few.fields["boxes"][0, 0, :2]) == first
    )  # the largest stays


def test_boxes_and_masks_are_stretched_with_their_images():
    """An image of 40 x 20 whose right half is white, to 64 x 64."""
    image = np.zeros((20, 40, 3), np.uint8)
    image[:, 20:] = 255
    row = {"image": image, "boxes": np.array([[20, 0, 40, 20]], np.float32), "box_label": np.array([1]),
           "mask": (image[..., :1] > 0).astype(np.uint8)}  # fmt: skip
    boxed = annotated.with_boxes([row], HOW)
    assert boxed.fields["boxes"].tolist() == [[[32, 0, 64, 64]]]
    masked = annotated.with_masks([row], HOW)
    assert masked.fields["mask"].shape == (1, 64, 64)
    assert not masked.fields["mask"][0, :, :32].any() and masked.fields["mask"][0, :, 32:].all()
    assert boxed.pixels[0, :, 40:].min() == 255 and boxed.pixels[0, :, :24].max() == 0


def test_refused(scenes):
    cropped = Preprocess(size=(64, 64), mean=(0.5,) * 3, std=(0.5,) * 3, shortest=70)
    with pytest.raises(ValueError, match="annotations go with whole images"):
        annotated.with_boxes(scenes.splits["test"], cropped)
    assert (
        annotated.stretched(cropped, 96).size == (96, 96)
        and annotated.stretched(cropped, 96).shortest is None
    )
    row = {"image": np.zeros((4, 4, 3), np.uint8), "mask": np.zeros((4, 5, 1), np.uint8)}
    with pytest.raises(ValueError, match=r"example 0: an image of \(4, 4\) pixels has a mask \(4, 5, 1\)"):
        annotated.with_masks([row], HOW)
