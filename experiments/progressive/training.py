"""Training the methods of continual learning, and measuring them after every task."""

from __future__ import annotations

import time
from typing import Any

import jax
import numpy as np
import optax

from experiments.progressive import methods as methods
from experiments.progressive.config import POINTS, Progressive
from experiments.progressive.task_sequences import TaskSequence
from experiments.progressive.trial import Recipe, Trial
from jtl import finetune, progressive, tree
from jtl.data import Arrays
from jtl.data.batches.loader import Batches
from jtl.model import Model
from jtl.outputs import predict
from jtl.tasks import accuracy
from jtl.train import Step, fit, make_step

# --- training --------------------------------------------------------------------------------------


class Trainer:
    """Trains the methods, whose steps share their compiled programs over tasks and seeds."""

    def __init__(self, config: Progressive) -> None:
        self.config = config
        self.steps = 60 if config.quick else config.steps
        self.optimizer = optax.adam(config.learning_rate)
        self._made: dict[Any, Step] = {}

    def __call__(self, name: str, setting: Trial) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The row of a method on a sequence, and its learning curves."""
        began = time.monotonic()
        tasks = setting.tasks
        method = methods.METHODS[name](setting)
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
        learning, curve, done = method.learn(task), [], 0
        trained: Model | None = None
        while True:
            try:
                recipe = learning.send(trained)
            except StopIteration:
                return curve
            if not curve:
                curve.append(
                    {"step": 0, "validation_accuracy": self.score(recipe.model, tasks, task, "validation")}
                )
            trained, history, state = self.train(recipe, tasks, task)
            if recipe.tracked:
                method.state = state
            curve += [{**point, "step": point["step"] + done} for point in history]
            done += history[-1]["step"]

    def train(
        self, recipe: Recipe, tasks: TaskSequence, task: int
    ) -> tuple[Model, list[dict[str, Any]], Any]:
        """The model after the last update of a recipe, the learning curve, and the optimiser's state."""
        steps = round(recipe.share * self.steps)
        step = self._step(recipe)
        state = step.init(recipe.model, jax.random.key(0))
        fitted = fit(
            step, state, recipe.batches, steps=steps, validate_every=max(1, self.steps // POINTS), progress=False,
            validate=lambda model: {"accuracy": self.score(model, tasks, task, "validation")},
        )  # fmt: skip
        return fitted.state.model, [dict(row) for row in fitted.history], fitted.state.opt_state

    def _step(self, recipe: Recipe) -> Step:
        if recipe.tracked:
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
