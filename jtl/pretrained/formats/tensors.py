"""What every format gives: a read-only mapping from tensor name to NumPy array that reads on access."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np


class FormatError(ValueError):
    """A weight file is truncated, corrupted, of another format, or refused."""


class Tensors(Mapping):  # not Mapping[str, ndarray]: checkers of types would read a tensor at every call
    """Name → array; an array is read from its file each time it is asked for, and is the caller's own."""

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
