"""Trains the teacher of each seed and its students, and measures what both cost."""

from __future__ import annotations

import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.common import techniques
from experiments.common.classification import Classification, batches, score
from experiments.common.recipe import train
from experiments.distill.config import Distillation
from experiments.distill.methods import METHODS, Method, Trial
from experiments.distill.students import Student
from jtl import distill, measure
from jtl.data.batches.loader import Batches
from jtl.model import Model
from jtl.outputs import outputs
from jtl.train import Fitted

Curve = list[dict[str, Any]]


class Trainer:
    """Trains the teacher of each seed once, and students on its outputs.

    Args:
        task: the pretrained model and the data.
        student: how students are made.
        labels: labelled training examples of the students; 0 for all.
        config: settings.
        out: folder of the run.
    """

    def __init__(
        self, task: Classification, student: Student, labels: int, config: Distillation, out: Path
    ) -> None:
        self.task, self.student, self.labels, self.config, self.out = task, student, labels, config, out
        self.teacher = lru_cache(1)(self._teacher)
        self.trial = lru_cache(1)(self._trial)

    def __call__(self, *, setting: str, arm: Any, seed: int) -> tuple[dict[str, Any], Curve]:
        """The row of the teacher, of a method or of their ``cost``, and the learning curve."""
        if arm == "cost":
            return self.cost(), []
        began, history = time.monotonic(), []
        if arm == "teacher":
            model = self.teacher(seed)
        else:
            fitted = self.trained(arm, self.trial(seed))
            model, history = fitted.model, fitted.history
        test = outputs(model, batches(self.task, "test"), ("logits", "label"))
        row = {
            **techniques.scores(test["logits"], test["label"]),
            "validation_accuracy": score(model, self.task),
            "seconds": time.monotonic() - began,
        }
        if seed == self.config.seed:  # of one seed, for the picture of calibration
            folder = self.out / "outputs"
            folder.mkdir(exist_ok=True)
            np.savez_compressed(folder / f"{setting}_{arm}.npz", logits=test["logits"], label=test["label"])
        return row, history

    def _teacher(self, seed: int) -> Model:
        steps, name = self.config.teacher_steps, self.task.dataset.name
        budget = techniques.Budget(
            epochs=1, min_steps=steps, max_steps=steps, batch_size=self.config.batch_size
        )
        print(f"teacher of {name}, seed {seed}:")
        folder = self.out / "teachers" / f"{name}_{seed}".replace("/", "_").replace(":", "_")
        return techniques.run_arm(self.task, "full", seed=seed, budget=budget, out=folder, resume=True).model

    def _trial(self, seed: int) -> Trial:
        config, task, start = self.config, self.task, self.student.start
        teacher, key = self.teacher(seed), jax.random.key(seed)
        labelled = task.with_train(self.labels or None, seed).splits["train"]
        order = Batches(labelled, 64, train=False, buckets=task.buckets)
        return Trial(
            teacher=teacher,
            student=start(teacher, task, key),
            layers=self.student,
            second=start(teacher, task, jax.random.fold_in(key, 2)),
            train=labelled,
            taught=distill.Taught(labelled, distill.columns(outputs(teacher, order, ("logits",)))),
            unlabelled=task.splits["train"],
            classes=task.classes,
            steps=config.steps if task.dataset.kind == "text" else config.image_steps,
            batch_size=config.batch_size,
            buckets=task.buckets,
            seed=seed,
        )

    def trained(self, method: Method, trial: Trial) -> Fitted:
        """The student that validated best under a method."""
        return train(
            METHODS[method](trial), steps=trial.steps, rate=self.student.rate, seed=trial.seed,
            validate=lambda model: {"accuracy": score(model, self.task)},
            validate_every=-(-trial.steps // (1 if self.config.quick else 4)),
        )  # fmt: skip

    def cost(self) -> dict[str, Any]:
        """Parameters, operations, memory and time of both on one batch, and the ratio of the times."""
        task = self.task
        teacher = techniques.initial_model(task, "full", jax.random.key(0))
        student = self.student.start(teacher, task, jax.random.key(0))
        lengths = task.splits["test"].lengths
        length = next(bucket for bucket in task.buckets if bucket >= np.median(lengths))
        batch = task.splits["test"].batch(np.arange(32), length, None)
        row: dict[str, Any] = {}
        for name, model in (("teacher", teacher), ("student", student)):
            found = measure.forward(model, batch)._asdict()
            row |= {f"{name}_{field}": value for field, value in found.items()}
        return {**row, "latency_ratio": row["teacher_seconds"] / row["student_seconds"]}
