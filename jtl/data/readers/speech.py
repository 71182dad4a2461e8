"""Speech with transcripts, for speech recognition: your own recordings, or a public set of TensorFlow Datasets."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, SupportsIndex

import numpy as np

from jtl.data.dataset import (
    ALIASES,
    DataError,
    Dataset,
    Example,
    Source,
    by_split,
    complete,
)
from jtl.data.readers import sound
from jtl.data.readers.tables import TABLES, read_columns
from jtl.data.readers.tfds import TfdsSource, as_dataset, find_builder, open_sources, standard_splits

TABLE = "metadata"


class Transcribed(Source, Protocol):
    """Utterances whose transcripts are known without reading any sound."""

    @property
    def texts(self) -> tuple[str, ...]:
        """The transcript of every example."""
        ...


@dataclass(frozen=True, eq=False)
class Recordings:
    """Sound files and their transcripts, read on access."""

    files: tuple[Path, ...]
    texts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: SupportsIndex, /) -> Example:
        """Returns ``audio``, resampled to 16 kHz, ``text`` and ``file``."""
        i = range(len(self))[index]
        rate, samples = sound.read_any(self.files[i])
        samples = samples if rate == sound.RATE else sound.resample(samples, rate)
        return {"audio": samples, "text": self.texts[i], "file": os.fspath(self.files[i])}


def own(path: Path, text_column: str = "text") -> Dataset:
    """Loads your own recordings with transcripts.

    ``path`` is a folder with WAV files and a table ``metadata.csv`` (or ``.tsv``, ``.jsonl``) with the columns
    ``file_name``, relative to the folder, and ``text``: the layout of Hugging Face's AudioFolder; or a folder with such
    folders ``train`` and optionally ``validation`` and ``test``.

    An example has ``audio``, float32 (N,) at 16 kHz in [-1, 1], ``text``, and ``file``, the path of the recording.

    Missing splits are cut from train by hash of the transcript.

    Args:
        path: the folder.
        text_column: the column of the transcripts.

    Raises:
        DataError: another layout, a file that does not exist, or an empty split.
    """
    if not path.is_dir():
        raise DataError(f"{path}: expected a folder with {TABLE}.csv and the WAV files that it names")
    folders = [entry for entry in sorted(path.iterdir()) if entry.is_dir() and entry.name in ALIASES]
    split_folders = by_split(path, folders) if folders else {"train": path}
    splits = {split: read_recordings(folder, text_column) for split, folder in split_folders.items()}
    return dataset(str(path), splits, f"your files at {path}")


def read_recordings(folder: Path, text_column: str = "text") -> Recordings:
    """Reads the recordings named in a folder's table.

    Raises:
        DataError: there is no table or more than one, or a file does not exist.
    """
    tables = [folder / f"{TABLE}{end}" for end in TABLES if (folder / f"{TABLE}{end}").is_file()]
    if len(tables) != 1:
        raise DataError(
            f"{folder}: expected one table, {TABLE}.csv, with the columns file_name and {text_column}, found "
            f"{[table.name for table in tables] or 'none'}"
        )
    rows = read_columns(tables[0], {"file_name": "file_name", "text": text_column})
    files = tuple(folder / rows[i]["file_name"] for i in range(len(rows)))
    if absent := [file for file in files if not file.is_file()]:
        raise DataError(f"{tables[0]}: names {len(absent)} files that are not there, such as {absent[0]}")
    return Recordings(files, tuple(rows[i]["text"] for i in range(len(rows))))


def dataset(name: str, splits: Mapping[str, Transcribed], origin: str) -> Dataset:
    """Returns a data set of speech from its splits; missing ones are cut from train by hash of the transcript."""
    whole, notes = complete(dict(splits), splits["train"].texts)
    said = "".join(f"{split}\n" + "\n".join(source.texts) for split, source in splits.items())
    version = hashlib.sha256(said.encode()).hexdigest()[:16]
    return Dataset(name, "speech", whole, (), origin, version, tuple(notes))


# LibriSpeech's names of its splits.
CLEAN = {"train_clean100": "train", "dev_clean": "validation", "test_clean": "test"}


def public(name: str, text_column: str | None = None) -> Dataset:
    """Loads a public set of speech; this needs TensorFlow.

    The set must have a column of sound with a known sample rate, and a column of transcripts. LibriSpeech's splits
    ``train_clean100``, ``dev_clean`` and ``test_clean`` become train, validation and test.

    An example has ``audio``, float32 (N,) at 16 kHz in [-1, 1], and ``text``.

    Missing splits are cut from train by hash of the position.

    Args:
        name: ``"tfds:NAME"`` or ``"tfds:NAME/CONFIG"``.
        text_column: the column of the transcripts; by default ``text``.

    Raises:
        DataError: an unknown set, one that cannot be prepared, or one without such columns.
        ConnectionError: the set has to be downloaded and there is no network.
    """
    import tensorflow_datasets as tfds

    builder = find_builder(name)
    features = builder.info.features
    sounds = [key for key in features if isinstance(features[key], tfds.features.Audio)]
    text = text_column or "text"
    if not sounds or text not in features:
        raise DataError(
            f"{name}: expected a column of sound and a column {text!r}, it has {', '.join(features)}. Choose the "
            "transcripts with --text-column"
        )
    rate = features[sounds[0]].sample_rate
    if rate is None:
        raise DataError(f"{name}: its column {sounds[0]!r} does not say how many samples it has a second")
    opened = open_sources(name, builder, ((sounds[0], "audio"), (text, "text")))
    named = {split: CLEAN.get(split, split) for split in opened}
    sources = {named[split]: Heard(source, rate) for split, source in opened.items()}
    splits, notes = standard_splits(name, sources)
    return as_dataset(name, builder, "speech", splits, notes)


@dataclass(frozen=True, eq=False)
class Heard:
    """Rows with 16-bit sound, as examples of ``public``."""

    source: TfdsSource
    rate: int

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: SupportsIndex, /) -> Example:
        row = self.source[index]
        samples = np.asarray(row["audio"], np.float32) / 2**15
        samples = samples if self.rate == sound.RATE else sound.resample(samples, self.rate)
        return {"audio": samples, "text": row["text"]}
