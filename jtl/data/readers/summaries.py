"""Texts with summaries: your own tables, or a public set of TensorFlow Datasets."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from jtl.data.dataset import DataError, Dataset, Source, by_split, complete
from jtl.data.readers.tables import TABLES, read_columns
from jtl.data.readers.tfds import as_dataset, find_builder, open_sources, standard_splits


def own(path: Path, text_column: str = "text", summary_column: str = "summary") -> Dataset:
    """Loads your own texts with summaries.

    ``path`` is a ``.csv``, ``.tsv`` or ``.jsonl`` file, or a folder with such files ``train``, ``validation`` and
    ``test``.

    An example has ``text`` and ``summary``.

    Missing splits are cut from train by hash of the text.

    Args:
        path: the file or folder.
        text_column: the column of the texts.
        summary_column: the column of the summaries.

    Raises:
        DataError: another layout, a missing column, a blank cell, or an empty split.
    """
    tables = [path] if path.is_file() else [file for file in sorted(path.iterdir()) if file.suffix in TABLES]
    files = {"train": path} if path.is_file() else by_split(path, tables)
    if not files:
        raise DataError(f"{path}: holds no train.csv, train.tsv or train.jsonl")
    columns = {"text": text_column, "summary": summary_column}
    splits: dict[str, Source] = {split: read_columns(file, columns) for split, file in files.items()}
    return dataset(str(path), splits, f"your files at {path}")


def dataset(name: str, splits: Mapping[str, Source], origin: str) -> Dataset:
    """Returns a data set of summaries from its splits; missing ones are cut from train by hash of the text."""
    train = splits["train"]
    cut, notes = complete(splits, [train[i]["text"] for i in range(len(train))])
    digest = hashlib.sha256()
    for split, source in cut.items():
        for i in range(len(source)):
            digest.update(f"{split}\n{source[i]['text']}\n{source[i]['summary']}\n".encode())
    return Dataset(name, "summary", cut, (), origin, digest.hexdigest()[:16], tuple(notes))


def public(name: str, text_column: str | None = None, summary_column: str | None = None) -> Dataset:
    """Loads a public set of texts with summaries.

    The set must have a column of texts and a column of summaries.

    An example has ``text`` and ``summary``.

    Missing splits are cut from train by hash of the position.

    Args:
        name: ``"tfds:NAME"`` or ``"tfds:NAME/CONFIG"``.
        text_column: the column of the texts; by default the first of the set's supervised keys.
        summary_column: the column of the summaries; by default the second of the supervised keys.

    Raises:
        DataError: an unknown set, one that cannot be prepared, or one without such columns.
        ConnectionError: the set has to be downloaded and there is no network.
    """
    builder = find_builder(name)
    features, keys = builder.info.features, builder.info.supervised_keys or ()
    usual = [*map(str, keys), "", ""]
    columns = tuple(
        (asked or usual[place], ours)
        for place, (asked, ours) in enumerate(((text_column, "text"), (summary_column, "summary")))
    )
    if missing := [(theirs, ours) for theirs, ours in columns if theirs not in features]:
        raise DataError(
            f"{name}: no {missing[0][1]} column {missing[0][0]!r}; it has {', '.join(features)}. Choose with "
            "--text-column and --summary-column"
        )
    splits, notes = standard_splits(name, open_sources(name, builder, columns))
    return as_dataset(name, builder, "summary", splits, notes)
