"""Distillation from stored teacher outputs: computed once, and attached to the rows of a split.

``Taught(split, columns(jtl.outputs.outputs(teacher, Batches(split, 64, train=False), ("logits",))))``: losses on its
batches need no ``Distill``, and a step costs as much as a step of the student alone. For a large vocabulary store
``top_k`` of the logits (``TopKSequenceKD``).
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
    """``count`` fixed augmented views of each example: row ``v · N + i`` is view v of example i.

    The augmentation of a row depends only on ``seed`` and the row, so a teacher's outputs on it can be stored. Each
    epoch over ``Views`` shows a student every view once, exactly as the teacher saw it, which Beyer et al. 2022,
    "Knowledge distillation: A good teacher is patient and consistent", https://arxiv.org/abs/2106.05237, find
    necessary. Without augmentation, as with texts, all views are the same.

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
        """The lengths of the examples, view by view."""
        return np.tile(self.split.lengths, self.count)

    @property
    def buckets(self) -> tuple[int, ...]:
        """The buckets of the split."""
        return self.split.buckets

    def batch(self, indices: Int[np.ndarray, " B"], length: int, draws: Any = None) -> dict[str, np.ndarray]:
        """Returns the rows at ``indices``; the loader's own ``draws`` are ignored."""
        drawn: Float[np.ndarray, "B 3"] = np.stack(
            [np.random.default_rng((self.seed, int(row))).random(3) for row in indices]
        )
        return self.split.batch(np.asarray(indices) % len(self.split), length, drawn)


@dataclass(frozen=True, eq=False)
class Taught:
    """A split whose batches include the teacher's outputs, as fields that the losses read without a teacher.

    Raises:
        ValueError: an array has another number of rows.

    Attributes:
        split: of N examples; if it augments, wrap it in ``Views``, or the teacher would have seen other inputs.
        arrays: N rows each, by the field's name: ``teacher_logits``, ``teacher/NAME``.
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
        """The lengths of the split."""
        return self.split.lengths

    @property
    def buckets(self) -> tuple[int, ...]:
        """The buckets of the split."""
        return self.split.buckets

    def batch(self, indices: Int[np.ndarray, " B"], length: int, draws: Any = None) -> dict[str, np.ndarray]:
        """Returns the rows at ``indices`` with the teacher's outputs."""
        stored = {name: array[indices] for name, array in self.arrays.items()}
        return {**self.split.batch(indices, length, draws), **stored}
