"""Images with a class for every pixel: your own files, or a public set of TensorFlow Datasets."""

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
    """The images and masks in a folder.

    Examples have ``image`` and ``mask`` uint8 (h, w, 1), the class of each pixel, 255 for none.

    Args:
        path: a folder with ``images/`` and ``masks/``, whose files have the same names but for their endings; or with
            folders ``train``, ``validation`` and ``test`` of that form. A mask has one channel, or a palette, whose
            values are the classes 0, 1, 2, ... The names of the classes, one a line, may lie beside in
            ``classes.txt``. Missing splits are cut from train, see ``jtl.data.load``.

    Raises:
        DataError: another layout; an image without a mask; a mask in colour, of another size, or with a value that is
            no class.
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
    """Images and their masks, decoded when asked for."""

    images: tuple[Path, ...]
    masks: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: SupportsIndex, /) -> Example:
        return {"image": read_image(self.images[index]), "mask": read_mask(self.masks[index])}

    def values(self) -> list[int]:
        """The classes that occur."""
        seen = np.zeros(256, bool)
        for file in self.masks:
            seen[read_mask(file)] = True
        return [value for value in np.flatnonzero(seen).tolist() if value != VOID]

    def check(self, classes: int, split: str) -> None:
        """Raises DataError for a value that is no class."""
        for file in self.masks:
            values = np.unique(read_mask(file))
            if len(wrong := values[(values >= classes) & (values != VOID)]):
                raise DataError(
                    f"{file}, split {split}: has pixels of {wrong[0]}; the {classes} classes are 0 to {classes - 1}, "
                    f"and {VOID} is none"
                )


def read_mask(file: Path) -> UInt8[np.ndarray, "h w 1"]:
    """The values of a mask. Raises DataError for one in colour, or a file that is no image."""
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


# The first value of a mask and the names from there on, where the features of the set do not tell.
KNOWN_MASKS: dict[str, tuple[int, tuple[str, ...]]] = {
    "oxford_iiit_pet": (1, ("pet", "background", "border"))
}


def public(name: str, mask_column: str | None = None) -> Dataset:
    """The set ``"tfds:NAME[/CONFIG]"`` with masks; see ``jtl.data.readers.masks.load_masks``."""
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
    return changed_dataset(name, builder, columns, change, names, lambda row: True)
