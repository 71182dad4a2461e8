"""Texts with summaries: docstrings and their first lines, your own tables, or public sets.

An example has ``text`` and ``summary``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from jtl.data.dataset import DataError, Dataset, Source, by_split, complete
from jtl.data.readers.tables import TABLES, read_columns
from jtl.data.readers.tfds import as_dataset, find_builder, open_sources, standard_splits


def own(path: Path, text_column: str = "text", summary_column: str = "summary") -> Dataset:
    """The texts and summaries of a table, or of a folder of tables.

    Args:
        path: a ``.csv``, ``.tsv`` or ``.jsonl`` file, or a folder with ``train``, ``validation`` and ``test`` files of
            these. Missing splits are cut from train by hash of the text.
        text_column: the column of the texts.
        summary_column: that of the summaries.

    Raises:
        DataError: another file, a missing column, an empty split.
    """
    tables = [path] if path.is_file() else [file for file in sorted(path.iterdir()) if file.suffix in TABLES]
    files = {"train": path} if path.is_file() else by_split(path, tables)
    if not files:
        raise DataError(f"{path}: holds no train.csv, train.tsv or train.jsonl")
    columns = {"text": text_column, "summary": summary_column}
    splits: dict[str, Source] = {split: read_columns(file, columns) for split, file in files.items()}
    return dataset(str(path), splits, f"your files at {path}")


def dataset(name: str, splits: Mapping[str, Source], origin: str) -> Dataset:
    """A data set of texts and summaries out of its splits; missing ones are cut from train by hash of the text."""
    train = splits["train"]
    cut, notes = complete(splits, [train[i]["text"] for i in range(len(train))])
    digest = hashlib.sha256()
    for split, source in cut.items():
        for i in range(len(source)):
            digest.update(f"{split}\n{source[i]['text']}\n{source[i]['summary']}\n".encode())
    return Dataset(name, "summary", cut, (), origin, digest.hexdigest()[:16], tuple(notes))


def public(name: str, text_column: str | None = None, summary_column: str | None = None) -> Dataset:
    """The public texts ``"tfds:NAME[/CONFIG]"`` and their summaries; see ``jtl.data.load_summaries``."""
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
