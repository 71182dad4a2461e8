"""``Trial``: the tasks, model and settings with which every method of ``progressive`` begins."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field

import jax
import numpy as np
from jaxtyping import Array

from experiments.common.recipe import Recipe
from experiments.progressive.task_sequences import TaskSequence
from jtl import continual, finetune, heads
from jtl.data import Arrays, subset_indices
from jtl.data.batches.loader import Batches
from jtl.model import Batch, Model

MEMORY = 20  # remembered examples of each class and task, and rows of them in a batch


@dataclass(frozen=True)
class Tracked(Recipe):
    """A recipe whose training also sums up the path integral of synaptic intelligence.

    Attributes:
        penalty: that of the tasks before, if there is one.
    """

    penalty: finetune.SI | None = None


@dataclass(frozen=True)
class Trial:
    """What every method starts with, for one seed.

    Attributes:
        tasks: the sequence.
        steps: updates for each task.
        batch_size: rows of an update.
        seed: of new leaves and of the order of examples.
        ewc_strength: λ of EWC.
    """

    tasks: TaskSequence
    steps: int
    batch_size: int
    seed: int
    ewc_strength: float
    _columns: dict[int, Model] = field(default_factory=dict, repr=False, compare=False)

    def key(self, *numbers: int) -> Array:
        """A key for what is drawn."""
        key = jax.random.key(self.seed)
        for number in numbers:
            key = jax.random.fold_in(key, number)
        return key

    @property
    def example(self) -> Batch:
        """A smallest batch."""
        return self.tasks.splits[0]["train"].batch(np.array([0]))

    def column(self, task: int) -> Model:
        """A network for one task alone; that of task 0 is what single networks start from."""
        if task not in self._columns:
            key, t = self.key(task), self.tasks
            drawn = heads.classifier(t.body(key), t.classes, key=key, on="features", width=t.width)
            self._columns[task] = drawn
        return self._columns[task]

    def network(self, *, known: bool = False) -> Model:
        """One network for all tasks: with one head if they share their classes and ``known`` is off."""
        t, key = self.tasks, self.key(0)
        if t.shared and not known:
            return self.column(0)
        return continual.task_heads(
            t.body(key), len(t.names), t.classes, key=key, on="features", width=t.width
        )

    def batches(self, task: int, share: float = 1.0, part: int = 0) -> Batches:
        """The training batches of a task, for a share of its updates."""
        return self.cut(self.tasks.splits[task]["train"], round(share * self.steps), task + 100 * part)

    def cut(self, rows: Arrays, steps: int, order: int) -> Batches:
        """``steps`` batches of ``rows``."""
        return Batches(rows, min(self.batch_size, len(rows)), seed=self.seed + 1000 * order, steps=steps)

    def remembered(self, task: int) -> Arrays:
        """A few training examples of a task, as many of each class."""
        rows = self.tasks.splits[task]["train"]
        count = min(MEMORY * self.tasks.classes, len(rows))
        few = subset_indices(rows.arrays["label"], count, self.seed)
        return Arrays({name: values[few] for name, values in rows.arrays.items()})


Learning = Generator[Recipe, Model, None]


def together(parts: list[Arrays]) -> Arrays:
    """The rows of all parts."""
    return Arrays({name: np.concatenate([p.arrays[name] for p in parts]) for name in parts[0].arrays})
