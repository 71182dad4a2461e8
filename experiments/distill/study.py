"""Knowledge distillation: what each method gives a smaller student, and what the student costs.

A pretrained model is fine-tuned and becomes the teacher; students start from some of its layers, or from random
weights, and train for as many updates under each method. ``student_alone`` learns from the labels only: what
distillation has to beat. *Kept* is a student's test accuracy over its teacher's. Latencies are of one batch of 32,
teacher and student in turn.

    python -m experiments.distill --setting text --out runs/distill

Expected (``experiments/results/distill.json``, three seeds, about 80 minutes of one core that other work shared, so
``seconds`` are rough): ``teacher`` 0.826 ± 0.015, ``student_alone`` 0.798 ± 0.014, ``dist`` 0.803 ± 0.004, which keeps
97.1 % of the teacher's accuracy, ``soft_targets`` 0.801 ± 0.008; no method is shown to beat ``student_alone``. The
student of three layers is 1.99 ± 0.03 times as fast.

    python -m experiments.distill --setting text_1_layer newsgroups --method soft_targets dist

Expected (joined into the same file, three seeds, 79 minutes of one shared core): ``text_1_layer``, 5.9 ± 0.3 times as
fast as its teacher, ``student_alone`` 0.744 ± 0.025, above it ``soft_targets`` by 0.015 ± 0.005 and ``dist`` by 0.015 ±
0.030; ``newsgroups`` (posts cut to 48 tokens) ``teacher`` 0.748 ± 0.010, ``student_alone`` 0.676 ± 0.003, less it
``soft_targets`` -0.007 ± 0.032, ``dist`` 0.012 ± 0.024.

    python -m experiments.distill --setting image --method soft_targets dist hint rkd transfer_set function_matching

Expected (joined into the same file, three seeds, 18 minutes of one shared core): ``teacher`` 0.980 ±
0.010, ``student_alone`` 0.941 ± 0.007; above it are ``transfer_set`` by 0.029 ± 0.010 and ``function_matching`` by
0.021 ± 0.011; below it ``soft_targets`` by 0.020 ± 0.010. With ``--setting text_few --method soft_targets
transfer_set`` (12 minutes): ``student_alone`` 0.751 ± 0.005, ``soft_targets`` above it by 0.024 ± 0.007,
``transfer_set`` by 0.050 ± 0.007; the teacher 0.826 ± 0.015.

Settings: ``text`` and ``text_1_layer`` (MiniLM of six layers on Rotten Tomatoes to three and to one), ``newsgroups``
and ``newsgroups_1_layer`` (on 20 Newsgroups), ``image`` (EfficientNet-Lite0 on digits to a network of four
convolutions), ``born_again`` (MiniLM to itself); or your own ``--model``, ``--data`` and ``--student``. Teachers learn
from all training labels. So do students, but in ``text_few`` and ``image``, where they see 256 labelled examples, as
when a teacher came from elsewhere; ``transfer_set`` and ``function_matching`` then use the others without labels.
Teachers' logits are computed once and stored.

The methods are those of ``jtl.distill``, where their papers are named; ``experiments/distill/methods.py`` has weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common.classification import prepare_classification
from experiments.common.resumable_rows import ResumableRows
from experiments.common.settings import command, prepare, settings
from experiments.distill import methods as methods
from experiments.distill import students
from experiments.distill.config import SETTINGS, Distillation, Pair
from experiments.distill.training import Trainer
from jtl.errors import InputError
from jtl.report import figures
from jtl.report.report import (
    Result,
    Section,
    environment,
    format_estimate,
    paired_difference,
    summarise,
    table,
    write_report,
    write_result,
)

TIMINGS = 5  # pairs of latencies, each a median
MEASURES = ("accuracy", "kept", "calibration_error")


def run(config: Distillation) -> Result:
    """Train teachers and students; writes into ``config.out`` and returns the result."""
    own = (config.model, config.data, config.student)
    if any(own) and not all(own):
        raise InputError("--model, --data and --student go together: name all three, or none and a --setting")
    out = prepare(config, "distill")
    ledger = ResumableRows(out, resume=config.resume)
    sizes = shortened(config) if config.quick else config
    chosen = {"own": Pair(*map(str, own))} if all(own) else {name: SETTINGS[name] for name in sizes.setting}
    rows: dict[str, list[dict[str, Any]]] = {}
    costs: dict[str, list[dict[str, Any]]] = {}
    for setting, pair in chosen.items():
        task = prepare_classification(
            pair.model, pair.data, max_length=sizes.max_length,
            image_size=sizes.image_size if pair.model == "efficientnet-lite0" else None,
            validation=100 if sizes.quick else 500, test=sizes.test_examples or None, quick=sizes.quick,
        )  # fmt: skip
        labels = pair.labels if sizes.labels is None else sizes.labels
        school = Trainer(setting, task, students.choose(pair.student, task), labels, sizes, out)
        before = len(ledger.rows)
        every = ("teacher", *wanted(sizes, school))
        for seed, arm in product(range(sizes.seed, sizes.seed + sizes.seeds), every):
            row = ledger.get(partial(school, arm, seed), setting=setting, arm=arm, seed=seed)
            print(f"{setting}  seed {seed}  {arm}  {row['accuracy']:.3f}  {row['seconds']:.0f} s")
        rows[setting] = ledger.rows[before:]
        costs[setting] = [
            ledger.get(school.cost, setting=setting, arm="cost", seed=number)
            for number in range(1 if sizes.quick else TIMINGS)
        ]
    summary = {
        f"{name}_{setting}": summarise(_kept(own_rows), [name])[name]
        for setting, own_rows in rows.items()
        for name in MEASURES
    }
    ratios = [{**row, "arm": s} for s, own_rows in costs.items() for row in own_rows]
    summary |= summarise(ratios, ["latency_ratio"])
    result = Result("distill", settings(config), environment(), ledger.seconds, ledger.rows, summary)
    write_result(out, result)
    write_report(
        out,
        result,
        title="Knowledge distillation",
        about=" ".join(__doc__.split("\n\n")[1].split()),
        command=command("distill", config),
        sections=[
            *_trade_offs(chosen, rows, costs),
            *(s for name in rows for s in _sections(name, rows[name], costs[name], ledger.curves, out)),
        ],
    )
    return result


def shortened(config: Distillation) -> Distillation:
    """The settings of ``--quick``."""
    method = ("soft_targets", "hint") if "all" in config.method else config.method
    return replace(
        config, method=method, teacher_steps=20, steps=15, image_steps=15, batch_size=16,
        labels=128, max_length=32, test_examples=200, seeds=1,
    )  # type: ignore[arg-type]  # fmt: skip


def wanted(config: Distillation, school: Trainer) -> list[str]:
    """The methods to run, ``student_alone`` first. Raises ValueError for one named that this student cannot take."""
    chosen = methods.METHODS if "all" in config.method else config.method
    unfit = set() if school.task.dataset.kind == "image" else set(methods.ONLY_IMAGE)
    unfit |= set() if school.student.maps else set(methods.ONLY_MAPS)
    if refused := unfit & set(config.method):
        raise InputError(
            f"--method {' '.join(sorted(refused))}: {' and '.join(methods.ONLY_IMAGE)} need images, "
            f"{', '.join(methods.ONLY_MAPS)} a student with layers like its teacher's"
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
