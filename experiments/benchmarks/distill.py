"""Operations of a distillation step, relative to the student's own step plus one forward of the teacher.

``flops_over_minimum`` of a method is its train step over the student's own step (``student_alone``) plus one forward of
the teacher where it runs live, up to the deepest layer that the method reads. 1 is nothing but the parts. No step is
run, so it takes as long as the compilations, on any machine.

    python -m experiments.benchmarks.distill --out runs/bench_distill
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from experiments.common import Config, at_least, finish, main, prepare, techniques
from experiments.common.classification import prepare_classification
from experiments.common.recipe import Recipe
from experiments.distill import students
from experiments.distill.methods import METHODS, ONLY_IMAGE, Trial
from jtl import distill, measure
from jtl.report import Result, Section, summarise, table
from jtl.train import adamw, make_step

ABOUT = """Flops over minimum of a method is its train step over the student's own step (student_alone), plus one
forward of the teacher where it runs live (up to the deepest layer that the method reads), in operations of compiled
programs, which are exact. 1 is nothing but the parts: one forward of the teacher for all terms, no gradient through it.
Stored methods read its logits from memory. Losses between layers also cost their own products, such as a regressor's or
those of review_kd's fusion: they are real work above the parts."""
SETTINGS = {
    "text": ("minilm", "rotten_tomatoes", "layers_3"),
    "image": ("efficientnet-lite0", "mnist5k", "conv4"),
}
SKIPPED = ("student_alone", "mutual", "ema_teacher")  # the first is the measure, the others have no teacher


@dataclass(frozen=True, kw_only=True)
class BenchDistill(Config):
    """Settings of the benchmark."""

    batch_size: int = at_least(1, 32)
    """Examples of a step."""
    max_length: int = at_least(1, 48)
    """Longest text in tokens."""
    image_size: int = at_least(1, 64)
    """Side of the images in pixels."""


def run(config: BenchDistill) -> Result:
    """Compile the steps and compare; writes into ``config.out`` and returns the result."""
    prepare(config, "bench_distill")
    began = time.monotonic()
    rows: list[dict[str, Any]] = []
    for setting, (model, data, student) in SETTINGS.items():
        size = config.image_size if setting == "image" else None
        task = prepare_classification(
            model, data, max_length=config.max_length, image_size=size, validation=64, test=64
        )
        teacher = techniques.initial_model(task, "full", jax.random.key(0))
        layers = students.choose(student, task)
        train = task.splits["train"].take(np.arange(256))
        logits = np.zeros((len(train), task.classes), np.float32)
        trial = Trial(
            teacher=teacher,
            student=layers.start(teacher, task, jax.random.key(0)),
            layers=layers,
            second=layers.start(teacher, task, jax.random.key(1)),
            train=train,
            taught=distill.Taught(train, {"teacher_logits": logits}),
            unlabelled=train,
            classes=task.classes,
            steps=8,
            batch_size=config.batch_size,
            buckets=(task.buckets[-1],),
            seed=0,
        )
        alone = _step(METHODS["student_alone"](trial))
        unfit = (*SKIPPED, *(ONLY_IMAGE if setting == "text" else ()))
        for method in [m for m in METHODS if m not in unfit][: 2 if config.quick else None]:
            recipe = METHODS[method](trial)
            own, forward = _step(recipe), _teacher_forward(recipe, trial)
            rows.append(
                {"setting": setting, "method": method, "arm": f"{setting}_{method}", "seed": config.seed, "step": own,
                 "student_step": alone, "teacher_forward": forward, "flops_over_minimum": own / (alone + forward)}
            )  # fmt: skip
            print(f"{setting}  {method}  {rows[-1]['flops_over_minimum']:.4f}")
    lines = [
        [r["setting"], r["method"], "live" if r["teacher_forward"] else "stored", f"{r['step'] / 1e9:.2f}",
         f"{r['student_step'] / 1e9:.2f}", f"{r['teacher_forward'] / 1e9:.2f}", f"{r['flops_over_minimum']:.4f}"]
        for r in rows
    ]  # fmt: skip
    head = ["setting", "method", "teacher", "step", "student alone", "teacher's forward", "over minimum"]
    return finish(
        "bench_distill", config, rows, [Section("GFLOP of a step", table(head, lines))],
        title="What a step of distillation costs", about=ABOUT, summary=summarise(rows, ["flops_over_minimum"]),
        seconds=time.monotonic() - began,
    )  # fmt: skip


def _step(recipe: Recipe) -> float:
    """Operations of a train step."""
    return measure.flops(make_step(recipe.loss, adamw(1e-3)).lower(recipe.model, recipe.batches[0]).compile())


def _teacher_forward(recipe: Recipe, trial: Trial) -> float:
    """Operations of the teacher's forward up to what the loss reads of it; 0 if that is stored."""
    loss = recipe.loss
    if not isinstance(loss, distill.Distill):
        return 0.0
    fill = jax.jit(lambda teacher, batch: distill.Distill(teacher, loss.loss).fill(teacher, batch))
    return measure.flops(fill.lower(trial.teacher, recipe.batches[0]).compile())


if __name__ == "__main__":
    main(run, BenchDistill)
