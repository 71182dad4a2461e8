"""Public data sets of TensorFlow Datasets (TFDS), read without TensorFlow."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import pkgutil
import socket
import sys
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, SupportsIndex

import numpy as np
from jaxtyping import Int

from jtl._files import cache_dir
from jtl.data.dataset import SPLITS, DataError, Dataset, Example, Source, check_labels, complete
from jtl.tree import near_misses


@dataclass(frozen=True, eq=False)
class Changed:
    """The examples of ``source``, each transformed by ``change``."""

    source: Source
    change: Callable[[Example], Example]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: SupportsIndex, /) -> Example:
        return self.change(self.source[index])


def key_of(features: Any, kind: type) -> str | None:
    """Returns the first of the ``features`` of this kind, or None."""
    return next((key for key, feature in features.items() if isinstance(feature, kind)), None)


def changed_dataset(
    name: str,
    builder: Any,
    columns: tuple[tuple[str, str], ...],
    change: Callable[[Example], Example],
    classes: tuple[str, ...],
    labelled: Callable[[Example], bool],
) -> Dataset:
    """Returns the data set of ``builder`` with examples transformed by ``change``.

    Args:
        name: of the data set.
        builder: its TFDS builder.
        columns: columns to rename, as (theirs, ours).
        change: transforms an example.
        classes: class names.
        labelled: whether an example is annotated; a test split whose first example is not is dropped.
    """
    opened = {
        split: Changed(source, change) for split, source in open_sources(name, builder, columns).items()
    }
    splits, notes = standard_splits(name, opened, labelled)
    return as_dataset(name, builder, "image", splits, notes, classes)


MAX_CARVED = 10_000


@dataclass(frozen=True, eq=False)
class TfdsSource:
    """A TFDS data source with columns renamed to ours and bytes decoded."""

    source: Any
    columns: tuple[tuple[str, str], ...]  # (theirs, ours)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: SupportsIndex, /) -> Example:
        row = dict(self.source[index])
        example = {ours: row.pop(theirs) for theirs, ours in self.columns} | row
        return {name: plain_value(value) for name, value in example.items()}

    @functools.cached_property
    def labels(self) -> Int[np.ndarray, " N"]:
        """Label of every example; reads all of them once."""
        return np.fromiter((self[i]["label"] for i in range(len(self))), np.int32, len(self))


def plain_value(value: Any) -> Any:
    """Converts bytes to text and NumPy integers to Python's."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return int(value) if isinstance(value, np.integer) else value


def prepare(builder: Any) -> None:
    """Downloads and prepares a data set once; another process may be doing so at the same time."""
    logging.getLogger("absl").addFilter(_not_about_opencv)
    if builder.data_path.exists():
        return
    with contextlib.redirect_stdout(sys.stderr):
        try:
            builder.download_and_prepare()
        except OSError:
            if not builder.data_path.exists():
                raise


def _not_about_opencv(record: logging.LogRecord) -> bool:
    return "OpenCV is not installed" not in str(record.msg)


def public(
    name: str,
    text_column: str | None = None,
    label_column: str | None = None,
    image_column: str | None = None,
) -> Dataset:
    """Loads a public set of labelled texts or images.

    The set must have a column of texts or images, and one of class labels.

    An example has ``text`` (str) or ``image`` (uint8 ``(H, W, C)``), ``label`` (int), and the set's other columns.

    Missing splits are cut from train by hash of the position, texts within each class.

    Args:
        name: ``"tfds:NAME"`` or ``"tfds:NAME/CONFIG"``.
        text_column: the column of the texts. Columns default to the set's supervised keys, then to the only column of
            the kind.
        label_column: the column of the labels.
        image_column: the column of the images.

    Raises:
        DataError: an unknown set, one that cannot be prepared, or one without such columns; a label out of range.
        ConnectionError: the set has to be downloaded and there is no network.
    """
    import tensorflow_datasets as tfds

    builder = find_builder(name)
    features, keys = builder.info.features, builder.info.supervised_keys or ()
    wanted = {"text": tfds.features.Text, "image": tfds.features.Image, "label": tfds.features.ClassLabel}
    of = {kind: [key for key in features if isinstance(features[key], cls)] for kind, cls in wanted.items()}
    images = image_column or (not text_column and (set(keys) & set(of["image"]) or not of["text"]))
    kind: Literal["text", "image"] = "image" if images else "text"
    columns = (
        (_column(name, kind, image_column if kind == "image" else text_column, of, keys, features), kind),
        (_column(name, "label", label_column, of, keys, features), "label"),
    )
    sources = open_sources(name, builder, columns)
    classes = tuple(features[columns[1][0]].names)
    splits, notes = standard_splits(name, sources)
    if kind == "text":
        for split, source in splits.items():
            check_labels(source.labels, classes, split, name)
    strata = splits["train"].labels if kind == "text" else None
    return as_dataset(name, builder, kind, splits, notes, classes, strata)


def open_sources(name: str, builder: Any, columns: tuple[tuple[str, str], ...]) -> dict[str, TfdsSource]:
    """Prepares and opens every split that has examples.

    Raises:
        DataError: the set cannot be prepared without TensorFlow.
        ConnectionError: the set has to be downloaded and there is no network.
    """
    if not builder.data_path.exists():
        _check_network(name)
    try:
        prepare(builder)
        sources = {
            split: TfdsSource(builder.as_data_source(split=split), columns)
            for split, info in builder.info.splits.items()
            if info.num_examples
        }
        for source in sources.values():
            source[0]  # files are opened on first access
    except Exception as error:  # builders by many authors raise errors of any class
        raise DataError(
            f"{name} could not be prepared without TensorFlow in {builder.data_path} "
            f"({type(error).__name__}: {str(error).strip()[:300]}). Prepare it elsewhere with "
            'file_format="array_record" and set TFDS_DATA_DIR to its folder'
        ) from error
    return sources


def as_dataset(
    name: str,
    builder: Any,
    kind: Literal["text", "image", "question", "summary", "speech"],
    splits: Mapping[str, Source],
    notes: Sequence[str],
    classes: tuple[str, ...] = (),
    strata: np.ndarray | None = None,
) -> Dataset:
    """Returns the data set of ``builder``; missing splits are cut from train by hash of the position."""
    positions = [f"{builder.info.full_name}/{i}" for i in range(len(splits["train"]))]
    whole, carved = complete(splits, positions, strata, MAX_CARVED)
    return Dataset(
        name=name,
        kind=kind,
        splits=whole,
        classes=classes,
        origin=f"TensorFlow Datasets {builder.info.full_name} ({builder.info.homepage})",
        version=builder.info.full_name,
        notes=(*notes, *carved),
    )


@functools.cache
def _register_all() -> None:
    """Imports the TFDS packages that define data sets, which TFDS leaves lazy and therefore unregistered."""
    import tensorflow_datasets as tfds

    for package in pkgutil.iter_modules(tfds.__path__, "tensorflow_datasets."):
        if package.ispkg and package.name.split(".")[-1] not in ("core", "scripts", "testing"):
            with contextlib.suppress(ImportError):  # a few need h5py
                importlib.import_module(package.name)


def find_builder(name: str) -> Any:
    """Returns the builder of ``"tfds:NAME[/CONFIG]"``.

    Raises:
        DataError: the set or config is unknown (close matches are listed), or its columns need TensorFlow.
    """
    import tensorflow_datasets as tfds

    _register_all()
    theirs = name.removeprefix("tfds:")
    data_dir = os.environ.get("TFDS_DATA_DIR") or cache_dir() / "tfds_public"
    try:
        return tfds.builder(theirs, data_dir=data_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError:
        close = near_misses(theirs.split("/")[0], tfds.list_builders(with_community_datasets=False))
        raise DataError(
            f"TensorFlow Datasets has no {theirs!r}{'; did you mean ' + ' or '.join(close) + '?' if close else ''}"
        ) from None
    except ModuleNotFoundError as error:
        if "'tensorflow'" not in str(error):
            raise
        raise DataError(
            f"{name}: TensorFlow Datasets needs TensorFlow for such columns, as for sound: pip install tensorflow"
        ) from error
    except (ValueError, ImportError) as error:
        configs = list(tfds.builder_cls(theirs.split("/")[0]).builder_configs)
        raise DataError(
            f"{name}: {' '.join(str(error).split())[-300:]}"
            if not configs or theirs.partition("/")[2].split(":")[0] in configs
            else f"{name}: unknown config; there are {', '.join(configs[:30])}"
        ) from error


def _column(
    name: str, kind: str, asked: str | None, of: Mapping[str, list[str]], keys: tuple, features: Any
) -> str:
    """The column of a kind: the one asked for, else the supervised one, else the only one."""
    found = ", ".join(f"{key} ({type(feature).__name__})" for key, feature in features.items())
    if asked is not None:
        if asked not in of[kind]:
            raise DataError(f"{name}: no {kind} column {asked!r}; it has {found}")
        return asked
    usual = [key for key in keys if key in of[kind]] or [key for key in of[kind] if key == kind] or of[kind]
    if len(usual) != 1:
        raise DataError(f"{name}: which is the {kind} column? Choose with --{kind}-column; it has {found}")
    return usual[0]


def standard_splits(
    name: str,
    sources: Mapping[str, Any],
    labelled: Callable[[Example], bool] = lambda example: example.get("label", 0) >= 0,
) -> tuple[dict[str, Any], list[str]]:
    """Returns train, and validation and test if their first example is ``labelled``; and notes.

    Without a labelled test split, validation becomes test.

    Raises:
        DataError: there is no train split.
    """
    splits, notes = {split: sources[split] for split in SPLITS if split in sources}, []
    if "train" not in splits:
        raise DataError(f"{name}: no train split with examples; it has {', '.join(sources)}")
    if "test" in splits and not labelled(splits["test"][0]):
        del splits["test"]
        notes.append("the test split is not labelled")
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
        notes.append("no labelled test split: validation is test")
    return splits, notes


def _check_network(name: str) -> None:
    """Fails at once where TFDS would retry for minutes; a proxy may resolve names that this machine cannot."""
    if urllib.request.getproxies():
        return
    try:
        socket.getaddrinfo("storage.googleapis.com", 443)
    except OSError as error:
        raise ConnectionError(
            f"{name} has to be downloaded, but this machine reaches no public host ({error}). Prepare it elsewhere "
            'with file_format="array_record" and set TFDS_DATA_DIR to its folder, or use an embedded data set'
        ) from error
