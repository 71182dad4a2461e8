"""The common result of all weight readers: a read-only mapping from tensor name to NumPy array that reads on access."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jtl.errors import InputError


class FormatError(InputError):
    """A weight file is truncated, corrupted, of another format, or refused."""


class Tensors(Mapping):  # not Mapping[str, ndarray]: runtime type checkers would read a tensor at every call
    """Mapping of name → array, read from its file on every access, or memory-mapped where the format allows."""

    def __init__(self, readers: Mapping[str, Callable[[], np.ndarray]]):
        self._readers = dict(readers)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._readers[name]()

    def __contains__(self, name: object) -> bool:  # Mapping's default would read the tensor
        return name in self._readers

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def required(module: str, file: Path) -> Any:
    """Import the module that reads ``file``, which is installed only with an extra of jtl.

    Raises:
        ImportError: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{file} is read with {module}, which is not installed: pip install 'jtl[formats]', or {module} alone."
        ) from error


def mapped(file: str | os.PathLike, dtype: Any, shape: tuple[int, ...], offset: int) -> np.ndarray:
    """Memory-map a read-only array at byte ``offset`` of ``file``; only the pages that are used are read from disk.

    Each call maps the file again, so the pages leave memory once no one holds the array.

    Args:
        file: the file.
        dtype: type of the elements.
        shape: shape of the array.
        offset: in bytes.

    Raises:
        FormatError: the file is shorter than the array needs.
    """
    dtype = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if not size:
        return np.zeros(shape, dtype)
    try:
        content = np.memmap(file, np.uint8, "r", offset, (size,))
    except ValueError as error:  # it was complete when it was opened
        raise FormatError(
            f"{file} has become shorter than its {offset + size} bytes: fetch it again."
        ) from error
    return np.asarray(content).view(dtype).reshape(shape)
