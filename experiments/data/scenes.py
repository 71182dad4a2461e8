"""Scenes: handwritten digits at random places and sizes over photographs, with their boxes and the mask of their ink.

What they are: real digits (MNIST, ``mnist5k``) over crops of two real photographs, as MNIST-M has them, in colours
drawn at random. What they are not: photographs of things. A digit casts no shadow and is never seen from the side, and
two photographs hold little variety. So they show that a detector or a segmenter works and what a pretrained trunk is
worth on few examples; figures do not compare with those on COCO or VOC.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, SupportsIndex

import numpy as np
from jaxtyping import Float, Int, UInt8

from jtl.data.dataset import SPLITS, Dataset, Example
from jtl.data.load import load
from jtl.data.sets.digits import photo_patch

BOARD = 106  # pixels of a tile of a photograph: four rows of six in 427×640
CROPS = (64, BOARD)  # sides of the crops in pixels
SIZES = (0.17, 0.5)  # longer side of a digit, as a share of the side of the scene
MOST = 4  # digits of a scene; at least one
HIDDEN = 0.15  # share of the smaller of two boxes that may lie under the other
CONTRAST = 80  # grey levels, of 255, between a digit and what it lies on, on average


class Scene(NamedTuple):
    """A scene of n digits.

    Attributes:
        image: the pixels.
        boxes: left, top, right and bottom of each digit's ink, in pixels.
        label: the digits.
        mask: 0 for background, a digit and 1 where its ink is; of two that overlap the upper one counts.
    """

    image: UInt8[np.ndarray, "S S 3"]
    boxes: Float[np.ndarray, "n 4"]
    label: Int[np.ndarray, " n"]
    mask: UInt8[np.ndarray, "S S"]


def scene(
    digits: UInt8[np.ndarray, "N 28 28"],
    label: Int[np.ndarray, " N"],
    background: UInt8[np.ndarray, "C C 3"],
    rng: np.random.Generator,
    side: int,
) -> Scene:
    """One to four of ``digits`` over ``background``; decided by the arguments and the state of ``rng``.

    Their longer sides are 0.17 to 0.5 of ``side``, uniform on a logarithmic scale; colours are uniform, but differ from
    what they lie on. Boxes overlap little: a digit that finds no place in twenty tries is left out.
    """
    from PIL import Image

    canvas = np.asarray(
        Image.fromarray(background).resize((side, side), Image.Resampling.BILINEAR), np.float32
    )
    canvas, mask = canvas.copy(), np.zeros((side, side), np.uint8)
    boxes: list[np.ndarray] = []
    labels: list[int] = []
    for chosen in rng.integers(len(digits), size=rng.integers(1, MOST + 1)):
        ink = _scaled(digits[chosen], side * np.exp(rng.uniform(*np.log(SIZES))))
        rows, columns = np.nonzero(ink >= 0.5)
        own = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], np.float32)
        height, width = ink.shape
        for _ in range(20):
            top, left = rng.integers(side - height + 1), rng.integers(side - width + 1)
            box = own + np.array([left, top, left, top], np.float32)
            if all(_hidden(box, other) <= HIDDEN for other in boxes):
                break
        else:
            continue
        place = slice(top, top + height), slice(left, left + width)
        canvas[place] += ink[..., None] * (_colour(canvas[place].mean((0, 1)), rng) - canvas[place])
        mask[place] = np.where(ink >= 0.5, label[chosen] + 1, mask[place])
        boxes.append(box)
        labels.append(int(label[chosen]))
    return Scene(np.rint(canvas).astype(np.uint8), np.stack(boxes), np.array(labels, np.int32), mask)


def _scaled(digit: UInt8[np.ndarray, "28 28"], longer: float) -> Float[np.ndarray, "h w"]:
    """The ink of a digit alone, in [0, 1], at a size."""
    from PIL import Image

    rows, columns = np.nonzero(digit >= 64)
    cut = digit[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    scale = longer / max(cut.shape)
    height, width = (max(3, round(scale * n)) for n in cut.shape)
    ink = (
        np.asarray(Image.fromarray(cut).resize((width, height), Image.Resampling.BILINEAR), np.float32) / 255
    )
    return ink / ink.max()  # a thin stroke fades where it shrinks


def _hidden(one: Float[np.ndarray, 4], other: Float[np.ndarray, 4]) -> float:
    """Shared area as a share of the smaller box."""
    shared = np.prod(np.clip(np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2]), 0, None))
    return float(shared / min(np.prod(box[2:] - box[:2]) for box in (one, other)))


def _colour(ground: Float[np.ndarray, 3], rng: np.random.Generator) -> Float[np.ndarray, 3]:
    while True:
        colour = rng.uniform(0, 255, 3).astype(np.float32)
        if np.abs(colour - ground).mean() >= CONTRAST:
            return colour


@dataclass(frozen=True, eq=False)
class Scenes:
    """``count`` scenes, made when asked for; number ``i`` depends on the seed, the split and ``i`` alone.

    Attributes:
        digits: to draw from.
        label: which they are.
        photos: backgrounds.
        split: whose tiles of the photographs, see ``jtl.data.sets.digits.photo_patch``.
        count: how many.
        side: of a scene in pixels.
        seed: of all that is random.
    """

    digits: UInt8[np.ndarray, "N 28 28"]
    label: Int[np.ndarray, " N"]
    photos: Sequence[UInt8[np.ndarray, "_ _ 3"]]
    split: str
    count: int
    side: int
    seed: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: SupportsIndex, /) -> Example:
        """``image`` (S, S, 3), ``boxes`` (n, 4), ``box_label`` (n,) and ``mask`` (S, S, 1): see ``Scene``."""
        i = range(self.count)[index]
        rng = np.random.default_rng((self.seed, SPLITS.index(self.split), i))
        crop = int(rng.integers(CROPS[0], CROPS[1] + 1))
        background = photo_patch(self.photos, self.split, rng, crop, BOARD)
        made = scene(self.digits, self.label, background, rng, self.side)
        return {
            "image": made.image,
            "boxes": made.boxes,
            "box_label": made.label,
            "mask": made.mask[..., None],
        }


def load_scenes(
    side: int = 96, *, train: int = 500, validation: int = 100, test: int = 300, seed: int = 0
) -> Dataset:
    """Scenes as a data set: ten classes of boxes, eleven of pixels (background is 0).

    Digits of a split are those of ``mnist5k``; train shares no digit and no pixel of a photograph with the others,
    which share tiles of the photographs with each other, but no digit.

    Args:
        side: of a scene in pixels.
        train: how many.
        validation: how many.
        test: how many.
        seed: of train; validation and test are the same for every seed.
    """
    from sklearn.datasets import load_sample_images

    digits, photos = load("mnist5k"), load_sample_images().images
    splits = {}
    for split, count in zip(SPLITS, (train, validation, test), strict=True):
        rows = [digits.splits[split][i] for i in range(len(digits.splits[split]))]
        pixels = np.stack([row["image"][..., 0] for row in rows])
        label = np.array([row["label"] for row in rows], np.int32)
        splits[split] = Scenes(pixels, label, photos, split, count, side, seed if split == "train" else 0)
    return Dataset(
        name="scenes",
        kind="image",
        splits=splits,
        classes=digits.classes,
        origin=f"digits of {digits.origin}, over photographs of scikit-learn (CC BY 2.0)",
        version=f"scenes/1/{side}/{seed}",
    )
