"""Few-shot learning: what meta-training gives over training as usual, on classes that no training has seen.

An N-way K-shot task shows K examples of each of N new classes and asks for the class of others. Every algorithm sees
the training classes alone. ``accuracy_5w1s`` is its mean accuracy over ``--test-episodes`` tasks of the test classes,
the same for all, with the interval over these tasks; several seeds show how much training itself varies. ``maml``,
``fomaml``, ``anil`` and ``reptile`` meta-train an inner loop, ``prototypes``, ``matching`` and ``ridge`` the features
of a closed-form classifier. Baselines: ``scratch`` fine-tunes the untrained network on the task; ``head``,
``nearest_centroid`` and ``baseline_plus_plus`` put a new linear head, class means and a new cosine head on the frozen
features of a network trained to classify all training classes.

    python -m experiments.fewshot --out runs/fewshot

Expected (``experiments/results/fewshot.json``, three seeds, 144 minutes of one core, without ``matching`` and
``ridge``), 5-way 1-shot, 5-way 5-shot and 20-way 1-shot: ``prototypes`` 0.923, 0.979, 0.780; ``maml`` 0.887, 0.963,
0.754; ``anil`` 0.910, 0.938, 0.777; ``baseline_plus_plus`` 0.860, 0.968, 0.686; each ± 0.006 or less over tasks. Of one
seed (``fewshot_metric.json``): ``ridge`` 0.933, 0.982, 0.780; ``matching``, whose cosines have no scale, 0.782, 0.816,
0.523.

``--data`` is ``glyphs`` (letters of many scripts, whole alphabets held out), ``newsgroups20``, a
folder or ``tfds:NAME``, such as ``tfds:omniglot``, of which the papers report, 5-way 1-shot, 5-way 5-shot and 20-way
1-shot: MAML 98.7, 99.9, 95.8; FOMAML 98.3, 99.2, 89.4; Reptile 97.7, 99.5, 89.4; ProtoNets 98.8, 99.7, 96.0. On glyphs,
which are printed letters, figures do not compare. Texts, on the frozen features of MiniLM:

    python -m experiments.fewshot --data newsgroups20 --backbone minilm --ways 5 5 --shots 1 5 --updates 500 --out text

No meta-training beats a new head on the features as they are there (``fewshot_text.json``): it fits its few topics.

Batch normalisation, ``--normalise``: ``transductive`` takes the statistics of the query batch itself, as MAML's authors
do, so a row's prediction depends on the others; ``support`` takes those of the support. Every row of the result says
which. The baselines on frozen features take the running statistics.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from experiments.common.resumable_rows import ResumableRows
from experiments.common.settings import command, prepare, settings
from experiments.fewshot import baselines
from experiments.fewshot import methods as methods
from experiments.fewshot.config import BLOCK, FewShot
from experiments.fewshot.episodes import Tasks, prepare_tasks
from experiments.fewshot.training import Trainer
from jtl.errors import InputError
from jtl.report.report import (
    Result,
    Section,
    environment,
    estimate,
    format_estimate,
    table,
    write_report,
    write_result,
)


def run(config: FewShot) -> Result:
    """Train and test every algorithm; writes into ``config.out`` and returns the result."""
    _check(config)
    out = prepare(config, "fewshot")
    ledger = ResumableRows(out, resume=config.resume)
    tasks = prepare_tasks(
        config.data, config.backbone, config.adapt, width=config.width, image_size=config.image_size,
        max_length=config.max_length, seed=config.seed,
    )  # fmt: skip
    wanted = _algorithms(config, tasks)
    shapes = _shapes(config)
    for seed in range(config.seed, config.seed + (1 if config.quick else config.seeds)):
        runner = Trainer(tasks, config, seed)
        for algorithm in wanted:
            for ways, shots in shapes:
                row = ledger.get(
                    lambda a=algorithm, n=ways, k=shots, runner=runner: runner(a, n, k),
                    arm=algorithm, setting=f"{ways}w{shots}s", seed=seed,
                )  # fmt: skip
                print(
                    f"seed {seed}  {ways}-way {shots}-shot  {algorithm}  {row['accuracy']:.3f} ± {row['ci95']:.3f} "
                    f"over tasks  {row['seconds']:.0f} s"
                )

    summary: dict[str, Any] = {}
    for row in ledger.rows:
        own = summary.setdefault(f"accuracy_{row['setting']}", {})
        own[row["arm"]] = [*own.get(row["arm"], []), *row["accuracy_by_task"]]
    summary = {
        metric: {arm: estimate(tasks) for arm, tasks in arms.items()} for metric, arms in summary.items()
    }
    rows = [{name: row[name] for name in row if name != "accuracy_by_task"} for row in ledger.rows]
    result = Result("fewshot", settings(config), environment(), ledger.seconds, rows, summary)
    write_result(out, result)
    write_report(
        out,
        result,
        title="Few-shot learning",
        about=" ".join(__doc__.split("\n\n")[1].split()),
        command=command("fewshot", config),
        sections=_sections(rows, ledger.curves),
        notes=[
            f"Batch normalisation: {config.normalise}; running for the baselines on frozen features.",
            f"Tested on {config.test_episodes} tasks of {len(tasks.pools['test'].classes)} classes.",
        ],
        over="test tasks of all seeds",
    )
    return result


def _check(config: FewShot) -> None:
    if len(config.ways) != len(config.shots):
        raise InputError(
            f"--ways {config.ways} and --shots {config.shots} go in pairs: give as many of one as of the other"
        )
    for name in ("updates", "tasks", "metric_tasks", "queries", "inner_steps", "test_steps"):
        if getattr(config, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}")
    if config.test_episodes < 2:
        raise InputError(f"--test-episodes must be at least 2, got {config.test_episodes}")
    if config.updates % BLOCK:
        raise InputError(f"--updates must be a multiple of {BLOCK}, got {config.updates}")


def _algorithms(config: FewShot, tasks: Tasks) -> tuple[str, ...]:
    if "all" not in config.algorithm:
        return tuple(dict.fromkeys(config.algorithm))
    if config.quick:
        return ("maml", "prototypes", "head", "nearest_centroid")
    return methods.TABLE


def _shapes(config: FewShot) -> list[tuple[int, int]]:
    shapes = list(dict.fromkeys(zip(config.ways, config.shots, strict=True)))
    return shapes[:1] if config.quick else shapes


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
            if 1 < len(curve) < baselines.HEAD_STEPS:
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
