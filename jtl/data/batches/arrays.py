"""Arrays in memory, such as cached features, as a split to cut batches from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from jtl.errors import InputError


@dataclass(frozen=True, eq=False)
class Arrays:
    """Arrays of N rows each, as returned by ``jtl.outputs.outputs``, for ``jtl.data.loader.Batches``.

    Raises:
        ValueError: arrays differ in their number of rows.

    Attributes:
        arrays: by the name of the field in a batch.

    >>> rows = Arrays({"features": np.eye(3), "label": np.arange(3)})
    >>> rows.batch(np.array([2, 0]))["label"]
    array([2, 0])
    """

    arrays: dict[str, np.ndarray]

    def __post_init__(self) -> None:
        counts = {name: len(array) for name, array in self.arrays.items()}
        if len(set(counts.values())) != 1:
            raise InputError(f"arrays must have one number of rows, found {counts}")

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    @property
    def lengths(self) -> Int[np.ndarray, " N"]:
        """All equal: arrays have one shape."""
        return np.ones(len(self), np.int64)

    @property
    def buckets(self) -> tuple[int, ...]:
        """A single length."""
        return (1,)

    def batch(
        self, indices: Int[np.ndarray, " B"], length: int = 1, draws: Any = None
    ) -> dict[str, np.ndarray]:
        """Returns the rows at ``indices``."""
        return {name: array[indices] for name, array in self.arrays.items()}
