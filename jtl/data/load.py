"""``load``: a data set by name, whether it ships with a name, is public or your own."""

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
    """The data set called ``name``.

    * one of ``NAMES``: embedded data (``jtl.data.sets.builders`` documents each), prepared once into the cache;
    * ``"newsgroups20:TASK:DOMAIN"``, such as ``"newsgroups20:comp_sci:source"``: a domain of one of the six transfer
      tasks of 20 Newsgroups, see ``jtl.data.sets.newsgroups``;
    * ``"tfds:NAME"`` or ``"tfds:NAME/CONFIG"``: any public set of TensorFlow Datasets, no TensorFlow needed (but for
      sound). It is kept in ``$TFDS_DATA_DIR``, else in jtl's cache. Columns default to its supervised keys;
    * a path of your own: what it should hold stands at ``own`` of the kind's module in ``jtl.data.readers``.

    A missing test split is a fifth of train, a missing validation split a tenth, cut by a stable hash, of labelled data
    within each class; ``notes`` of the result say so. For ``tfds:`` the cut is by position, and a test split without
    labels (-1) is replaced by the validation split.

    Args:
        name: of the set, or its path.
        kind: what the examples hold beside texts, images or sounds: a label (``text`` or ``image``, and ``label``),
            ``questions`` whose answers stand in a text, ``summaries``, ``boxes`` around objects, ``masks`` with a class
            for every pixel, or ``speech`` with its transcript.
        **columns: of your own tables and of public sets: ``text_column`` and ``label_column`` ("text", "label"),
            ``image_column``, ``summary_column``, ``mask_column``, as the kind has them; None leaves the default.

    Raises:
        DataError: unknown name (near misses are listed), missing column (those found are listed), label out of range,
            not a whole number or unseen in train, empty split, class without example, undecodable image.
        FileNotFoundError: a path that does not exist.
        jtl._wheels.WheelError: the wheel of an embedded set cannot be fetched.
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
    """The data set called ``name`` for few-shot learning: each class is in one split alone.

    * ``"glyphs"``: letters of many scripts, whole alphabets held out (``jtl.data.sets.glyphs``);
    * ``"newsgroups20"``: rec and sci in train, comp in validation, the others in test;
    * a folder with ``train/CLASS/`` and ``test/CLASS/`` of images, perhaps ``validation/CLASS/``, whose classes differ;
    * anything else that ``load`` knows, its examples pooled: see ``jtl.data.sets.few_shot.new_classes``.

    ``classes`` are those of all splits.

    Raises:
        DataError: as ``load`` does; too few classes to split; or the folders of two splits share a class.
    """
    name = os.fspath(name)
    if name == few_shot.GLYPHS:
        return _embedded(name)
    folder = Path(name).expanduser()
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        return few_shot.folders(name, folder, seed)
    return few_shot.new_classes(load(name), seed)


def _embedded(name: str) -> Dataset:
    from jtl.data.sets import builders  # brings TensorFlow Datasets along

    return builders.embedded(name)


def _given(reader: Callable[..., Dataset], name: str, columns: dict[str, str | None]) -> dict[str, str]:
    """The columns that were asked for. Raises DataError for one that the reader does not know."""
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
