"""Progressive networks beside the usual methods of continual learning: what is kept, what is gained, what it costs.

A sequence of tasks is learned one after the other, with the same number of updates, batch size and optimiser (Adam,
constant rate) for every method and task. After each task, test accuracy on every task fills the matrix R[i, j].
``bwt`` (backward transfer) is below 0 where earlier tasks were forgotten, ``fwt`` is what was known of a task before it
was learned, and ``transfer_score`` the area under the validation curve over that of a network of the task's own
(``separate``, of the same start), both less chance, the mean over tasks after the first: above 1 is transfer. For
methods with leaves of each task's own (``separate``, the ``progressive`` ones, ``head``, ``packnet``, ``lora``) the
task of a test row is known. In ``split_mnist`` and ``newsgroups`` all methods know it; in the others the rest have one
head for all tasks and do not. Strengths of EWC and SI were set in trials on validation examples with other seeds.

    python -m experiments.progressive --out runs/progressive

Expected (``experiments/results/progressive.json``, three seeds, half an hour of one shared core; runs of single
sequences were joined, that of ``newsgroups`` with ``--method progressive head full``): progressive networks forget
exactly nothing, and laterals help on ``digits`` (transfer score 1.037 ± 0.009) and ``rotated_mnist`` (1.018 ± 0.008),
where laterals of untrained columns hardly do (1.004 ± 0.003 and 1.002 ± 0.003). They change nothing on ``split_mnist``,
whose tasks are learned in a few updates (1.001 ± 0.001), ``permuted_mnist``, whose pixels share nothing (1.000 ±
0.002), and ``newsgroups`` (1.000 ± 0.004), where a transformer learns from new embeddings each topic: ``progressive``
0.766 ± 0.005, ``separate`` 0.765 ± 0.008, ``full`` 0.595 ± 0.020. Average accuracies on ``rotated_mnist``:
``progressive`` 0.947 ± 0.002, ``separate`` 0.941 ± 0.006, ``lora`` 0.919 ± 0.007, ``packnet`` 0.912 ± 0.009, ``replay``
0.894 ± 0.020, ``full`` 0.668 ± 0.039.

    python -m experiments.progressive --sequence permuted_mnist --hidden 1000 1000 --method full joint ewc \\
        --ewc-strength 300 --out runs/progressive_ewc

On the network of the literature, two layers of 1,000 units, EWC keeps what it learns, as it must with the Fisher
information of single examples (``experiments/results/progressive_ewc.json``, ten permutations of 5,000 digits, three
seeds, 8 minutes of one shared core): average accuracy 0.909 ± 0.006 and ``bwt`` -0.022 ± 0.009, 97 % of ``joint``'s
0.933 ± 0.013, where ``full`` has 0.642 ± 0.013; the literature has 0.94 and 0.98 on all 60,000 (van de Ven and Tolias
2019, https://arxiv.org/abs/1904.07734). With 256 units, the default, it has 0.808 ± 0.022 at a strength of 30.

Sequences: ``permuted_mnist`` and ``rotated_mnist`` (Goodfellow et al. 2013, https://arxiv.org/abs/1312.6211; Lopez-Paz
and Ranzato 2017, https://arxiv.org/abs/1706.08840), ``split_mnist`` (Zenke et al. 2017,
https://arxiv.org/abs/1703.04200), all of 5,000 digits of MNIST, ``digits`` (those, then a hundred each of other
writers and of type), ``newsgroups`` (four topics of 20 Newsgroups for a small transformer), or ``--data`` with image
sets of your own, ``tfds:`` ones among them, a task each. Progressive networks: Rusu et al. 2016,
https://arxiv.org/abs/1606.04671.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from experiments.common.resumable_rows import ResumableRows
from experiments.common.settings import command, prepare, settings
from experiments.progressive import methods as methods
from experiments.progressive.config import POINTS, Progressive
from experiments.progressive.task_sequences import LIMITS, prepare_tasks
from experiments.progressive.training import Trainer
from experiments.progressive.trial import Trial
from jtl.errors import InputError
from jtl.report import figures
from jtl.report.report import (
    Result,
    Section,
    environment,
    estimate,
    format_estimate,
    summarise,
    table,
    write_report,
    write_result,
)

METRICS = ("average_accuracy", "bwt", "fwt", "transfer_score")
FEW = ("separate", "progressive", "head", "full")  # by --quick
SHOWN = ("progressive", "full", "ewc", "replay", "packnet", "head")  # matrices in the report


def run(config: Progressive) -> Result:
    """Learn every sequence by every method; writes into ``config.out`` and returns the result."""
    _check(config)
    out = prepare(config, "progressive")
    ledger = ResumableRows(out, resume=config.resume)
    names: tuple[str, ...] = ("own",) if config.data else config.sequence
    names = names[-2:] if config.quick and not config.data else names
    trainer = Trainer(config)
    for name in names:
        for seed in range(config.seed, config.seed + (1 if config.quick else config.seeds)):
            tasks = prepare_tasks(
                name, hidden=config.hidden, tasks=3 if config.quick else config.tasks,
                train=500 if config.quick else config.train_examples, seed=seed,
                limits=dict.fromkeys(LIMITS, 200) if config.quick else LIMITS, own=config.data,
            )  # fmt: skip
            setting = Trial(tasks, trainer.steps, config.batch_size, seed, config.ewc_strength)
            for method in _methods(config):
                row = ledger.get(partial(trainer, method, setting), sequence=name, arm=method, seed=seed)
                found = "  ".join(f"{m} {row[m]:.3f}" for m in METRICS if row.get(m) is not None)
                print(f"{name}  seed {seed}  {method}  {found}  {row['seconds']:.0f} s")

    rows = [_scored(row, ledger.rows) for row in ledger.rows]
    summary = {}
    for name in names:
        own = [row for row in rows if row["sequence"] == name]
        there = [metric for metric in METRICS if any(metric in row for row in own)]
        summary |= {f"{metric}_{name}": found for metric, found in summarise(own, there).items()}
    result = Result("progressive", settings(config), environment(), ledger.seconds, rows, summary)
    write_result(out, result)
    write_report(
        out,
        result,
        title="Progressive networks",
        about=" ".join(__doc__.split("\n\n")[1].split()),
        command=command("progressive", config),
        sections=[section for name in names for section in _sections(name, rows, ledger.curves)],
    )
    return result


def _check(config: Progressive) -> None:
    for name, least in (("tasks", 2), ("steps", POINTS), ("batch_size", 1)):
        if getattr(config, name) < least:
            raise InputError(
                f"--{name.replace('_', '-')} must be at least {least}, got {getattr(config, name)}"
            )
    if len(config.data) == 1:
        raise InputError("--data needs two data sets or more, a task each")


def _methods(config: Progressive) -> list[str]:
    wanted: tuple[str, ...] = config.method
    if "all" in wanted:
        wanted = FEW if config.quick else methods.NAMES
    return ["separate", *(m for m in wanted if m != "separate")]


def _scored(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row with its transfer scores, against the separate networks of the same seed."""
    (alone,) = [
        r
        for r in rows
        if r["arm"] == "separate" and (r["sequence"], r["seed"]) == (row["sequence"], row["seed"])
    ]
    if row["arm"] == "joint":
        return row
    chance = row["chance"]
    scores = [
        (own - chance) / (base - chance) for own, base in zip(row["areas"], alone["areas"], strict=True)
    ]
    return {**row, "scores": scores, "transfer_score": float(np.mean(scores[1:]))}


# --- report ----------------------------------------------------------------------------------------


def _sections(name: str, rows: list[dict[str, Any]], curves: list[dict[str, Any]]) -> list[Section]:
    rows = [row for row in rows if row["sequence"] == name]
    curves = [point for point in curves if point["sequence"] == name]
    tasks = rows[0]["tasks"]
    of = {
        arm: [row for row in rows if row["arm"] == arm] for arm in dict.fromkeys(row["arm"] for row in rows)
    }
    sections = [_where_laterals_help(name, of, tasks)]
    if "progressive" in of:
        score = {
            t: np.mean([row["scores"][i] for row in of["progressive"]]) for i, t in enumerate(tasks) if i
        }
        best = max(score, key=score.__getitem__)
        both = [
            p
            for p in curves
            if p["task"] == best and p["arm"] in ("progressive", "separate", "progressive_random")
        ]
        sections.append(
            Section(
                f"{name}: with and without laterals",
                f"On {best}, the task of the largest transfer score.",
                figures.learning_curves(both),
            )
        )
        shares = {
            block: np.mean([row["sensitivity"][block] for row in of["progressive"]], 0)
            for block in of["progressive"][0]["sensitivity"]
        }
        sections.append(
            Section(
                f"{name}: sensitivity",
                "Average Fisher sensitivity of the last task: the share of each column in each layer, named after the "
                "block that reads it; the mean over seeds.",
                figures.heatmaps(
                    {"": np.array(list(shares.values()))},
                    list(shares),
                    tasks,
                    "share",
                    "column, by its task",
                    "layer",
                ),  # fmt: skip
            )
        )
    panels = {arm: np.mean([row["accuracy"] for row in of[arm]], 0) for arm in SHOWN if arm in of}
    sections.append(
        Section(
            f"{name}: accuracy of every task after every task",
            "The mean over seeds.",
            figures.heatmaps(panels, tasks, tasks, "test accuracy", "tested on", "after learning"),
        )
    )
    grown = [
        {"arm": row["arm"], "seed": row["seed"], "tasks": i + 1, "parameters": count / 1e6}
        for row in rows
        if row["arm"] in ("separate", "progressive", "progressive_linear", "full", "packnet", "lora")
        for i, count in enumerate(row["parameters"])
    ]
    sections.append(
        Section(
            f"{name}: parameters",
            "What is kept to answer all tasks learned so far; masks and remembered examples do not count.",
            figures.over_tasks(grown, "parameters", "parameters (millions)"),
        )
    )
    return sections


def _where_laterals_help(name: str, of: dict[str, list[dict[str, Any]]], tasks: list[str]) -> Section:
    lines = []
    for arm in (arm for arm in of if arm.startswith("progressive")):
        for place, task in [*enumerate(tasks[1:], 1), (None, "mean")]:
            own = estimate(
                row["transfer_score"] if place is None else row["scores"][place] for row in of[arm]
            )
            low, high = (own["mean"] + sign * (own["ci95"] or np.inf) for sign in (-1, 1))
            verdict = "help" if low > 1 else "hurt" if high < 1 else "undecided"
            lines.append([arm, task, format_estimate(own), verdict])
    return Section(
        f"{name}: where laterals help",
        table(["method", "task", "transfer score", "laterals"], lines)
        if lines
        else "No progressive network ran.",
    )
