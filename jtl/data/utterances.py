"""Speech with transcripts: synthesised in an accent, your own folder, or public sets.

An example has ``audio``, float32 (N,) at 16 kHz in [-1, 1], and ``text``.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import SupportsIndex

from jtl.data import audio
from jtl.data.dataset import DataError, Dataset, Example, complete
from jtl.data.files import ALIASES, TABLES, by_split, read_columns
from jtl.data.spoken import ACCENT, Spoken, accented

SCOTTISH = "scottish"
TABLE = "metadata"


@dataclass(frozen=True, eq=False)
class Recordings:
    """Sound files and their transcripts, read when asked for."""

    files: tuple[Path, ...]
    texts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: SupportsIndex, /) -> Example:
        """``audio``, resampled to 16 kHz, ``text`` and ``file``."""
        i = range(len(self))[index]
        rate, samples = audio.read_any(self.files[i])
        samples = samples if rate == audio.RATE else audio.resample(samples, rate)
        return {"audio": samples, "text": self.texts[i], "file": os.fspath(self.files[i])}


def load_utterances(name: str | os.PathLike = SCOTTISH, *, text_column: str | None = None) -> Dataset:
    """The utterances called ``name``.

    * ``"scottish"``: film reviews in the accent that eSpeak makes of Scotland's (``jtl.data.spoken``);
    * a folder with WAV files and a table ``metadata.csv`` (``.tsv``, ``.jsonl``) with the columns ``file_name``,
      relative to the folder, and ``text``: the layout of Hugging Face's AudioFolder; or a folder with such a folder
      for ``train`` and perhaps ``validation`` and ``test``. Missing splits are cut from train by hash of the text;
    * ``"tfds:NAME"``, a public set of TensorFlow Datasets with sound and text, such as ``tfds:librispeech``; for
      sound that library needs TensorFlow installed.

    Args:
        name: which.
        text_column: the column of the transcripts.

    Raises:
        DataError: an unknown name, another layout, a file that is not there, an empty split.
        FileNotFoundError: a path that does not exist.
    """
    name = os.fspath(name)
    if name == SCOTTISH:
        return _dataset(name, accented(), f"eSpeak NG's {ACCENT}, with sentences of Rotten Tomatoes")
    if name.startswith("tfds:"):
        from jtl.data import tfds

        return tfds.utterances(name, text_column)
    path = Path(name).expanduser()
    if not path.exists():
        if len(path.parts) > 1:
            raise FileNotFoundError(f"no recordings at {path}")
        raise DataError(
            f"unknown utterances {name!r}: expected {SCOTTISH}, tfds:NAME, or a folder of WAV files"
        )
    if not path.is_dir():
        raise DataError(f"{path}: expected a folder with {TABLE}.csv and the WAV files that it names")
    folders = [entry for entry in sorted(path.iterdir()) if entry.is_dir() and entry.name in ALIASES]
    split_folders = by_split(path, folders) if folders else {"train": path}
    splits = {
        split: read_recordings(folder, text_column or "text") for split, folder in split_folders.items()
    }
    return _dataset(name, splits, f"your files at {path}")


def read_recordings(folder: Path, text_column: str = "text") -> Recordings:
    """The recordings that the table of a folder names. Raises DataError if the table or a file is not there."""
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


def _dataset(name: str, splits: Mapping[str, Recordings | Spoken], origin: str) -> Dataset:
    whole, notes = complete(dict(splits), splits["train"].texts)
    said = "".join(f"{split}\n" + "\n".join(source.texts) for split, source in splits.items())
    version = hashlib.sha256(said.encode()).hexdigest()[:16]
    return Dataset(name, "speech", whole, (), origin, version, tuple(notes))
