"""Images with segmentation masks: your own files, or a public set of TensorFlow Datasets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import SupportsIndex

import numpy as np
from jaxtyping import UInt8

from jtl.data.dataset import ALIASES, VOID, DataError, Dataset, Example, by_split, complete, digest
from jtl.data.readers.images import IMAGES, read_image
from jtl.data.readers.tfds import changed_dataset, find_builder, open_sources

LAYOUT = "expected images/ and masks/ with files of the same names, or train/, validation/ and test/ with these two"


def own(path: Path) -> Dataset:
    """Loads your own images with segmentation masks.

    ``path`` is a folder with ``images/`` and ``masks/``, whose files have the same names except for the extension; or a
    folder with such folders ``train``, ``validation`` and ``test``. A mask has one channel or a palette, whose values
    are the classes 0, 1, 2, ... and 255 for none. Class names, one per line, may be given in ``classes.txt`` in
    ``path``.

    An example has ``image`` and ``mask`` uint8 (h, w, 1), the class of each pixel, 255 for none.

    Missing splits are cut from train by hash of the file name.

    Args:
        path: the folder.

    Raises:
        DataError: another layout, an image without a mask, or a mask in colour or with a value that is not a class.
    """
    if not path.is_dir():
        raise DataError(f"{path}: {LAYOUT}")
    folders = {"train": path}
    if not (path / "images").is_dir():
        folders = by_split(path, [e for e in sorted(path.iterdir()) if e.name in ALIASES and e.is_dir()])
        if not folders:
            held = [entry.name for entry in sorted(path.iterdir())[:8]]
            raise DataError(f"{path}: {LAYOUT}; it holds {held or 'nothing'}")
    found = {split: _pairs(folder) for split, folder in folders.items()}
    classes = _names(path, found["train"].values())
    for split, source in found.items():
        source.check(len(classes), split)
    splits, notes = complete(found, [file.name for file in found["train"].images])
    files = [file for source in found.values() for file in (*source.images, *source.masks)]
    return Dataset(
        name=str(path), kind="image", splits=splits, classes=classes, origin=f"your images at {path}",
        version=digest(files), notes=tuple(notes),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class MaskedImages:
    """Images and their masks, decoded when read."""

    images: tuple[Path, ...]
    masks: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: SupportsIndex, /) -> Example:
        return {"image": read_image(self.images[index]), "mask": read_mask(self.masks[index])}

    def values(self) -> list[int]:
        """Returns the classes that occur."""
        seen = np.zeros(256, bool)
        for file in self.masks:
            seen[read_mask(file)] = True
        return [value for value in np.flatnonzero(seen).tolist() if value != VOID]

    def check(self, classes: int, split: str) -> None:
        """Checks that all mask values are classes or ``VOID``.

        Raises:
            DataError: a value is not a class.
        """
        for file in self.masks:
            values = np.unique(read_mask(file))
            if len(wrong := values[(values >= classes) & (values != VOID)]):
                raise DataError(
                    f"{file}, split {split}: has pixels of {wrong[0]}; the {classes} classes are 0 to {classes - 1}, "
                    f"and {VOID} is none"
                )


def read_mask(file: Path) -> UInt8[np.ndarray, "h w 1"]:
    """Reads the values of a mask.

    Raises:
        DataError: the mask is in colour, or the file cannot be decoded.
    """
    from PIL import Image

    try:
        with Image.open(file) as image:
            if image.mode not in ("1", "L", "P"):
                raise DataError(
                    f"{file}: a mask of mode {image.mode}; expected one channel of 8 bits, or a palette, whose values "
                    "are the classes 0, 1, 2, ..."
                )
            return np.asarray(image).astype(np.uint8)[..., None]
    except (OSError, SyntaxError) as error:
        raise DataError(
            f"{file}: not an image that can be decoded ({error}); remove or replace it"
        ) from error


def _pairs(folder: Path) -> MaskedImages:
    if lacking := [name for name in ("images", "masks") if not (folder / name).is_dir()]:
        raise DataError(f"{folder}: has no {lacking[0]}/; {LAYOUT}")
    images = [f for f in sorted((folder / "images").iterdir()) if f.suffix.lower() in IMAGES]
    masks = {f.stem: f for f in sorted((folder / "masks").iterdir()) if f.suffix.lower() in IMAGES}
    if not images:
        raise DataError(f"{folder / 'images'}: holds no images ({', '.join(IMAGES)})")
    for file in images:
        if file.stem not in masks:
            raise DataError(f"{file}: has no mask {folder / 'masks' / file.stem}.png")
    return MaskedImages(tuple(images), tuple(masks[file.stem] for file in images))


def _names(path: Path, values: Sequence[int]) -> tuple[str, ...]:
    file, count = path / "classes.txt", max(values, default=0) + 1
    if not file.is_file():
        return tuple(map(str, range(count)))
    names = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    if len(names) < count:
        raise DataError(
            f"{file}: names {len(names)} classes, and the masks of train hold {count - 1}, so {count} are there"
        )
    return names


# The first mask value and the class names from there on, for sets whose features do not tell.
KNOWN_MASKS: dict[str, tuple[int, tuple[str, ...]]] = {
    "oxford_iiit_pet": (1, ("pet", "background", "border"))
}


def public(name: str, mask_column: str | None = None) -> Dataset:
    """Loads a public set of images with segmentation masks.

    The set must have an image column and a mask, an image column with one channel. The classes are named by number, up
    to the largest value in the first 200 masks of train, except for sets in ``KNOWN_MASKS``.

    An example has ``image`` and ``mask`` uint8 (h, w, 1), the class of each pixel, 255 for none.

    Missing splits are cut from train by hash of the position.

    Args:
        name: ``"tfds:NAME"`` or ``"tfds:NAME/CONFIG"``.
        mask_column: the column of the masks; by default the only image column with one channel.

    Raises:
        DataError: an unknown set, one that cannot be prepared, or one without such columns.
        ConnectionError: the set has to be downloaded and there is no network.
    """
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
        }  # values below the first wrap to 255, VOID

    if not names:
        train = open_sources(name, builder, columns)["train"]
        some = [np.unique(change(train[i])["mask"]) for i in range(min(len(train), 200))]
        names = tuple(map(str, range(int(max(v[v < 255].max(initial=0) for v in some)) + 1)))
    return changed_dataset(name, builder, columns, change, names, lambda row: True)
