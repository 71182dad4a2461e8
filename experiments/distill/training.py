"""What ``experiments.distill`` trains and measures: the teacher of each seed, its students, and what both cost."""

from __future__ import annotations

import time
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from experiments.common import techniques
from experiments.common.classification import Classification, batches
from experiments.distill import methods as methods
from experiments.distill import students
from jtl import distill, measure
from jtl.data.batches.loader import Batches, loader
from jtl.model import Model
from jtl.outputs import outputs, predict
from jtl.tasks import accuracy
from jtl.train import adamw, fit, make_step, schedule

if TYPE_CHECKING:
    from experiments.distill.config import Distillation


class Trainer:
    """Trains the teacher of each seed once, and students on its outputs."""

    def __init__(
        self,
        name: str,
        task: Classification,
        student: students.Student,
        labels: int,
        config: Distillation,
        out: Path,
    ) -> None:
        self.name, self.task, self.student, self.config, self.out = name, task, student, config, out
        self.labels = labels
        self.teacher = lru_cache(1)(self._teacher)
        self.lesson = lru_cache(1)(self._lesson)

    def __call__(self, arm: str, seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The row of the teacher or of a method, and its learning curve."""
        began = time.monotonic()
        history: list[dict[str, Any]] = []
        if arm == "teacher":
            model = self.teacher(seed)
        else:
            model, history = self.taught(arm, self.lesson(seed))
        test = outputs(model, batches(self.task, "test"), ("logits", "label"))
        row = {
            **techniques.scores(test["logits"], test["label"]),
            "validation_accuracy": accuracy(*predict(model, batches(self.task, "validation"))),
            "seconds": time.monotonic() - began,
        }
        if seed == self.config.seed:  # of one seed, for the picture of calibration
            folder = self.out / "outputs"
            folder.mkdir(exist_ok=True)
            np.savez_compressed(folder / f"{self.name}_{arm}.npz", logits=test["logits"], label=test["label"])
        return row, history

    def _teacher(self, seed: int) -> Model:
        steps = self.config.teacher_steps
        budget = techniques.Budget(
            epochs=1, min_steps=steps, max_steps=steps, batch_size=self.config.batch_size
        )
        print(f"teacher of {self.task.dataset.name}, seed {seed}:")
        folder = (
            self.out / "teachers" / f"{self.task.dataset.name}_{seed}".replace("/", "_").replace(":", "_")
        )
        return techniques.run_arm(self.task, "full", seed=seed, budget=budget, out=folder, resume=True).model

    def _lesson(self, seed: int) -> methods.Trial:
        config, task, kind = self.config, self.task, self.task.dataset.kind
        teacher, key = self.teacher(seed), jax.random.key(seed)
        train = task.with_train(self.labels or None, seed).splits["train"]
        order = Batches(train, 64, train=False, buckets=task.buckets)
        logits = distill.columns(outputs(teacher, order, ("logits",)))
        start = self.student.start
        return methods.Trial(
            teacher=teacher,
            student=start(teacher, task, key),
            layers=self.student,
            second=start(teacher, task, jax.random.fold_in(key, 2)),
            train=train,
            taught=distill.Taught(train, logits),
            unlabelled=task.splits["train"],
            classes=task.classes,
            steps=config.steps if kind == "text" else config.image_steps,
            batch_size=config.batch_size,
            buckets=task.buckets,
            seed=seed,
        )

    def taught(self, method: str, lesson: methods.Trial) -> tuple[Model, list[dict[str, Any]]]:
        """The student that validated best under a method, and its learning curve."""
        recipe: methods.Recipe = getattr(methods, method)(lesson)
        step = make_step(recipe.loss, adamw(schedule(self.student.rate, lesson.steps), weight_decay=0.01))

        def validate(model: Model) -> dict[str, float]:
            return {"accuracy": accuracy(*predict(recipe.finish(model), batches(self.task, "validation")))}

        fitted = fit(
            step,
            step.init(recipe.model, jax.random.key(lesson.seed)),
            loader(recipe.batches),
            steps=lesson.steps,
            validate=validate,
            validate_every=-(-lesson.steps // (1 if self.config.quick else 4)),
        )
        return recipe.finish(fitted.model), fitted.history

    def cost(self) -> tuple[dict[str, Any], list[Any]]:
        """A row of parameters, operations, memory and time of both on one batch, and the ratio of the times."""
        task = self.task
        teacher = techniques.initial_model(task, "full", jax.random.key(0))
        student = self.student.start(teacher, task, jax.random.key(0))
        lengths = task.splits["test"].lengths
        length = next(bucket for bucket in task.buckets if bucket >= np.median(lengths))
        batch = task.splits["test"].batch(np.arange(32), length, None)
        found = {name: measure.forward(m, batch) for name, m in (("teacher", teacher), ("student", student))}
        row = {
            f"{name}_{field}": value
            for name, size in found.items()
            for field, value in size._asdict().items()
        }
        return {**row, "latency_ratio": row["teacher_seconds"] / row["student_seconds"]}, []
