"""Images with a class for every pixel: your own files, or a public set of TensorFlow Datasets."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import SupportsIndex

import numpy as np
from jaxtyping import UInt8

from jtl.data.annotated import VOID
from jtl.data.dataset import DataError, Dataset, Example, complete
from jtl.data.files import ALIASES, IMAGES, by_split, digest, read_image

LAYOUT = "expected images/ and masks/ with files of the same names, or train/, validation/ and test/ with these two"


def load_masks(name: str | os.PathLike, *, mask_column: str | None = None) -> Dataset:
    """Images with masks: examples have ``image`` and ``mask`` uint8 (h, w, 1), the class of each pixel, 255 for none.

    * ``"tfds:NAME[/CONFIG]"``: a public set with an image of one channel, ``mask_column``, beside its images, such as
      ``tfds:oxford_iiit_pet``;
    * a folder with ``images/`` and ``masks/``, whose files have the same names but for their endings; or with folders
      ``train``, ``validation`` and ``test`` of that form. A mask has one channel, or a palette, whose values are the
      classes 0, 1, 2, ... The names of the classes, one a line, may lie beside in ``classes.txt``. Missing splits are
      cut from train, see ``jtl.data.load``.

    Raises:
        DataError: another layout; an image without a mask; a mask in colour, of another size, or with a value that is
            no class.
        FileNotFoundError: no such path.
    """
    name = os.fspath(name)
    if name.startswith("tfds:"):
        from jtl.data.tfds_annotated import public_masks

        return public_masks(name, mask_column)
    path = Path(name).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(
            f"no folder at {path}: masks come from scenes, tfds:NAME or a folder; {LAYOUT}"
        )
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
