"""Images encoded for a model: resized once, kept as bytes, normalised when a batch is read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int, UInt8

from jtl.data.dataset import DataError, Source, Subset, labels
from jtl.errors import InputError


@dataclass(frozen=True)
class Preprocess:
    """How a model expects its images.

    Raises:
        ValueError: ``mean`` and ``std`` do not have 1 or 3 channels each.

    Attributes:
        size: height and width in pixels.
        mean: per channel, on the scale 0 to 1; one value for each of the model's 1 or 3 channels.
        std: per channel, on the scale 0 to 1.
        shortest: if set, the shorter side is resized to it and the centre cropped; otherwise the image is stretched to
            ``size``.
        resample: ``"nearest"``, ``"bilinear"``, ``"bicubic"`` or ``"lanczos"``, antialiased as in PIL.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shortest: int | None = None
    resample: str = "bilinear"

    def __post_init__(self):
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3):
            raise InputError(
                f"mean and std should have one or three channels each, found {self.mean} and {self.std}"
            )

    def resized(self, side: int) -> Preprocess:
        """Returns the same preprocessing for squares of ``side`` pixels; a crop removes the same share."""
        shortest = None if self.shortest is None else max(side, round(self.shortest * side / min(self.size)))
        return replace(self, size=(side, side), shortest=shortest)

    def resize(self, image: UInt8[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "H W C"]:
        """Resizes ``image`` to the model's size.

        Colour becomes grey for a model of one channel; grey stays one channel.

        Raises:
            DataError: ``image`` is not uint8 with 1, 3 or 4 channels, or ``shortest`` is below ``size``.
        """
        from PIL import Image

        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] not in (1, 3, 4):
            raise DataError(f"expected a uint8 image (H, W, 1, 3 or 4), found {image.dtype} {image.shape}")
        picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image[..., :3])
        if len(self.mean) == 1:
            picture = picture.convert("L")
        height, width = self.size
        how = Image.Resampling[self.resample.upper()]
        if self.shortest is None:
            picture = picture.resize((width, height), how)
        else:
            scale = self.shortest / min(picture.size)
            wide, high = (max(round(side * scale), self.shortest) for side in picture.size)
            if wide < width or high < height:
                raise DataError(f"shortest side {self.shortest} is below the size {self.size} to cut out")
            left, top = (wide - width) // 2, (high - height) // 2
            picture = picture.resize((wide, high), how).crop((left, top, left + width, top + height))
        return np.asarray(picture).reshape(height, width, -1)

    def normalise(self, pixels: UInt8[np.ndarray, "B H W c"]) -> Float[np.ndarray, "B H W C"]:
        """Returns float32 ``(pixels / 255 - mean) / std``; a grey image fills all channels."""
        std = np.asarray(self.std, np.float32)
        scale, offset = 1 / (255 * std), np.asarray(self.mean, np.float32) / std
        if pixels.shape[-1] == 1:  # a lookup table, ten times as fast as arithmetic on so short an axis
            return np.take(np.arange(256, dtype=np.float32)[:, None] * scale - offset, pixels[..., 0], axis=0)
        rows = pixels.reshape(*pixels.shape[:2], -1)
        width = pixels.shape[2]
        return (rows * np.tile(scale, width) - np.tile(offset, width)).reshape(pixels.shape)


@dataclass(frozen=True)
class Augment:
    """Random augmentation of training images.

    Attributes:
        shift: maximum translation in pixels, filled with black (He et al. 2016, "Deep Residual Learning for Image
            Recognition", https://arxiv.org/abs/1512.03385, section 4.2: 4 at 32×32).
        flip: mirror half of them left to right. Not for digits and letters.
    """

    shift: int = 0
    flip: bool = False

    def __call__(
        self, pixels: UInt8[np.ndarray, "B H W c"], draws: Float[np.ndarray, "B 3"]
    ) -> UInt8[np.ndarray, "B H W c"]:
        """Returns augmented images; ``draws`` are uniform on [0, 1)."""
        _, height, width, _ = pixels.shape
        pad = self.shift
        padded = np.pad(pixels, ((0, 0), (pad, pad), (pad, pad), (0, 0))) if pad else pixels
        offsets = np.floor(draws[:, :2] * (2 * pad + 1)).astype(int)
        rows = [image[y : y + height, x : x + width] for image, (y, x) in zip(padded, offsets, strict=True)]
        if self.flip:
            rows = [
                image[:, ::-1] if draw < 0.5 else image for image, draw in zip(rows, draws[:, 2], strict=True)
            ]
        return np.stack(rows)


@dataclass(frozen=True, eq=False)
class Images:
    """A split of images, encoded for a model.

    Attributes:
        source: the examples.
        preprocess: how they are resized and normalised.
        pixels: resized images, if kept in memory; otherwise images are decoded and resized when read.
        known_labels: label of each image, kept together with ``pixels``.
        augment: applied when the loader passes draws, which it does only in training.
    """

    source: Source
    preprocess: Preprocess
    pixels: UInt8[np.ndarray, "N H W c"] | None
    known_labels: Int[np.ndarray, " N"] | None
    augment: Augment | None = None

    def __len__(self) -> int:
        return len(self.source)

    @property
    def labels(self) -> Int[np.ndarray, " N"]:
        """Label of each image; reads every example of a split that is not in memory."""
        return labels(self.source) if self.known_labels is None else self.known_labels

    @property
    def lengths(self) -> Int[np.ndarray, " N"]:
        """All equal: images need no bucketing."""
        return np.ones(len(self), np.int64)

    @property
    def buckets(self) -> tuple[int, ...]:
        """A single length."""
        return (1,)

    @property
    def fingerprint(self) -> str:
        """Hash of the content, for caches of what is computed from it; reads every example if not in memory."""
        digest = hashlib.sha256(repr(self.preprocess).encode())
        for i in range(len(self)):
            pixels, label = self._read(i)
            digest.update(pixels.tobytes())
            digest.update(int(label).to_bytes(4, "little", signed=True))
        return digest.hexdigest()[:16]

    def take(self, indices: Int[np.ndarray, " M"]) -> Images:
        """Returns the images at ``indices``, in that order."""
        indices = np.asarray(indices)
        return replace(
            self,
            source=Subset(self.source, indices),
            pixels=None if self.pixels is None else self.pixels[indices],
            known_labels=None if self.known_labels is None else self.known_labels[indices],
        )

    def _read(self, index: int) -> tuple[np.ndarray, int]:
        if self.pixels is not None and self.known_labels is not None:
            return self.pixels[index], int(self.known_labels[index])
        example = self.source[index]
        return self.preprocess.resize(example["image"]), example["label"]

    def batch(
        self, indices: Int[np.ndarray, " B"], length: int = 1, draws: Float[np.ndarray, "B 3"] | None = None
    ) -> dict[str, np.ndarray]:
        """Returns ``image`` float32 ``(B, H, W, C)``, normalised, and ``label`` int32 ``(B,)``."""
        if self.pixels is not None and self.known_labels is not None:
            pixels, label = self.pixels[indices], self.known_labels[indices]
        else:
            rows, label = zip(*(self._read(int(i)) for i in indices), strict=True)
            pixels = stack(rows)
        if self.augment is not None and draws is not None:
            pixels = self.augment(pixels, draws)
        return {"image": self.preprocess.normalise(pixels), "label": np.asarray(label, np.int32)}


def prepare(
    source: Source, preprocess: Preprocess, augment: Augment | None = None, memory: int = 2 << 30
) -> Images:
    """Encodes a split for a model.

    Args:
        source: examples with ``image`` and ``label``.
        preprocess: how the model expects its images.
        augment: random augmentation in training.
        memory: resized images are kept in memory if they take at most this many bytes.

    Raises:
        DataError: the split is empty, or an image cannot be decoded (now if kept in memory, else when read).
    """
    if not len(source):
        raise DataError("cannot prepare an empty split")
    images = Images(source, preprocess, None, None, augment)
    first, _ = images._read(0)
    if len(source) * first.size > memory:
        return images
    rows, label = zip(*(images._read(i) for i in range(len(source))), strict=True)
    return replace(images, pixels=stack(rows), known_labels=np.asarray(label, np.int32))


def stack(rows: Sequence[UInt8[np.ndarray, "H W _"]]) -> UInt8[np.ndarray, "B H W c"]:
    """Stacks ``rows`` into one array; if some are in colour, grey ones become three equal channels."""
    if len({row.shape for row in rows}) > 1:
        rows = [np.broadcast_to(row, (*row.shape[:2], 3)) for row in rows]
    return np.stack(rows)
