"""The few-shot study: runs its algorithms, summarises them and writes the report."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any, Literal

import numpy as np

from experiments.common import ResumableRows, finish, prepare
from experiments.fewshot.baselines import HEAD_STEPS
from experiments.fewshot.config import BLOCK, FewShot
from experiments.fewshot.episodes import prepare_tasks
from experiments.fewshot.methods import TABLE, Algorithm
from experiments.fewshot.training import Trainer
from jtl.errors import InputError
from jtl.report import Result, Section, estimate, format_estimate, table

ABOUT = """An N-way K-shot task shows K examples of each of N new classes and asks for the class of others. Every
algorithm sees the training classes alone. accuracy_5w1s is its mean accuracy over tasks of the test classes (5-way,
1-shot), the same tasks for all, with the interval over these tasks; several seeds show how much training itself varies.
maml, fomaml, anil and reptile meta-train an inner loop, prototypes, matching and ridge the features of a closed-form
classifier. Baselines: scratch fine-tunes the untrained network on the task; head, nearest_centroid and
baseline_plus_plus put a new linear head, class means and a new cosine head on the frozen features of a network trained
to classify all training classes."""


def run(config: FewShot) -> Result:
    """Train and test every algorithm; writes into ``config.out`` and returns the result."""
    if len(config.ways) != len(config.shots):
        raise InputError(
            f"--ways {config.ways} and --shots {config.shots} go in pairs: give as many of one as of the other"
        )
    if config.updates % BLOCK:
        raise InputError(f"--updates must be a multiple of {BLOCK}, got {config.updates}")
    out = prepare(config, "fewshot")
    rows = ResumableRows(out, resume=config.resume)
    tasks = prepare_tasks(
        config.data, config.backbone, config.adapt, width=config.width, image_size=config.image_size,
        max_length=config.max_length, seed=config.seed,
    )  # fmt: skip
    trainer = Trainer(tasks, config)
    seeds = range(config.seed, config.seed + (1 if config.quick else config.seeds))
    for seed, arm, setting in product(seeds, _algorithms(config), config.settings):
        key: dict[str, Any] = {"arm": arm, "setting": setting, "seed": seed}
        row = rows.get(partial(trainer, **key), **key)
        print(
            f"seed {seed}  {setting}  {arm}  {row['accuracy']:.3f} ± {row['ci95']:.3f} over tasks  "
            f"{row['seconds']:.0f} s"
        )

    by_task: dict[str, dict[str, list[float]]] = {}
    for row in rows.rows:
        own = by_task.setdefault(f"accuracy_{row['setting']}", {})
        own[row["arm"]] = [*own.get(row["arm"], []), *row["accuracy_by_task"]]
    rows.rows = [{name: row[name] for name in row if name != "accuracy_by_task"} for row in rows.rows]
    return finish(
        "fewshot", config, rows, _sections(rows.rows, rows.curves), title="Few-shot learning", about=ABOUT,
        summary={
            metric: {arm: estimate(found) for arm, found in arms.items()} for metric, arms in by_task.items()
        },
        notes=[
            f"Batch normalisation: {config.normalise}; running for the baselines on frozen features. transductive "
            "takes the statistics of the query batch itself, as MAML's authors do, so that a row's prediction depends "
            "on the others; support takes those of the support.",
            f"Tested on {config.test_episodes} tasks of {len(tasks.pools['test'].classes)} classes.",
        ],
        over="test tasks of all seeds",
    )  # fmt: skip


def _algorithms(config: FewShot) -> tuple[Algorithm | Literal["all"], ...]:
    if "all" not in config.algorithm:
        return tuple(dict.fromkeys(config.algorithm))
    if config.quick:
        return ("maml", "prototypes", "head", "nearest_centroid")
    return TABLE


# --- report ----------------------------------------------------------------------------------------


def _sections(rows: list[dict[str, Any]], curves: list[dict[str, Any]]) -> list[Section]:
    shown = [
        [row["setting"], row["arm"], row["seed"], format_estimate({"mean": row["accuracy"], "ci95": row["ci95"],
         "n": row["episodes"]}), row["normalise"], f"{row['seconds']:.0f}"]
        for row in rows
    ]  # fmt: skip
    head = ["setting", "algorithm", "seed", "accuracy ± 95 % over tasks", "normalisation", "seconds"]
    sections = [Section("Every run", table(head, shown))]
    if any(len(row["accuracy_by_step"]) > 1 for row in rows):
        sections.append(
            Section("Accuracy by inner steps", "Mean over test tasks, of the first seed.", _by_step(rows))
        )
    if len({row["setting"] for row in rows}) > 1:
        sections.append(Section("Accuracy by setting", "Mean over seeds and test tasks.", _by_setting(rows)))
    if curves:
        sections.append(
            Section("Meta-training", "Query accuracy in training, of the first seed.", _training(curves))
        )
    return sections


def _by_step(rows: list[dict[str, Any]]) -> Any:
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["setting"] for row in rows))
    figure = Figure(figsize=(4.4 * len(names), 4), layout="constrained")
    for axes, setting in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        own = {row["arm"]: row["accuracy_by_step"] for row in reversed(rows) if row["setting"] == setting}
        for arm, curve in own.items():
            if 1 < len(curve) < HEAD_STEPS:
                axes.plot(range(len(curve)), curve, marker="o", label=arm)
        axes.set(title=setting, xlabel="inner steps", ylabel="accuracy")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=8)
    return figure


def _by_setting(rows: list[dict[str, Any]]) -> Any:
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["setting"] for row in rows))
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for i, arm in enumerate(arms):
        means = [
            np.mean([row["accuracy"] for row in rows if (row["arm"], row["setting"]) == (arm, name)])
            for name in names
        ]
        axes.bar(np.arange(len(names)) + i / (len(arms) + 1), means, 1 / (len(arms) + 1), label=arm)
    axes.set_xticks(np.arange(len(names)) + 0.4, names)
    axes.set(ylabel="accuracy", ylim=(0, 1))
    figure.legend(loc="outside lower center", ncols=5, fontsize="small")
    return figure


def _training(curves: list[dict[str, Any]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    first = curves[0]["seed"]
    for arm, setting in dict.fromkeys((point["arm"], point["setting"]) for point in curves):
        own = [p for p in curves if (p["arm"], p["setting"], p["seed"]) == (arm, setting, first)]
        axes.plot([p["step"] for p in own], [p["accuracy"] for p in own], label=f"{arm} {setting}")
    axes.set(xlabel="update", ylabel="accuracy")
    axes.legend(ncols=2, fontsize="x-small")
    return figure
