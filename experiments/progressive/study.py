"""The study of progressive networks: runs its methods, summarises them and writes the report."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from experiments.common import ResumableRows, finish, prepare
from experiments.progressive.config import Progressive
from experiments.progressive.methods import METHODS
from experiments.progressive.training import Trainer
from jtl.errors import InputError
from jtl.report import Result, Section, estimate, figures, format_estimate, summarise, table

ABOUT = """A sequence of tasks is learned one after the other, with the same number of updates, batch size and optimiser
(Adam, constant rate) for every method and task. After each task, test accuracy on every task fills the matrix R[i, j].
bwt (backward transfer) is below 0 where earlier tasks were forgotten, fwt (forward transfer) is what was known of a
task before it was learned, and transfer_score is the area under the validation curve over that of a network of the
task's own (separate, of the same start), both less chance, the mean over tasks after the first: above 1 is transfer.
For methods with leaves of each task's own (separate, the progressive ones, head, packnet, lora) the task of a test row
is known. In split_mnist and newsgroups all methods know it; in the others the rest have one head for all tasks and do
not. Strengths of EWC and SI were set in trials on validation examples with other seeds."""
METRICS = ("average_accuracy", "bwt", "fwt", "transfer_score")
FEW = ("separate", "progressive", "head", "full")  # by --quick
SHOWN = ("progressive", "full", "ewc", "replay", "packnet", "head")  # matrices in the report


def run(config: Progressive) -> Result:
    """Learn every sequence by every method; writes into ``config.out`` and returns the result."""
    if len(config.data) == 1:
        raise InputError("--data needs two data sets or more, a task each")
    out = prepare(config, "progressive")
    rows = ResumableRows(out, resume=config.resume)
    names: tuple[str, ...] = ("own",) if config.data else config.sequence
    names = names[-2:] if config.quick and not config.data else names
    trainer = Trainer(config)
    for name in names:
        for seed in range(config.seed, config.seed + (1 if config.quick else config.seeds)):
            for method in _methods(config):
                key: dict[str, Any] = {"sequence": name, "arm": method, "seed": seed}
                row = rows.get(partial(trainer, **key), **key)
                found = "  ".join(f"{m} {row[m]:.3f}" for m in METRICS if row.get(m) is not None)
                print(f"{name}  seed {seed}  {method}  {found}  {row['seconds']:.0f} s")

    rows.rows = [_scored(row, rows.rows) for row in rows.rows]
    summary: dict[str, Any] = {}
    for name in names:
        own = [row for row in rows.rows if row["sequence"] == name]
        there = [metric for metric in METRICS if any(metric in row for row in own)]
        summary |= {f"{metric}_{name}": found for metric, found in summarise(own, there).items()}
    sections = [section for name in names for section in _sections(name, rows.rows, rows.curves)]
    return finish(
        "progressive", config, rows, sections, title="Progressive networks", about=ABOUT, summary=summary
    )


def _methods(config: Progressive) -> list[str]:
    wanted: tuple[str, ...] = config.method
    if "all" in wanted:
        wanted = FEW if config.quick else tuple(METHODS)
    return ["separate", *(m for m in wanted if m != "separate")]


def _scored(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row with its transfer scores, against the separate networks of the same seed."""
    same = [r for r in rows if (r["sequence"], r["seed"]) == (row["sequence"], row["seed"])]
    (alone,) = [r for r in same if r["arm"] == "separate"]
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
