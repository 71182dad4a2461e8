"""Images with bounding boxes, for detection: your own in COCO's format, or a public set of TensorFlow Datasets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from jtl.data.dataset import ALIASES, DataError, Dataset, Example, by_split, complete
from jtl.data.readers.images import read_image
from jtl.data.readers.tfds import changed_dataset, find_builder, key_of

FILE = "annotations.json"


def own(path: Path) -> Dataset:
    """Loads your own images with bounding boxes, in COCO's format.

    ``path`` is a folder with ``annotations.json`` and the images beside it or in ``images/``; or a folder with such
    folders ``train``, ``validation`` and ``test``. ``annotations.json`` holds ``images``, ``categories`` and
    ``annotations`` with ``bbox`` as left, top, width, height. Crowds (``iscrowd``) and boxes without area are left out.

    An example has ``image``, ``boxes`` float32 (n, 4) (left, top, right, bottom in pixels of the image) and
    ``box_label`` int32 (n,).

    Missing splits are cut from train by hash of the file name.

    Args:
        path: the folder.

    Raises:
        DataError: another layout, an annotation of an unknown image or category, a category that is unseen in train, or
            a train split without boxes.
        FileNotFoundError: an image does not exist.
    """
    if not path.is_dir():
        raise DataError(f"{path}: expected a folder with {FILE}, in COCO's layout, and the images")
    folders = {"train": path}
    if not (path / FILE).is_file():
        folders = by_split(path, [e for e in sorted(path.iterdir()) if e.name in ALIASES and e.is_dir()])
    if lacking := [
        folder for folder in (folders or {"train": path}).values() if not (folder / FILE).is_file()
    ]:
        held = [entry.name for entry in sorted(lacking[0].iterdir())[:8]]
        raise DataError(
            f"{lacking[0]}: found no {FILE}, in COCO's layout, beside the images; the folder holds {held or 'nothing'}"
        )
    raw = {split: _read(folder / FILE) for split, folder in folders.items()}
    classes = tuple(str(one["name"]) for one in sorted(raw["train"]["categories"], key=lambda one: one["id"]))
    notes: list[str] = []
    found = {split: _images(folders[split], raw[split], classes, notes) for split in folders}
    if not any(len(label) for label in found["train"].label):
        raise DataError(f"{folders['train'] / FILE}: train has no boxes, so there is nothing to learn")
    splits, carved = complete(found, [file.name for file in found["train"].paths])
    digest = hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()[:16]
    return Dataset(
        name=str(path), kind="image", splits=splits, classes=classes, origin=f"your images at {path}",
        version=digest, notes=(*notes, *carved),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class BoxedImages:
    """Images at ``paths``, decoded when read, each with its ``boxes`` (n, 4) and their ``label`` (n,)."""

    paths: tuple[Path, ...]
    boxes: tuple[np.ndarray, ...]
    label: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: SupportsIndex, /) -> Example:
        image = read_image(self.paths[index])
        return {"image": image, "boxes": self.boxes[index], "box_label": self.label[index]}


def _read(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: is not JSON ({error})") from error
    wanted = {"images": ("id", "file_name"), "annotations": ("image_id", "category_id", "bbox"),
              "categories": ("id", "name")}  # fmt: skip
    for name, fields in wanted.items():
        rows = raw.get(name) if isinstance(raw, dict) else None
        if not isinstance(rows, list):
            raise DataError(
                f"{file}: expected lists called {', '.join(wanted)}, as COCO has them; found no {name!r}"
            )
        for i, row in enumerate(rows):
            if not isinstance(row, dict) or any(field not in row for field in fields):
                raise DataError(f"{file}: {name}[{i}] should have {', '.join(fields)}; found {str(row)[:80]}")
    if not raw["categories"] or not raw["images"]:
        raise DataError(f"{file}: has no {'images' if raw['categories'] else 'categories'}")
    return raw


def _images(folder: Path, raw: Mapping[str, Any], classes: tuple[str, ...], notes: list[str]) -> BoxedImages:
    file = folder / FILE
    number = {}
    for one in raw["categories"]:
        if str(one["name"]) not in classes:
            raise DataError(
                f"{file}: category {one['name']!r} is unseen in train, which has {', '.join(classes[:10])}"
            )
        number[one["id"]] = classes.index(str(one["name"]))
    paths = {}
    for row in raw["images"]:
        near = [folder / row["file_name"], folder / "images" / row["file_name"]]
        there = [path for path in near if path.is_file()]
        if not there:
            raise FileNotFoundError(f"{file}: image {row['file_name']!r} is neither beside it nor in images/")
        paths[row["id"]] = there[0]
    boxes: dict[Any, list[list[float]]] = {key: [] for key in paths}
    label: dict[Any, list[int]] = {key: [] for key in paths}
    left_out = 0
    for i, row in enumerate(raw["annotations"]):
        if row["image_id"] not in paths or row["category_id"] not in number:
            what = "image_id" if row["image_id"] not in paths else "category_id"
            raise DataError(f"{file}: annotations[{i}] has {what} {row[what]!r}, which is not in the file")
        try:
            left, top, width, height = map(float, row["bbox"])
        except (TypeError, ValueError):
            raise DataError(
                f"{file}: annotations[{i}] has bbox {row['bbox']!r}; expected left, top, width and height in pixels"
            ) from None
        if row.get("iscrowd") or width <= 0 or height <= 0:
            left_out += 1
            continue
        boxes[row["image_id"]].append([left, top, left + width, top + height])
        label[row["image_id"]].append(number[row["category_id"]])
    if left_out:
        notes.append(f"{left_out} boxes of {file} are crowds or have no area, and were left out")
    return BoxedImages(
        tuple(paths.values()),
        tuple(np.array(rows, np.float32).reshape(-1, 4) for rows in boxes.values()),
        tuple(np.array(rows, np.int32) for rows in label.values()),
    )


def public(name: str) -> Dataset:
    """Loads a public set of images with bounding boxes.

    The set must have an image column and a sequence of objects with a bounding box and a class label.

    An example has ``image``, ``boxes`` float32 (n, 4) (left, top, right, bottom in pixels of the image) and
    ``box_label`` int32 (n,).

    Missing splits are cut from train by hash of the position.

    Args:
        name: ``"tfds:NAME"`` or ``"tfds:NAME/CONFIG"``.

    Raises:
        DataError: an unknown set, one that cannot be prepared, or one without such columns.
        ConnectionError: the set has to be downloaded and there is no network.
    """
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

    return changed_dataset(
        name, builder, ((picture, "image"),), change, classes, lambda row: len(row["box_label"]) > 0
    )
