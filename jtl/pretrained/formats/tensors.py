"""What every format gives: a read-only mapping from tensor name to NumPy array that reads on access."""

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


class Tensors(Mapping):  # not Mapping[str, ndarray]: checkers of types would read a tensor at every call
    """Name → array, which is read from its file each time it is asked for, or ``mapped`` where the file is plain."""

    def __init__(self, readers: Mapping[str, Callable[[], np.ndarray]]):
        self._readers = dict(readers)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._readers[name]()

    def __contains__(self, name: object) -> bool:  # the default of Mapping would read the tensor
        return name in self._readers

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def required(module: str, file: Path) -> Any:
    """The module that reads a file of this kind, which is not installed with jtl unless its extra is asked for."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{file} is read with {module}, which is not installed: pip install 'jtl[formats]', or {module} alone."
        ) from error


def mapped(file: str | os.PathLike, dtype: Any, shape: tuple[int, ...], offset: int) -> np.ndarray:
    """The array that lies in ``file`` from byte ``offset`` on, read-only; only what is looked at is read from the disk.

    Each call maps the file anew: once nobody holds the array, what was read of it leaves the memory.

    Raises FormatError if the file ends before.
    """
    dtype = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if not size:
        return np.zeros(shape, dtype)
    try:
        content = np.memmap(file, np.uint8, "r", offset, (size,))
    except ValueError as error:  # it was whole when it was opened
        raise FormatError(
            f"{file} has become shorter than its {offset + size} bytes: fetch it again."
        ) from error
    return np.asarray(content).view(dtype).reshape(shape)
