"""``load``: a data set by name, whether embedded, public or your own."""

from __future__ import annotations

import os
from pathlib import Path

from jtl.data.dataset import DataError, Dataset
from jtl.data.files import TABLES, load_path
from jtl.data.newsgroups import PREFIX, TASKS, transfer
from jtl.tree import near_misses

NAMES = (
    "rotten_tomatoes", "newsgroups20", "reuters_r8", "mnist5k", "uci_digits", "mnist_m", "rendered_digits",
)  # fmt: skip


def load(
    name: str | os.PathLike,
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    image_column: str | None = None,
) -> Dataset:
    """The data set called ``name``.

    * one of ``NAMES``: embedded data (``jtl.data.builders`` documents each), prepared once into the cache;
    * ``"newsgroups20:TASK:DOMAIN"``, such as ``"newsgroups20:comp_sci:source"``: a domain of one of the six transfer
      tasks of 20 Newsgroups, see ``jtl.data.newsgroups``;
    * ``"tfds:NAME"`` or ``"tfds:NAME/CONFIG"``: any public set of TensorFlow Datasets, no TensorFlow needed. It is
      kept in ``$TFDS_DATA_DIR``, else in jtl's cache. Columns default to its supervised keys;
    * a ``.csv``, ``.tsv`` or ``.jsonl`` file, or a folder with ``train``, ``validation`` and ``test`` files of
      these: one text and one label a row, from ``text_column`` ("text") and ``label_column`` ("label"). Labels are
      whole numbers from 0, or names;
    * a folder of images with one subfolder a class, or ``train/CLASS/``, ``validation/CLASS/``, ``test/CLASS/``.

    A missing test split is a fifth of train, a missing validation split a tenth, cut by a stable hash within each
    class; ``notes`` of the result say so. For ``tfds:`` the cut is by position, and a test split without labels
    (-1) is replaced by the validation split.

    Raises:
      DataError: unknown name (near misses are listed), missing column (those found are listed), label out of range,
        not a whole number or unseen in train, empty split, class without example, undecodable image.
      FileNotFoundError: a path that does not exist.
      jtl._wheels.WheelError: the wheel of an embedded set cannot be fetched.
    """
    name = os.fspath(name)
    if name in NAMES:
        from jtl.data import tfds

        return tfds.embedded(name)
    if name.startswith(PREFIX):
        return transfer(name)
    if name.startswith("tfds:"):
        from jtl.data import tfds

        return tfds.public(name, text_column, label_column, image_column)
    path = Path(name).expanduser()
    if path.exists():
        return load_path(path, text_column or "text", label_column or "label")
    if path.suffix in TABLES or len(path.parts) > 1:
        raise FileNotFoundError(f"no data file or folder at {path}")
    close = near_misses(name, (*NAMES, *TASKS))
    raise DataError(
        f"unknown data set {name!r}{'; did you mean ' + ' or '.join(close) + '?' if close else ''}. Known are "
        f"{', '.join(NAMES)}, {PREFIX}TASK:DOMAIN, tfds:NAME, and paths of CSV, TSV or JSONL files and of image folders"
    )
