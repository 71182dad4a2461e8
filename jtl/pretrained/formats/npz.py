"""NumPy ``.npz`` archives, read without pickled objects."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from jtl.pretrained.formats.tensors import FormatError, Tensors


def read_npz(file: Path) -> Tensors:
    """Return the arrays of an archive, read on access.

    Raises:
        FormatError: the file is truncated or corrupted, or an array holds Python objects (pickled code).
    """
    with _open(file) as archive:
        return Tensors({name: partial(_read, file, name) for name in archive.files})


@contextmanager
def _open(file: Path) -> Iterator[np.lib.npyio.NpzFile]:
    with open(file, "rb") as stream:  # np.load(file) leaves a damaged archive open
        try:
            archive = np.load(stream, allow_pickle=False)
        except (zipfile.BadZipFile, ValueError, EOFError) as error:
            raise FormatError(f"{file} is not a complete .npz archive: {error}") from error
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise FormatError(
                f"{file} holds one bare array; expected an .npz archive with a name for each array."
            )
        with archive:
            yield archive


def _read(file: Path, name: str) -> np.ndarray:
    with _open(file) as archive:
        try:
            return archive[name]
        except (zipfile.BadZipFile, zlib.error, ValueError, EOFError) as error:
            raise FormatError(f"{file}: array {name!r} cannot be read: {error}") from error
