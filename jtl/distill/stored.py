"""Teachers computed once: their outputs stored beside the rows of a split, for views of the rows that match.

``Taught(split, columns(jtl.outputs.outputs(teacher, Batches(split, 64, train=False), ("logits",))))``: losses
on its batches need no ``Distill``, and a step costs what a step of the student alone costs. For a large vocabulary
store ``top_k`` of the logits (``TopKSequenceKD``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jtl.data.batches.loader import Encoded
from jtl.errors import InputError


@dataclass(frozen=True, eq=False)
class Views:
    """``count`` fixed views of each example: row ``v · N + i`` is example i as view v draws it.

    The augmentation of a row depends on ``seed`` and the row alone, so a teacher's outputs on it can be stored: each
    epoch over ``Views`` shows a student every view once, as the teacher saw it (Beyer et al. 2022, arXiv:2106.05237,
    find that it must). Without augmentation, as with texts, all views are alike.

    Attributes:
        split: of N examples, with its augmentation.
        count: views of each.
        seed: of the views.
    """

    split: Encoded
    count: int
    seed: int = 0

    def __len__(self) -> int:
        return self.count * len(self.split)

    @property
    def lengths(self) -> Int[np.ndarray, " M"]:
        """Those of the examples, view by view."""
        return np.tile(self.split.lengths, self.count)

    @property
    def buckets(self) -> tuple[int, ...]:
        """Those of the split."""
        return self.split.buckets

    def batch(self, indices: Int[np.ndarray, " B"], length: int, draws: Any = None) -> dict[str, np.ndarray]:
        """The rows at ``indices``; the loader's own ``draws`` change nothing."""
        drawn: Float[np.ndarray, "B 3"] = np.stack(
            [np.random.default_rng((self.seed, int(row))).random(3) for row in indices]
        )
        return self.split.batch(np.asarray(indices) % len(self.split), length, drawn)


@dataclass(frozen=True, eq=False)
class Taught:
    """A split whose batches bring the teacher's outputs with them: fields that the losses read without a teacher.

    Attributes:
        split: of N examples; one that augments needs ``Views``, or the teacher would have seen something else.
        arrays: N rows each, by the field's name: ``teacher_logits``, ``teacher/NAME``.

    Raises ValueError if an array has another number of rows.
    """

    split: Encoded
    arrays: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        for name, array in self.arrays.items():
            if len(array) != len(self.split):
                raise InputError(
                    f"{name!r} holds the teacher's outputs for {len(array)} rows, the split has {len(self.split)}: "
                    "store them from this very split"
                )

    def __len__(self) -> int:
        return len(self.split)

    @property
    def lengths(self) -> Int[np.ndarray, " N"]:
        """Those of the split."""
        return self.split.lengths

    @property
    def buckets(self) -> tuple[int, ...]:
        """Those of the split."""
        return self.split.buckets

    def batch(self, indices: Int[np.ndarray, " B"], length: int, draws: Any = None) -> dict[str, np.ndarray]:
        """The rows at ``indices`` with the teacher's."""
        stored = {name: array[indices] for name, array in self.arrays.items()}
        return {**self.split.batch(indices, length, draws), **stored}
