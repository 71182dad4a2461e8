"""Images with boxes or masks, encoded for detection and segmentation: resized once and kept in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int, UInt8

from jtl.data.dataset import DataError, Source
from jtl.data.encode.image import Preprocess, stack
from jtl.errors import InputError


@dataclass(frozen=True, eq=False)
class Annotated:
    """A split of images with arrays beside them, for ``jtl.data.loader.Batches``.

    Attributes:
        preprocess: how images were resized and are normalised.
        pixels: the resized images.
        fields: arrays of N rows by their names in a batch.
    """

    preprocess: Preprocess
    pixels: UInt8[np.ndarray, "N H W c"]
    fields: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def lengths(self) -> Int[np.ndarray, " N"]:
        """All equal: images need no bucketing."""
        return np.ones(len(self), np.int64)

    @property
    def buckets(self) -> tuple[int, ...]:
        """A single length."""
        return (1,)

    def take(self, indices: Int[np.ndarray, " M"]) -> Annotated:
        """Returns the images at ``indices``, in that order."""
        fields = {name: rows[indices] for name, rows in self.fields.items()}
        return replace(self, pixels=self.pixels[indices], fields=fields)

    def batch(
        self, indices: Int[np.ndarray, " B"], length: int = 1, draws: Float[np.ndarray, "B 3"] | None = None
    ) -> dict[str, np.ndarray]:
        """Returns ``image`` float32 ``(B, H, W, C)``, normalised, and the fields."""
        pixels = self.preprocess.normalise(self.pixels[indices])
        return {"image": pixels, **{name: rows[indices] for name, rows in self.fields.items()}}


def stretched(preprocess: Preprocess, side: int) -> Preprocess:
    """Returns ``preprocess`` without a crop, which would cut objects: whole images are stretched to ``side`` pixels."""
    return replace(preprocess, size=(side, side), shortest=None)


def with_boxes(source: Source, preprocess: Preprocess, most: int | None = None) -> Annotated:
    """Encodes images with ``boxes`` float32 (N, K, 4) and ``box_label`` int32 (N, K), -1 for padding rows.

    Args:
        source: examples with ``image``, ``boxes`` (n, 4) in pixels of that image, and ``box_label`` (n,).
        preprocess: without a crop, see ``stretched``. Boxes are scaled with their images.
        most: K; by default the largest number of objects in an image. Images with more keep the largest objects.

    Raises:
        DataError: the split is empty.
        ValueError: ``preprocess`` crops.
    """
    rows = [source[i] for i in range(_some(source, preprocess))]
    K = max(1, max(len(row["box_label"]) for row in rows)) if most is None else most
    boxes = np.zeros((len(rows), K, 4), np.float32)
    label = np.full((len(rows), K), -1, np.int32)
    for i, row in enumerate(rows):
        height, width = row["image"].shape[:2]
        scale = np.array([preprocess.size[1] / width, preprocess.size[0] / height] * 2, np.float32)
        own = np.asarray(row["boxes"], np.float32).reshape(-1, 4) * scale
        largest = np.argsort(-np.prod(own[:, 2:] - own[:, :2], axis=1), kind="stable")[:K]
        boxes[i, : len(largest)] = own[largest]
        label[i, : len(largest)] = np.asarray(row["box_label"])[largest]
    pixels = stack([preprocess.resize(row["image"]) for row in rows])
    return Annotated(preprocess, pixels, {"boxes": boxes, "box_label": label})


def with_masks(source: Source, preprocess: Preprocess) -> Annotated:
    """Encodes images with ``mask`` int32 (N, H, W): the class of every pixel, ``VOID`` where there is none.

    Args:
        source: examples with ``image`` (h, w, c) and ``mask`` uint8 (h, w, 1).
        preprocess: without a crop, see ``stretched``. Masks are resized by nearest neighbour.

    Raises:
        DataError: the split is empty, or a mask differs in size from its image.
        ValueError: ``preprocess`` crops.
    """
    from PIL import Image

    height, width = preprocess.size
    rows = [source[i] for i in range(_some(source, preprocess))]
    for i, row in enumerate(rows):
        if row["mask"].shape != (*row["image"].shape[:2], 1):
            raise DataError(
                f"example {i}: an image of {row['image'].shape[:2]} pixels has a mask {row['mask'].shape}; "
                "expected one of the same height and width, and one channel"
            )
    masks = [
        Image.fromarray(row["mask"][..., 0]).resize((width, height), Image.Resampling.NEAREST) for row in rows
    ]
    pixels = stack([preprocess.resize(row["image"]) for row in rows])
    return Annotated(preprocess, pixels, {"mask": np.stack([np.asarray(m, np.int32) for m in masks])})


def _some(source: Source, preprocess: Preprocess) -> int:
    if not len(source):
        raise DataError("cannot prepare an empty split")
    if preprocess.shortest is not None:
        raise InputError(
            "annotations go with whole images: take stretched(preprocess, side), which crops nothing"
        )
    return len(source)
