"""Image files: decoded when read, and folders with one subfolder per class."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import SupportsIndex

import numpy as np
from jaxtyping import Int

from jtl.data.dataset import DataError, Dataset, Example, check_labels, complete, digest

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Images at ``paths``, decoded when read: uint8 ``(H, W, 1)`` if grey, else ``(H, W, 3)``."""

    paths: tuple[Path, ...]
    label: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def labels(self) -> Int[np.ndarray, " N"]:
        """Label of every image, without decoding any."""
        return np.array(self.label, np.int32)

    def __getitem__(self, index: SupportsIndex, /) -> Example:
        return {"image": read_image(self.paths[index]), "label": self.label[index]}


def read_image(path: Path) -> np.ndarray:
    """Reads an image as uint8 ``(H, W, 1)`` if grey, else ``(H, W, 3)``.

    16-bit grey is scaled to 8 bits; transparency is dropped.

    Raises:
        DataError: it cannot be decoded.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):
                return (np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)[..., None]
            grey = image.mode in ("1", "L", "LA")
            pixels = np.asarray(image.convert("L" if grey else "RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(
            f"{path}: not an image that can be decoded ({error}); remove or replace it"
        ) from error
    return pixels[..., None] if grey else pixels


def labelled(path: Path, folders: Mapping[str, Path]) -> Dataset:
    """Loads folders of images, one per split with one subfolder per class; see ``jtl.data.readers.labels``."""
    from PIL import Image

    classes = _subfolders(folders["train"])
    found: dict[str, ImageFiles] = {}
    for split, folder in folders.items():
        if unseen := [name for name in _subfolders(folder) if name not in classes]:
            raise DataError(
                f"{folder}: class {unseen[0]!r} of split {split} is unseen in train, "
                f"which has {', '.join(classes[:10])}"
            )
        files, label = [], []
        for number, name in enumerate(classes):
            if not (folder / name).is_dir():
                continue
            for file in sorted((folder / name).rglob("*")):
                if file.suffix.lower() in IMAGES and not file.name.startswith("."):
                    files.append(file)
                    label.append(number)
        check_labels(label, classes, split, str(folder))
        for file in files:
            try:
                Image.open(file).close()
            except (OSError, SyntaxError) as error:
                raise DataError(
                    f"{file}: not an image that can be decoded ({error}); remove or replace it"
                ) from error
        found[split] = ImageFiles(tuple(files), tuple(label))
    digests = {split: [digest([file]) for file in source.paths] for split, source in found.items()}
    version = hashlib.sha256(repr((classes, digests)).encode()).hexdigest()[:16]
    splits, notes = complete(found, digests["train"], found["train"].label)
    return Dataset(
        name=str(path), kind="image", splits=splits, classes=classes, origin=f"your images at {path}",
        version=version, notes=tuple(notes),
    )  # fmt: skip


def _subfolders(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(e.name for e in folder.iterdir() if e.is_dir() and not e.name.startswith(".")))
