"""A grid of learning rates and seeds, trained side by side in one program."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import techniques
from experiments.common.classification import Classification
from jtl.data.batches.loader import Batches, loader
from jtl.model import Model
from jtl.train import Step, TrainState, run_of, sweep
from jtl.train.progress import Display


@dataclass(frozen=True)
class Grid:
    """Runs of one technique on the same batches, which differ in peak rate and seed.

    Attributes:
        task: with its training examples already chosen.
        technique: what trains.
        runs: ``(rate, seed)`` of each.
        steps: updates of each.
        batch_size: examples an update.
        order_seed: of the order of the examples.
    """

    task: Classification
    technique: str
    runs: tuple[tuple[float, int], ...]
    steps: int
    batch_size: int
    order_seed: int

    @cached_property
    def batches(self) -> Batches:
        """The updates' batches."""
        train, buckets = self.task.splits["train"], self.task.buckets
        return Batches(train, self.batch_size, seed=self.order_seed, steps=self.steps, buckets=buckets)

    def start(self, index: int) -> tuple[Model, Step, jax.Array]:
        """A run's model before its first step, its step and its key."""
        rate, seed = self.runs[index]
        init_key, run_key = jax.random.split(jax.random.key(seed))
        model = techniques.initial_model(self.task, self.technique, init_key)
        budget = techniques.Budget(batch_size=self.batch_size)
        step = techniques.build_step(self.task, self.technique, model, self.steps, rate, budget)
        return model, step, run_key

    def together(self) -> tuple[list[Model], float]:
        """The trained models, all in one program, and the seconds that took, with its compilation."""
        models, (step, *_), keys = zip(*map(self.start, range(len(self.runs))), strict=True)
        runs, began = sweep(step), time.monotonic()
        state = runs.init(models, jnp.stack(keys), [rate for rate, _ in self.runs])
        state = self._train(runs, state, f"{len(self.runs)} runs in one program")
        seconds = time.monotonic() - began
        return [run_of(state, i).model for i in range(len(self.runs))], seconds

    def alone(self, index: int) -> tuple[Model, dict[str, float]]:
        """One trained model by itself, and the seconds of its compilation and of its training."""
        model, step, key = self.start(index)
        shapes = {
            tuple(field.shape for field in self.batches[number].values()): number
            for number in range(self.steps)
        }
        began = time.monotonic()
        state = step.init(model, key)
        for number in shapes.values():
            state, _ = step(state, self.batches[number])
        jax.block_until_ready(state)
        compiled = time.monotonic()
        state = self._train(step, step.init(model, key), f"run {index + 1} of {len(self.runs)}, alone")
        return state.model, {"compilation": compiled - began, "training": time.monotonic() - compiled}

    def _train(self, step: Any, state: TrainState, title: str) -> TrainState:
        print(title)
        with Display(0, self.steps, True) as display:
            for number, batch in zip(range(1, self.steps + 1), loader(self.batches), strict=False):
                state, metrics = step(state, batch)
                display.update(number, float(np.mean(metrics["loss"])), number * self.batch_size)
        return jax.block_until_ready(state)


def best_rate(runs: Sequence[tuple[float, int]], validated: Sequence[float]) -> float:
    """The rate with the highest mean over its seeds."""
    values: dict[float, list[float]] = {}
    for (rate, _), value in zip(runs, validated, strict=True):
        values.setdefault(rate, []).append(value)
    return max(values, key=lambda rate: float(np.mean(values[rate])))
