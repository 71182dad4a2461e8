"""What a step of distillation costs beside its parts: operations of compiled programs, which are exact.

``flops_over_minimum`` of a method is its train step over the student's own step (``student_alone``), plus one forward
of the teacher where it runs live (up to the deepest layer that the method reads). 1 is nothing but the parts: one
forward of the teacher for all terms, no gradient through it. ``stored`` methods read its logits from memory.

    python -m experiments.benchmarks.distill --out runs/bench_distill

Expected (``experiments/results/bench_distill.json``, 81 seconds on two CPU cores): 1.000 for stored logits, 1.000 to
1.041 for live teachers.

No step is run, so it takes as long as the compilations, on any machine. Losses between layers also cost their own
products, such as a regressor's or those of ``review_kd``'s fusion (1.278 with 64 channels and the finest level, 1.038
with 24 and without it): they are real work above the parts.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from experiments.common import techniques
from experiments.common.classification import prepare_classification
from experiments.common.command_line import main
from experiments.common.settings import Config, command, prepare, settings
from experiments.distill import methods as methods
from experiments.distill import students
from jtl import distill
from jtl.report.report import Result, Section, environment, summarise, table, write_report, write_result
from jtl.train import adamw, make_step

SETTINGS = {
    "text": ("minilm", "rotten_tomatoes", "layers_3"),
    "image": ("efficientnet-lite0", "mnist5k", "conv4"),
}
SKIPPED = ("student_alone", "mutual", "ema_teacher")  # the first is the measure, the others have no teacher


@dataclass(frozen=True, kw_only=True)
class BenchDistill(Config):
    """Settings of the benchmark."""

    batch_size: int = 32
    """Examples of a step."""
    max_length: int = 48
    """Longest text in tokens."""
    image_size: int = 64
    """Side of the images in pixels."""


def run(config: BenchDistill) -> Result:
    """Compile the steps and compare; writes into ``config.out`` and returns the result."""
    out, began = prepare(config, "bench_distill"), time.monotonic()
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
        lesson = methods.Trial(
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
        alone = _flops(methods.student_alone(lesson))
        unfit = (*SKIPPED, *(methods.ONLY_IMAGE if setting == "text" else ()))
        for method in [m for m in methods.METHODS if m not in unfit][: 2 if config.quick else None]:
            recipe = getattr(methods, method)(lesson)
            forward = _forward(recipe, lesson)
            row = {"setting": setting, "method": method, "arm": f"{setting}_{method}", "seed": config.seed,
                   "step": _flops(recipe), "student_step": alone, "teacher_forward": forward}  # fmt: skip
            rows.append(row | {"flops_over_minimum": row["step"] / (alone + forward)})
            print(f"{setting}  {method}  {rows[-1]['flops_over_minimum']:.4f}")
    result = Result(
        "bench_distill",
        settings(config),
        environment(),
        time.monotonic() - began,
        rows,
        summarise(rows, ["flops_over_minimum"]),
    )
    write_result(out, result)
    lines = [
        [r["setting"], r["method"], "live" if r["teacher_forward"] else "stored", f"{r['step'] / 1e9:.2f}",
         f"{r['student_step'] / 1e9:.2f}", f"{r['teacher_forward'] / 1e9:.2f}", f"{r['flops_over_minimum']:.4f}"]
        for r in rows
    ]  # fmt: skip
    head = ["setting", "method", "teacher", "step", "student alone", "teacher's forward", "over minimum"]
    write_report(
        out,
        result,
        title="What a step of distillation costs",
        about=" ".join(__doc__.split("\n\n")[1].split()),
        command=command("benchmarks.distill", config),
        sections=[Section("GFLOP of a step", table(head, lines))],
    )
    return result


def _flops(recipe: methods.Recipe) -> float:
    step = make_step(recipe.loss, adamw(1e-3))
    return float(step.lower(recipe.model, recipe.batches[0]).compile().cost_analysis()["flops"])


def _forward(recipe: methods.Recipe, lesson: methods.Trial) -> float:
    """Operations of the teacher's forward up to what the loss reads of it; 0 if that is stored."""
    if not isinstance(recipe.loss, distill.Distill):
        return 0.0
    fill = jax.jit(lambda teacher, batch: distill.Distill(teacher, recipe.loss.loss).fill(teacher, batch))
    return float(fill.lower(lesson.teacher, recipe.batches[0]).compile().cost_analysis()["flops"])


if __name__ == "__main__":
    main(run, BenchDistill)
