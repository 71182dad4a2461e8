"""Labelled texts and images, for classification: your own files, or a public set of TensorFlow Datasets."""

from __future__ import annotations

from pathlib import Path

from jtl.data.dataset import ALIASES, DataError, Dataset, by_split
from jtl.data.readers import images, tables
from jtl.data.readers.tables import TABLES
from jtl.data.readers.tfds import public

__all__ = ["own", "public"]


def own(path: Path, text_column: str = "text", label_column: str = "label") -> Dataset:
    """Loads your own labelled texts or images.

    For texts, ``path`` is a ``.csv``, ``.tsv`` or ``.jsonl`` file with one text and one label per row, or a folder with
    such files ``train``, ``validation`` and ``test``. For images, it is a folder with one subfolder of images per
    class, or with ``train/CLASS/``, ``validation/CLASS/`` and ``test/CLASS/``.

    An example has ``text`` (str) or ``image`` (uint8 ``(H, W, C)``, C 1 or 3), and ``label`` (int).

    Missing splits are cut from train within each class, by hash of the text or image file.

    Args:
        path: the file or folder.
        text_column: the column of the texts.
        label_column: the column of the labels: whole numbers from 0, or names.

    Raises:
        DataError: another layout, a missing column, a label that is not a class of train, an empty split, or an image
            that cannot be decoded.
    """
    if path.is_file():
        if path.suffix not in TABLES:
            raise DataError(f"{path}: expected a file ending in {', '.join(TABLES)}, or a folder")
        return tables.labelled(path, {"train": path}, text_column, label_column)
    entries = [entry for entry in sorted(path.iterdir()) if not entry.name.startswith(".")]
    files = by_split(path, [entry for entry in entries if entry.suffix in TABLES])
    folders = [entry for entry in entries if entry.is_dir()]
    if files:
        return tables.labelled(path, files, text_column, label_column)
    if folders:
        split_folders = by_split(path, [entry for entry in folders if entry.name in ALIASES])
        return images.labelled(path, split_folders if "train" in split_folders else {"train": path})
    raise DataError(
        f"{path}: found neither train.csv (or {', '.join('train' + end for end in TABLES[1:])}) nor a folder of "
        f"images for each class; it holds {[entry.name for entry in entries[:8]] or 'nothing'}"
    )
