"""Controlled distribution shifts: rotated, recoloured and noisy images, and samples with other class proportions.

All functions are pure. Images are uint8 with channels last and any leading axes: one image or many.
"""

from __future__ import annotations

import colorsys
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import SupportsIndex

import numpy as np
from jaxtyping import Float, Int, UInt8

from jtl.data.dataset import DataError, Example, Source, labels

Seed = int | Sequence[int]


def rotate(images: UInt8[np.ndarray, "*n H W c"], degrees: float) -> UInt8[np.ndarray, "*n H W c"]:
    """Rotates ``images`` counter-clockwise about their centre, with bilinear interpolation and black fill.

    The domains of Rotated MNIST (Ghifary et al. 2015, "Domain Generalization for Object Recognition with Multi-task
    Autoencoders", https://arxiv.org/abs/1508.07680) are 0, 15, 30, 45, 60 and 75 degrees.
    """
    from scipy.ndimage import rotate as turn

    return turn(images, degrees, axes=(-2, -3), reshape=False, order=1)


def recolour(
    images: UInt8[np.ndarray, "*n H W 1"], colours: UInt8[np.ndarray, "*n 3"]
) -> UInt8[np.ndarray, "*n H W 3"]:
    """Colours the ink of grey images, each in one colour on black: grey × colour / 255, rounded.

    Args:
        images: 255 is full ink, as in MNIST.
        colours: of each image, such as those of ``random_colours`` or ``class_colours``.
    """
    return np.rint(images * (colours[..., None, None, :] / 255)).astype(np.uint8)


def random_colours(count: int, seed: Seed) -> UInt8[np.ndarray, "count 3"]:
    """Returns bright, saturated colours of uniform hue."""
    return _hues(np.random.default_rng(seed).random(count))


def class_colours(
    label: Int[np.ndarray, " N"], classes: int, agreement: float, seed: Seed
) -> UInt8[np.ndarray, "N 3"]:
    """Returns colours that match the class with probability ``agreement``: a spurious cue, as in Colored MNIST.

    Each class has its own hue; an example has that of its class with probability ``agreement``, otherwise that of
    another class, uniformly. ``1 / classes`` makes colour independent of class. Arjovsky et al. 2019, "Invariant Risk
    Minimization", https://arxiv.org/abs/1907.02893, use two classes, 0.9 and 0.8 in training and 0.1 in test, and flip
    a quarter of the labels, which this does not.

    Args:
        label: class of each example, 0 to ``classes`` - 1.
        classes: number of classes.
        agreement: probability that the colour is that of the class.
        seed: of the draw.

    Raises:
        DataError: ``agreement`` is outside [0, 1], a label is out of range, or there are fewer than two classes.
    """
    if classes < 2 or not 0 <= agreement <= 1:
        raise DataError(
            f"expected two classes or more and an agreement of 0 to 1; found {classes} and {agreement}"
        )
    _check_range(label, classes)
    rng = np.random.default_rng(seed)
    other = rng.integers(1, classes, len(label))
    shown = np.where(rng.random(len(label)) < agreement, label, (label + other) % classes)
    return _hues(shown / classes)


def _hues(hues: Float[np.ndarray, " N"]) -> UInt8[np.ndarray, "N 3"]:
    colours = [colorsys.hsv_to_rgb(hue, 1.0, 1.0) for hue in hues]
    return np.rint(255 * np.array(colours).reshape(-1, 3)).astype(np.uint8)


def printed(
    images: UInt8[np.ndarray, "*n H W 1"],
    *,
    ink: tuple[int, int, int] = (255, 214, 70),
    shadow: tuple[int, int, int] = (196, 48, 120),
    paper: tuple[int, int, int] = (16, 14, 48),
    offset: tuple[int, int] = (2, 2),
) -> UInt8[np.ndarray, "*n H W 3"]:
    """Renders grey images as on a poster: coloured ink over a shadow of itself in another colour, on coloured paper.

    Args:
        images: 255 is full ink, as in MNIST; at lower values ink and shadow are translucent.
        ink: red, green and blue, 0 to 255.
        shadow: its colour likewise.
        paper: its colour likewise.
        offset: rows down and columns right by which the shadow is displaced, at least 0.
    """
    cover = images / 255
    down, right = offset
    height, width = images.shape[-3:-1]
    cast = np.zeros_like(cover)
    cast[..., down:, right:, :] = cover[..., : height - down, : width - right, :]
    under = np.array(paper) * (1 - cast) + np.array(shadow) * cast
    return np.rint(under * (1 - cover) + np.array(ink) * cover).astype(np.uint8)


def add_noise(images: UInt8[np.ndarray, "*n H W c"], std: float, seed: Seed) -> UInt8[np.ndarray, "*n H W c"]:
    """Adds independent Gaussian noise of ``std`` grey levels (of 255) per channel; rounds and clips to 0..255.

    The Gaussian noise of Hendrycks & Dietterich 2019, "Benchmarking Neural Network Robustness to Common Corruptions and
    Perturbations", https://arxiv.org/abs/1903.12261, has ``std`` 0.08 to 0.38 times 255.

    Args:
        images: the images.
        std: standard deviation in grey levels.
        seed: of the noise.

    Raises:
        DataError: ``std`` is negative.
    """
    if std < 0:
        raise DataError(f"noise has a standard deviation of 0 grey levels or more, found {std}")
    noise = np.random.default_rng(seed).normal(0, std, images.shape)
    return np.clip(np.rint(images + noise), 0, 255).astype(np.uint8)


def label_shift_indices(
    label: Int[np.ndarray, " N"], proportions: Sequence[float] | Float[np.ndarray, " K"], n: int, seed: Seed
) -> Int[np.ndarray, " n"]:
    """Samples indices of ``n`` examples, in random order and without replacement, with class ``proportions``.

    This is label shift (p(y) changes, p(x | y) does not), as studied by Lipton et al. 2018, "Detecting and Correcting
    for Label Shift with Black Box Predictors", https://arxiv.org/abs/1802.03916. Counts are ``n`` times the
    proportions, rounded so that they add up to ``n`` (largest remainders first).

    Args:
        label: of each example, 0 to K - 1.
        proportions: of each class; they sum to 1.
        n: size of the sample.
        seed: of the draw.

    Raises:
        DataError: the proportions are negative or do not sum to 1, ``n`` is below 1, a label is out of range, or a
            class has too few examples.
    """
    shares = np.asarray(proportions, np.float64)
    if (shares < 0).any() or not np.isclose(shares.sum(), 1):
        raise DataError(f"proportions should be 0 or more and sum to 1, found {shares.tolist()}")
    if n < 1:
        raise DataError(f"cannot draw {n} examples; ask for one or more")
    _check_range(label, len(shares))
    shares = shares / shares.sum()
    wanted = np.floor(n * shares + 1e-9).astype(int)  # 10 × 0.7 is a hair under 7
    remainders = n * shares - wanted
    wanted[np.argsort(-remainders, kind="stable")[: n - wanted.sum()]] += 1
    there = np.bincount(label, minlength=len(shares))
    if len(short := np.flatnonzero(wanted > there)):
        k = int(short[0])
        most = int(np.min(there[shares > 0] / shares[shares > 0]))
        raise DataError(
            f"{n} examples of these proportions need {wanted[k]} of class {k}, which has {there[k]}: "
            f"ask for at most about {most}"
        )
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(label))
    drawn = [order[label[order] == k][:count] for k, count in enumerate(wanted)]
    return rng.permutation(np.concatenate(drawn))


def _check_range(label: np.ndarray, classes: int) -> None:
    if len(label) and not (0 <= label.min() and label.max() < classes):
        raise DataError(f"labels lie in {label.min()} to {label.max()}; expected 0 to {classes - 1}")


@dataclass(frozen=True, eq=False)
class Shifted:
    """The examples of ``source``, with images changed on access.

    Attributes:
        source: the split; its examples have an ``image``.
        change: a function of an image ``(H, W, C)`` and its position in the split that returns a new image. Seed any
            randomness by the position, so that an image is the same each time it is read, but noise differs between
            images.

    >>> one = [{"image": np.zeros((2, 2, 1), np.uint8), "label": 3}]
    >>> noisy = Shifted(one, lambda image, place: add_noise(image, 20.0, seed=(0, place)))
    >>> bool(noisy[0]["image"].any()), noisy[0]["label"]
    (True, 3)
    """

    source: Source
    change: Callable[[np.ndarray, int], np.ndarray]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: SupportsIndex, /) -> Example:
        example = self.source[index]
        return {**example, "image": self.change(example["image"], operator.index(index))}

    @property
    def labels(self) -> Int[np.ndarray, " N"]:
        """The labels of the source."""
        return labels(self.source)
