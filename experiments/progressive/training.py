"""Training the methods of continual learning, and measuring them after every task."""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Any

import jax
import numpy as np
import optax

from experiments.common.recipe import Recipe
from experiments.progressive.config import POINTS, Progressive
from experiments.progressive.methods import METHODS, Method
from experiments.progressive.task_sequences import LIMITS, TaskSequence, prepare_tasks
from experiments.progressive.trial import Tracked, Trial
from jtl import finetune, progressive, tree
from jtl.data import Arrays
from jtl.data.batches.loader import Batches
from jtl.model import Model
from jtl.outputs import predict
from jtl.tasks import accuracy
from jtl.train import Step, TrainState, fit, make_step


class Trainer:
    """Trains the methods, whose steps share their compiled programs over tasks and seeds."""

    def __init__(self, config: Progressive) -> None:
        self.config = config
        self.steps = 60 if config.quick else config.steps
        self.optimizer = optax.adam(config.learning_rate)
        self._made: dict[Any, Step] = {}

        self.trial = lru_cache(1)(self._trial)

    def _trial(self, sequence: str, seed: int) -> Trial:
        config = self.config
        tasks = prepare_tasks(
            sequence, hidden=config.hidden, tasks=3 if config.quick else config.tasks,
            train=500 if config.quick else config.train_examples, seed=seed,
            limits=dict.fromkeys(LIMITS, 200) if config.quick else LIMITS, own=config.data,
        )  # fmt: skip
        return Trial(tasks, self.steps, config.batch_size, seed, config.ewc_strength)

    def __call__(
        self, *, sequence: str, arm: Method, seed: int
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The row of a method on a sequence, and its learning curves."""
        return self.row(arm, self.trial(sequence, seed))

    def row(self, name: Method, trial: Trial) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The row of a method, and its learning curves."""
        began = time.monotonic()
        tasks, method = trial.tasks, METHODS[name](trial)
        count = len(tasks.names)
        untrained = [self.score(method.view(j), tasks, j) for j in range(count)]
        found = np.full((count, count), np.nan)
        parameters: list[int] = []
        curves: list[dict[str, Any]] = []
        for i in range(count):
            curve = self.learn(method, i, tasks)
            curves += [{**point, "task": tasks.names[i]} for point in curve]
            found[i] = [self.score(method.view(j), tasks, j) for j in range(count)]
            parameters.append(method.parameters)
        row: dict[str, Any] = {
            "average_accuracy": progressive.average_accuracy(found),
            "accuracy": found,
            "untrained": untrained,
            "parameters": parameters,
            "areas": [_area(curves, task) for task in tasks.names],
            "chance": 1 / tasks.classes,
            "tasks": list(tasks.names),
        }
        if name != "joint":  # which learns all at once
            row["bwt"] = progressive.backward_transfer(found)
            row["fwt"] = progressive.forward_transfer(found, np.array(untrained))
        if name.startswith("progressive"):
            rows = tasks.splits[-1]["validation"]
            few = rows.batch(np.arange(min(100, len(rows))))
            sensitivity = progressive.fisher_sensitivity(method.view(count - 1), [few])
            row["sensitivity"] = {block: shares.tolist() for block, shares in sensitivity.items()}
        return {**row, "seconds": time.monotonic() - began}, curves

    def learn(self, method: Any, task: int, tasks: TaskSequence) -> list[dict[str, Any]]:
        """Let a method learn a task; returns the learning curve on it, from before the first update."""
        learning, done = method.learn(task), 0
        curve: list[dict[str, Any]] = []
        trained: Model | None = None
        while True:
            try:
                recipe = learning.send(trained)
            except StopIteration:
                return curve
            if not curve:
                before = self.score(recipe.model, tasks, task, "validation")
                curve.append({"step": 0, "validation_accuracy": before})
            state, history = self.train(recipe, tasks, task)
            trained = state.model
            if isinstance(recipe, Tracked):
                method.state = state.opt_state
            curve += [{**point, "step": point["step"] + done} for point in history]
            done += len(recipe.batches)

    def train(
        self, recipe: Recipe, tasks: TaskSequence, task: int
    ) -> tuple[TrainState, list[dict[str, Any]]]:
        """The state after the last update of a recipe, and the learning curve on a task."""
        step, steps = self._step(recipe), len(recipe.batches)
        fitted = fit(
            step, step.init(recipe.model, jax.random.key(0)), (recipe.batches[i] for i in range(steps)), steps=steps,
            validate_every=max(1, self.steps // POINTS), progress=False,
            validate=lambda model: {"accuracy": self.score(model, tasks, task, "validation")},
        )  # fmt: skip
        return fitted.state, [dict(row) for row in fitted.history]

    def _step(self, recipe: Recipe) -> Step:
        if isinstance(recipe, Tracked):
            return make_step(recipe.loss, finetune.track(self.optimizer, recipe.penalty), recipe.labels)
        labels = None if recipe.labels is None else tuple(tree.flatten(recipe.labels).items())
        key = (jax.tree.structure(recipe.loss), labels, recipe.gradient)
        if key not in self._made:
            self._made[key] = make_step(recipe.loss, self.optimizer, recipe.labels, gradient=recipe.gradient)
        return self._made[key].with_loss(recipe.loss)

    def score(self, model: Model, tasks: TaskSequence, task: int, split: str = "test") -> float:
        """Accuracy on a split of a task."""
        rows: Arrays = tasks.splits[task][split]
        return accuracy(*predict(model, Batches(rows, min(500, len(rows)), train=False)))


def _area(curves: list[dict[str, Any]], task: str) -> float | None:
    points = [p for p in curves if p["task"] == task and "validation_accuracy" in p]
    if len(points) < 2:
        return None
    return progressive.area([p["step"] for p in points], [p["validation_accuracy"] for p in points])
