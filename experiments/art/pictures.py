"""What ``art`` learns from and is judged by: old pictures, a few new ones, others held out, and a network for both."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from jtl import data
from jtl.data import image, shift
from jtl.data.dataset import DataError
from jtl.data.encode.image import Images, Preprocess
from jtl.data.readers.images import IMAGES, ImageFiles
from jtl.data.sets.few_shot import Joined

OLD, POSTER = "mnist5k", "poster"
HOW = Preprocess((28, 28), (0.5,) * 3, (0.5,) * 3)  # -1 to 1


@dataclass(frozen=True, eq=False)
class Pictures:
    """Old pictures with the labels 0 to K - 1, and new ones with those from K on.

    Attributes:
        old: to pre-train on.
        old_test: held out.
        old_classes: K names.
        pool: new pictures, of which few are learned from.
        held_in: new pictures for the judge.
        reference: new pictures that nothing was trained on (see ``notes`` where there are none).
        real: others of the same kind, to be measured as if they were generated; None if there are too few.
        classes: names of the new ones.
        whole: whether all of ``pool`` is learned from.
        origin: where they come from.
        notes: what a reader of results should know.
    """

    old: Images
    old_test: Images
    old_classes: tuple[str, ...]
    pool: Images
    held_in: Images
    reference: Images
    real: Images | None
    classes: tuple[str, ...]
    whole: bool
    origin: str
    notes: tuple[str, ...]

    @property
    def like(self) -> tuple[int | None, ...]:
        """For each new class the old one of its name, or None."""
        return tuple(self.old_classes.index(c) if c in self.old_classes else None for c in self.classes)

    def split(self, shots: int, seed: int) -> tuple[Images, Images]:
        """``shots`` new pictures of each class, and a hundred others to validate with, if there are any."""
        if self.whole:
            return self.pool, self.pool
        count = min(shots * len(self.classes), len(self.pool))
        order = data.subset_indices(self.pool.labels, len(self.pool), seed)
        few = self.pool.take(order[:count])
        return few, self.pool.take(order[count : count + 100]) if count < len(order) else few


def load_pictures(name: str, most: int) -> Pictures:
    """The pictures called ``name``.

    Args:
        name: ``poster``; what ``jtl.data.load`` knows; a folder of pictures, or of folders, one a class.
        most: reference pictures at most.
    """
    old = data.load(OLD)
    train, old_test = (image.prepare(old.splits[split], HOW) for split in ("train", "test"))
    old_test = old_test.take(
        data.subset_indices(old_test.labels, len(old_test), 0)
    )  # its first rows: all classes
    first = len(old.classes)
    notes: tuple[str, ...] = ()
    whole, folder = False, Path(name).expanduser()
    pool: data.Source
    held_in: data.Source
    test: data.Source
    if name == POSTER:
        new = {
            s: shift.Shifted(part, lambda pixels, _: shift.printed(pixels)) for s, part in old.splits.items()
        }
        pool, held_in, test = new["validation"], new["train"], new["test"]
        classes, origin = old.classes, f"{old.origin}, printed in two colours"
    elif folder.is_dir() and not (folder / "train").is_dir():
        whole, (pool, classes) = True, _folder(folder)
        held_in = test = pool
        origin = f"your pictures in {folder}"
        notes = (
            "No picture is held out: distances are to those that were learned from, and the judge knows no others",
        )
    else:
        loaded = data.load(name)
        if loaded.kind != "image":
            raise DataError(f"--data {name} holds {loaded.kind}s; art needs pictures")
        pool = held_in = loaded.splits["train"]
        test, classes, origin, notes = loaded.splits["test"], loaded.classes, loaded.origin, loaded.notes

    def ready(source: data.Source) -> Images:
        prepared = image.prepare(source, HOW)
        return replace(prepared, known_labels=np.asarray(prepared.labels) + first)

    held_out = ready(test)
    half = len(held_out) if whole else min(most, len(held_out) // 2)
    order = data.subset_indices(held_out.labels, max(half if whole else 2 * half, len(classes)), 0)
    return Pictures(
        train, old_test, old.classes, ready(pool), ready(held_in), held_out.take(order[:half]),
        None if whole else held_out.take(order[half:]), tuple(classes), whole, origin, notes,
    )  # fmt: skip


def _folder(folder: Path) -> tuple[data.Source, tuple[str, ...]]:
    """All pictures of a folder, and the names of its classes."""
    if any(entry.is_dir() and not entry.name.startswith(".") for entry in folder.iterdir()):
        loaded = data.load(folder)
        if loaded.kind != "image":
            raise DataError(f"--data {folder} holds {loaded.kind}s; art needs pictures")
        return Joined(tuple(loaded.splits.values())), loaded.classes
    files = tuple(sorted(f for f in folder.iterdir() if f.suffix.lower() in IMAGES))
    if len(files) < 2:
        raise DataError(
            f"--data {folder}: expected pictures ({', '.join(IMAGES)}), or a folder of them for each class; it holds "
            f"{[entry.name for entry in sorted(folder.iterdir())[:8]] or 'nothing'}"
        )
    return ImageFiles(files, (0,) * len(files)), (folder.name,)


def pixels(images: Images, indices: np.ndarray | None = None) -> np.ndarray:
    """The pictures as the network reads them, -1 to 1: float32 (N, 28, 28, 3)."""
    return images.batch(np.arange(len(images)) if indices is None else indices)["image"]
