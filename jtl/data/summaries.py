"""Texts with summaries: docstrings and their first lines, your own tables, or public sets.

An example has ``text`` and ``summary``.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from jtl.data.dataset import DataError, Dataset, Example, Source, complete
from jtl.data.docstrings import docstrings, versions
from jtl.data.files import TABLES, by_split, read_columns

DOCSTRINGS = "docstrings"
# No package is in two splits, so that none shares a docstring.
PACKAGES = {"train": ("numpy", "scipy"), "validation": ("flax",), "test": ("sklearn", "optax")}
LEAST_WORDS = 15  # of the prose: a shorter one says no more than the summary
SUMMARY_WORDS = (3, 25)


def load_summaries(
    name: str | os.PathLike = DOCSTRINGS,
    *,
    text_column: str | None = None,
    summary_column: str | None = None,
) -> Dataset:
    """The texts and summaries called ``name``.

    * ``"docstrings"``: the prose of a docstring and its first line, which the prose does not hold. NumPy and SciPy are
      train, Flax is validation, scikit-learn and Optax are test;
    * a ``.csv``, ``.tsv`` or ``.jsonl`` file with the columns ``text`` and ``summary``, or a folder with ``train``,
      ``validation`` and ``test`` files of these. Missing splits are cut from train by hash of the text;
    * ``"tfds:NAME"``, a public set of TensorFlow Datasets such as ``tfds:xsum``: its supervised columns.

    Args:
        name: which.
        text_column: the column of the texts.
        summary_column: that of the summaries.

    Raises:
        DataError: an unknown name, a missing column, an empty split.
        FileNotFoundError: a path that does not exist.
    """
    name = os.fspath(name)
    if name == DOCSTRINGS:
        return _over_docstrings()
    if name.startswith("tfds:"):
        from jtl.data import tfds

        return tfds.summaries(name, text_column, summary_column)
    path = Path(name).expanduser()
    if not path.exists():
        if path.suffix in TABLES or len(path.parts) > 1:
            raise FileNotFoundError(f"no texts at {path}")
        raise DataError(
            f"unknown summaries {name!r}: expected {DOCSTRINGS}, tfds:NAME, or a CSV, TSV or JSONL file or a folder of "
            "them"
        )
    tables = [path] if path.is_file() else [file for file in sorted(path.iterdir()) if file.suffix in TABLES]
    files = {"train": path} if path.is_file() else by_split(path, tables)
    if not files:
        raise DataError(f"{path}: holds no train.csv, train.tsv or train.jsonl")
    columns = {"text": text_column or "text", "summary": summary_column or "summary"}
    splits: dict[str, Source] = {split: read_columns(file, columns) for split, file in files.items()}
    return _dataset(name, splits, f"your files at {path}")


def _over_docstrings() -> Dataset:
    splits: dict[str, list[Example]] = {}
    seen: set[str] = set()
    for split in ("test", "validation", "train"):
        splits[split] = []
        for package in PACKAGES[split]:
            for one in docstrings(package):
                text, words = " ".join(one.prose), len(one.summary.split())
                if len(text.split()) < LEAST_WORDS or text in seen:
                    continue
                if SUMMARY_WORDS[0] <= words <= SUMMARY_WORDS[1]:
                    seen.add(text)
                    splits[split].append({"text": text, "summary": one.summary})
    packages = [package for own in PACKAGES.values() for package in own]
    return _dataset(
        DOCSTRINGS, {split: splits[split] for split in PACKAGES}, f"docstrings of {versions(packages)}"
    )


def _dataset(name: str, splits: Mapping[str, Source], origin: str) -> Dataset:
    train = splits["train"]
    cut, notes = complete(splits, [train[i]["text"] for i in range(len(train))])
    digest = hashlib.sha256()
    for split, source in cut.items():
        for i in range(len(source)):
            digest.update(f"{split}\n{source[i]['text']}\n{source[i]['summary']}\n".encode())
    return Dataset(name, "summary", cut, (), origin, digest.hexdigest()[:16], tuple(notes))
