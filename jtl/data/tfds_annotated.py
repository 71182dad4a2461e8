"""Public sets with boxes or masks through TensorFlow Datasets, without TensorFlow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, SupportsIndex

import numpy as np

from jtl.data.dataset import DataError, Dataset, Example, Source
from jtl.data.tfds import as_dataset, find_builder, open_sources, standard_splits

# The first value of a mask and the names from there on, where the features of the set do not tell.
KNOWN_MASKS: dict[str, tuple[int, tuple[str, ...]]] = {
    "oxford_iiit_pet": (1, ("pet", "background", "border"))
}


@dataclass(frozen=True, eq=False)
class Changed:
    """The examples of ``source``, each through ``change``."""

    source: Source
    change: Callable[[Example], Example]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: SupportsIndex, /) -> Example:
        return self.change(self.source[index])


def public_boxes(name: str) -> Dataset:
    """The set ``"tfds:NAME[/CONFIG]"`` with objects; see ``jtl.data.coco.load_boxes``."""
    import tensorflow_datasets as tfds

    builder = find_builder(name)
    features = builder.info.features
    objects = {
        key: (box, label)
        for key, feature in features.items()
        if isinstance(feature, tfds.features.Sequence) and hasattr(feature.feature, "items")
        for box, kind in feature.feature.items()
        if isinstance(kind, tfds.features.BBoxFeature)
        for label in [key_of(feature.feature, tfds.features.ClassLabel)]
        if label is not None
    }
    picture = key_of(features, tfds.features.Image)
    if not objects or picture is None:
        found = ", ".join(f"{key} ({type(feature).__name__})" for key, feature in features.items())
        raise DataError(
            f"{name}: expected images and a sequence of objects with a box and a label; it has {found}"
        )
    where, (box, label) = next(iter(objects.items()))
    classes = tuple(features[where].feature[label].names)

    def change(example: Example) -> Example:
        height, width = example["image"].shape[:2]
        top, left, bottom, right = np.asarray(example[where][box], np.float32).reshape(-1, 4).T
        boxes = np.column_stack([left * width, top * height, right * width, bottom * height])
        return {
            "image": example["image"],
            "boxes": boxes,
            "box_label": np.asarray(example[where][label], np.int32),
        }

    return _dataset(
        name, builder, ((picture, "image"),), change, classes, lambda row: len(row["box_label"]) > 0
    )


def public_masks(name: str, mask_column: str | None) -> Dataset:
    """The set ``"tfds:NAME[/CONFIG]"`` with masks; see ``jtl.data.masks.load_masks``."""
    import tensorflow_datasets as tfds

    builder = find_builder(name)
    features = builder.info.features
    images = {key: feature for key, feature in features.items() if isinstance(feature, tfds.features.Image)}
    grey = [key for key, feature in images.items() if feature.shape[-1] == 1]
    if mask_column is not None and mask_column not in images:
        raise DataError(f"{name}: no image column {mask_column!r}; it has {', '.join(images) or 'no images'}")
    mask = mask_column or (grey[0] if len(grey) == 1 else None)
    picture = next((key for key in images if key != mask), None)
    if mask is None or picture is None:
        raise DataError(
            f"{name}: which column is the mask? Choose with --mask-column; its images are {list(images)}"
        )
    columns = ((picture, "image"), (mask, "mask"))
    first, names = KNOWN_MASKS.get(builder.name, (0, ()))

    def change(example: Example) -> Example:
        values = np.asarray(example["mask"])[..., :1].astype(np.uint8)
        return {
            "image": example["image"],
            "mask": values - np.uint8(first),
        }  # below the first is VOID: it wraps

    if not names:
        train = open_sources(name, builder, columns)["train"]
        some = [np.unique(change(train[i])["mask"]) for i in range(min(len(train), 200))]
        names = tuple(map(str, range(int(max(v[v < 255].max(initial=0) for v in some)) + 1)))
    return _dataset(name, builder, columns, change, names, lambda row: True)


def key_of(features: Any, kind: type) -> str | None:
    """The first of the ``features`` of this kind."""
    return next((key for key, feature in features.items() if isinstance(feature, kind)), None)


def _dataset(
    name: str,
    builder: Any,
    columns: tuple[tuple[str, str], ...],
    change: Callable[[Example], Example],
    classes: tuple[str, ...],
    labelled: Callable[[Example], bool],
) -> Dataset:
    opened = {
        split: Changed(source, change) for split, source in open_sources(name, builder, columns).items()
    }
    splits, notes = standard_splits(name, opened, labelled)
    return as_dataset(name, builder, "image", splits, notes, classes)
