"""Batches that include remembered examples: experience replay, and the batches of A-GEM.

Replaying a few stored examples of earlier tasks with each batch: Chaudhry et al. 2019, "On Tiny Episodic Memories in
Continual Learning", https://arxiv.org/abs/1902.10486.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, SupportsIndex

import numpy as np

from jtl.data.batches.loader import Encoded, Steps
from jtl.errors import InputError


@dataclass(frozen=True)
class Rehearse:
    """``batches`` with ``rows`` examples of ``memory`` added to each batch, resampled at every step.

    Attributes:
        batches: of the current task.
        memory: the remembered examples, with the same fields and one padded length.
        rows: how many are added to a batch; drawn without replacement if the memory has that many.
        seed: of the draws.
        apart: return ``{"current": ..., "memory": ...}`` for ``agem`` instead of one batch of all rows.
    """

    batches: Steps
    memory: Encoded
    rows: int
    seed: int = 0
    apart: bool = False

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[step] for step in range(len(self)))

    def __getitem__(self, step: SupportsIndex, /) -> dict[str, Any]:
        step = operator.index(step)
        current = self.batches[step]
        rng = np.random.default_rng((self.seed, step))
        chosen = rng.choice(len(self.memory), self.rows, replace=len(self.memory) < self.rows)
        old = self.memory.batch(chosen, self.memory.buckets[-1], None)
        old = old | {"weight": np.ones(self.rows, np.float32), "index": chosen.astype(np.int32)}
        if current.keys() != old.keys():
            raise InputError(
                f"a batch has the fields {sorted(current)}, the memory {sorted(old)}: remember the same fields"
            )
        if self.apart:
            return {"current": current, "memory": old}
        return {name: np.concatenate([values, old[name]]) for name, values in current.items()}
