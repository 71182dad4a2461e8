"""The distillation study: runs its arms, summarises them and writes the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common import ResumableRows, finish, prepare
from experiments.common.classification import prepare_classification
from experiments.distill import students
from experiments.distill.config import SETTINGS, Distillation, Pair
from experiments.distill.methods import METHODS, ONLY_IMAGE, ONLY_MAPS
from experiments.distill.training import Trainer
from jtl.errors import InputError
from jtl.report import Result, Section, figures, format_estimate, paired_difference, summarise, table

ABOUT = """A pretrained model is fine-tuned and becomes the teacher. Students start from some of its layers, or from
random weights, and train for as many updates under each method; student_alone learns from the labels only: what
distillation has to beat. Kept is a student's test accuracy over its teacher's. Teachers learn from all training labels.
So do students, but in text_few and image, where they see 256 labelled examples; transfer_set and function_matching then
use the others without their labels. Latencies are of one batch of 32, teacher and student in turn."""
TIMINGS = 5  # pairs of latencies, each a median
MEASURES = ("accuracy", "kept", "calibration_error")


def run(config: Distillation) -> Result:
    """Train teachers and students; writes into ``config.out`` and returns the result."""
    sizes = shortened(config) if config.quick else config
    chosen: dict[str, Pair] = {name: SETTINGS[name] for name in sizes.setting}
    if config.model and config.data and config.student:
        chosen = {"own": Pair(config.model, config.data, config.student)}
    elif config.model or config.data or config.student:
        raise InputError("--model, --data and --student go together: name all three, or none and a --setting")
    out = prepare(config, "distill")
    rows = ResumableRows(out, resume=config.resume)
    of: dict[str, list[dict[str, Any]]] = {}
    costs: dict[str, list[dict[str, Any]]] = {}
    for setting, pair in chosen.items():
        task = prepare_classification(
            pair.model, pair.data, max_length=sizes.max_length,
            image_size=sizes.image_size if pair.model == "efficientnet-lite0" else None,
            validation=100 if sizes.quick else 500, test=sizes.test_examples or None, quick=sizes.quick,
        )  # fmt: skip
        labels = pair.labels if sizes.labels is None else sizes.labels
        trainer = Trainer(task, students.choose(pair.student, task), labels, sizes, out)
        every = ("teacher", *wanted(sizes, trainer))
        before = len(rows.rows)
        for seed, arm in product(range(sizes.seed, sizes.seed + sizes.seeds), every):
            key: dict[str, Any] = {"setting": setting, "arm": arm, "seed": seed}
            row = rows.get(partial(trainer, **key), **key)
            print(f"{setting}  seed {seed}  {arm}  {row['accuracy']:.3f}  {row['seconds']:.0f} s")
        of[setting] = rows.rows[before:]
        timed: list[dict[str, Any]] = [
            {"setting": setting, "arm": "cost", "seed": number}
            for number in range(1 if sizes.quick else TIMINGS)
        ]
        costs[setting] = [rows.get(partial(trainer, **key), **key) for key in timed]
    summary = {
        f"{name}_{setting}": summarise(_kept(own), [name])[name]
        for setting, own in of.items()
        for name in MEASURES
    }
    ratios = [{**row, "arm": s} for s, own in costs.items() for row in own]
    sections = _trade_offs(chosen, of, costs)
    for name, own in of.items():
        sections += _sections(name, own, costs[name], rows.curves, out)
    return finish(
        "distill", config, rows, sections, title="Knowledge distillation", about=ABOUT,
        summary=summary | summarise(ratios, ["latency_ratio"]),
    )  # fmt: skip


def shortened(config: Distillation) -> Distillation:
    """The settings of ``--quick``."""
    method = ("soft_targets", "hint") if "all" in config.method else config.method
    return replace(
        config, method=method, teacher_steps=20, steps=15, image_steps=15, batch_size=16,
        labels=128, max_length=32, test_examples=200, seeds=1,
    )  # type: ignore[arg-type]  # fmt: skip


def wanted(config: Distillation, trainer: Trainer) -> list[str]:
    """The methods to run, ``student_alone`` first. Raises ValueError for one named that this student cannot take."""
    chosen = METHODS if "all" in config.method else config.method
    unfit = set() if trainer.task.dataset.kind == "image" else set(ONLY_IMAGE)
    unfit |= set() if trainer.student.maps else set(ONLY_MAPS)
    if refused := unfit & set(config.method):
        raise InputError(
            f"--method {' '.join(sorted(refused))}: {' and '.join(ONLY_IMAGE)} need images, "
            f"{', '.join(ONLY_MAPS)} a student with layers like its teacher's"
        )
    return ["student_alone", *(m for m in chosen if m != "student_alone" and m not in unfit)]


# --- report ----------------------------------------------------------------------------------------


def _kept(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with each student's accuracy over that of its teacher."""
    taught = {row["seed"]: row["accuracy"] for row in rows if row["arm"] == "teacher"}
    return [{**row, "kept": row["accuracy"] / taught[row["seed"]]} for row in rows]


def _median(costs: list[dict[str, Any]]) -> dict[str, float]:
    return {name: float(np.median([row[name] for row in costs])) for name in costs[0] if "_" in name}


def _best(rows: list[dict[str, Any]]) -> str:
    """The student's method of the highest mean accuracy."""
    found = summarise(rows, ["accuracy"])["accuracy"]
    return max((arm for arm in found if arm != "teacher"), key=lambda arm: found[arm]["mean"])


def _trade_offs(chosen: Mapping[str, Pair], rows: Any, costs: Any) -> list[Section]:
    """Accuracy against latency and size, a picture for each data set: its teacher, and its students' best methods."""
    sections = []
    for data in dict.fromkeys(pair.data for pair in chosen.values()):
        points = []
        for setting in (name for name, pair in chosen.items() if pair.data == data):
            cost, best = _median(costs[setting]), _best(rows[setting])
            names = {"teacher": "teacher", "student_alone": f"{setting}: alone", best: f"{setting}: {best}"}
            for row in rows[setting]:
                who = "teacher" if row["arm"] == "teacher" else "student"
                if row["arm"] in names:
                    size = {"latency": 1e3 * cost[f"{who}_seconds"], "parameters": cost[f"{who}_parameters"]}
                    points.append({**row, "arm": names[row["arm"]], **size})
        picture = figures.trade_off(
            points, "accuracy", {"latency": "latency (ms)", "parameters": "parameters"}
        )
        sections.append(Section(f"{data}: accuracy against cost", "Up and to the left is better.", picture))
    return sections


def _sections(
    setting: str,
    rows: list[dict[str, Any]],
    costs: list[dict[str, Any]],
    curves: list[dict[str, Any]],
    out: Path,
) -> list[Section]:
    rows = _kept(rows)
    found = summarise(rows, [*MEASURES, "seconds"])
    order = sorted(found["accuracy"], key=lambda arm: -found["accuracy"][arm]["mean"])
    lines = []
    for arm in order:
        plain = arm in ("teacher", "student_alone")
        less = "" if plain else format_estimate(paired_difference(rows, "accuracy", arm, "student_alone"))
        lines.append(
            [arm, format_estimate(found["accuracy"][arm]), less, format_estimate(found["kept"][arm]),
             format_estimate(found["calibration_error"][arm]), f"{found['seconds'][arm]['mean']:.0f}"]
        )  # fmt: skip
    head = ["method", "accuracy", "less student_alone", "of the teacher's", "calibration error", "seconds"]
    cost = _median(costs)
    sizes = [
        [who, f"{cost[f'{who}_parameters']:,.0f}", f"{cost[f'{who}_flops'] / 1e9:.3g}",
         f"{cost[f'{who}_bytes'] / 1e6:.1f}", f"{1e3 * cost[f'{who}_seconds']:.1f}"]
        for who in ("teacher", "student")
    ]  # fmt: skip
    shown = dict.fromkeys(["teacher", "student_alone", _best(rows)])
    sections = [
        Section(f"{setting}: test accuracy", table(head, lines)),
        Section(
            f"{setting}: size",
            f"One forward of 32 examples; the student is {cost['latency_ratio']:.2f} times as fast.\n\n"
            + table(["", "parameters", "GFLOP", "MB", "ms"], sizes),
        ),
    ]
    if few := [row for row in curves if row["setting"] == setting and row["arm"] in shown]:
        sections.append(Section(f"{setting}: learning curves", "", figures.learning_curves(few)))
    files = {arm: out / "outputs" / f"{setting}_{arm}.npz" for arm in shown}
    stored = {arm: np.load(file) for arm, file in files.items() if file.exists()}
    if stored:
        sections.append(
            Section(
                f"{setting}: calibration",
                "Accuracy of the test examples of which a model is as sure, of the first seed; on the diagonal a "
                "model knows how often it is right.",
                figures.reliability({arm: (f["logits"], f["label"]) for arm, f in stored.items()}),
            )
        )
    return sections
