"""Transfer learning against training from scratch: accuracy, learning speed, cost and overfitting, on text and images.

The same network is trained from random weights (``scratch``), as a frozen body under a new head (``head``), head first
and then whole (``lp_ft``), and whole at once (``full``), with several numbers of labelled examples; beside them the
majority class and a linear probe.

    python -m experiments.compare --out runs/compare

LP-FT: https://arxiv.org/abs/2202.10054. Takes over an hour on two CPU cores; a killed run goes on with ``--resume``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, Literal

from experiments.common import Config, ResumableRows, at_least, finish, main, prepare, techniques
from experiments.common.classification import Classification, prepare_classification
from jtl.report import Result, Section, figures, format_estimate, paired_difference, summarise, table

ARMS = ("scratch", "head", "lp_ft", "full")
ABOUT = (
    "The same network is trained from scratch (`scratch`), as a frozen body under a new head (`head`), head first and "
    "then whole (`lp_ft`) and whole at once (`full`), on several numbers of labelled examples. All arms of one size "
    "and seed share the examples and the number of updates (`head` takes ten times as many: on cached features they "
    "cost next to nothing); learning rates were searched on validation, on other seeds."
)


@dataclass(frozen=True, kw_only=True)
class Compare(Config):
    """Settings of the comparison."""

    text_model: str = "minilm"
    """Model for the texts."""
    text_data: str = "rotten_tomatoes"
    """Texts with labels; see experiments.finetune --help."""
    image_model: str = "efficientnet-lite0"
    """Model for the images."""
    image_data: str = "mnist5k"
    """Images with labels."""
    image_size: int = at_least(1, 64)
    """Side of the images in pixels."""
    kinds: tuple[Literal["text", "image"], ...] = ("text", "image")
    """Which to run: text, image or both."""
    sizes: tuple[int, ...] = at_least(0, (64, 256, 1024, 0))
    """Numbers of labelled training examples; 0 for all there are."""
    seeds: int = at_least(1, 3)
    """Repetitions: each draws other examples, heads and orders."""
    epochs: int = at_least(1, 3)
    """Passes over the training examples, within the limits of updates below."""
    batch_size: int = at_least(1, 16)
    """Examples an update."""
    min_steps: int = at_least(1, 60)
    """Fewest updates of an arm."""
    max_steps: int = at_least(1, 300)
    """Most updates of an arm."""
    test_examples: int = at_least(0, 1000)
    """Test examples of each data set; 0 for all there are."""


def run(config: Compare) -> Result:
    """Run every arm; writes into ``config.out`` and returns the result."""
    rows = ResumableRows(prepare(config, "compare"), resume=config.resume)
    quick = config.quick
    budget = techniques.Budget(
        epochs=config.epochs,
        min_steps=12 if quick else config.min_steps,
        max_steps=12 if quick else config.max_steps,
        batch_size=config.batch_size,
        validations=3,
    )
    seeds = range(config.seed, config.seed + (2 if quick else config.seeds))
    origins = {}
    for kind in config.kinds[:1] if quick else config.kinds:
        task = prepare_classification(
            config.text_model if kind == "text" else config.image_model,
            config.text_data if kind == "text" else config.image_data,
            image_size=config.image_size,
            validation=100 if quick else 500,
            test=100 if quick else config.test_examples or None,
            quick=quick,
        )
        print(task.dataset)
        origins[kind] = task.dataset.origin
        most = len(task.splits["train"])
        sizes = {min(size or most, most) for size in ([64] if quick else config.sizes)}
        for size, seed, arm in product(sorted(sizes), seeds, ("majority", "probe", *ARMS)):
            few = task.with_train(size, seed)
            key = {"kind": kind, "size": size, "seed": seed, "arm": arm}
            row = rows.get(partial(_measure, few, arm, seed, budget), **key)
            told = "  ".join(f"{name} {value}" for name, value in key.items())
            print(f"{told}  accuracy {row['accuracy']:.3f}")

    found = [_with_target(row, rows.curves) for row in rows.rows]
    summary: dict[str, Any] = {}
    for kind, size in dict.fromkeys((row["kind"], row["size"]) for row in found):
        own = [row for row in found if (row["kind"], row["size"]) == (kind, size)]
        for metric in ("accuracy", "seconds", "gap", "examples_to_scratch", "flops_per_example"):
            summary[f"{metric}_{kind}_{size}"] = summarise(own, [metric])[metric]
    return finish(
        "compare",
        config,
        found,
        [_promises(found), *_figures(found, rows.curves)],
        title="What transfer learning promises, measured",
        about=ABOUT,
        summary=summary,
        seconds=rows.seconds,
        notes=[
            *(f"{kind}: {origin}." for kind, origin in origins.items()),
            "The best of the validated models is kept, by 500 validation labels whatever the size of the training set.",
            "Seconds of the first arm of a shape include its compilation; those of the head leave out features that "
            "the probe had cached.",
        ],
    )


def _measure(
    task: Classification, arm: str, seed: int, budget: techniques.Budget
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    if arm == "majority":
        return techniques.majority(task), []
    if arm == "probe":
        row = techniques.probe(task)[1]
        return {**row, "gap": row["train_accuracy"] - row["accuracy"]}, []
    done = techniques.run_arm(task, arm, seed=seed, budget=budget, progress=False)
    row = {**done.row, "gap": done.row["train_accuracy"] - done.row["accuracy"]}
    return {**row, "flops_per_example": techniques.flops_per_example(task, arm, budget)}, done.history


def _with_target(row: dict[str, Any], curves: list[dict[str, Any]]) -> dict[str, Any]:
    """``row`` and the examples it had seen when it first validated as well as ``scratch`` ever did; None if never."""
    if row["arm"] not in ARMS:
        return row
    place = {name: row[name] for name in ("kind", "size", "seed")}
    same = [p for p in curves if all(p[n] == v for n, v in place.items()) and "validation_accuracy" in p]
    target = max(p["validation_accuracy"] for p in same if p["arm"] == "scratch")
    reached = [p["examples"] for p in same if p["arm"] == row["arm"] and p["validation_accuracy"] >= target]
    return {**row, "examples_to_scratch": min(reached, default=None)}


def _promises(rows: list[dict[str, Any]]) -> Section:
    """Each promise as a paired difference against ``scratch``, with a verdict by its interval."""
    lines = []
    for kind, size in dict.fromkeys((row["kind"], row["size"]) for row in rows):
        own = [row for row in rows if (row["kind"], row["size"]) == (kind, size)]
        for arm in ("head", "lp_ft", "full"):
            better = paired_difference(own, "accuracy", arm, "scratch")
            gap = paired_difference(own, "gap", arm, "scratch")
            reach = [row for row in own if row["arm"] in (arm, "scratch") and row.get("examples_to_scratch")]
            ratio = {a: [r["examples_to_scratch"] for r in reach if r["arm"] == a] for a in (arm, "scratch")}
            whole = len(ratio[arm]) == len(ratio["scratch"])
            faster = f"{sum(ratio['scratch']) / sum(ratio[arm]):.1f} ×" if whole else "not always reached"
            flops = {r["arm"]: r["flops_per_example"] for r in own if "flops_per_example" in r}
            judged = [format_estimate(better), _verdict(better, +1), format_estimate(gap), _verdict(gap, -1)]
            lines.append([kind, size, arm, *judged, faster, f"{flops['scratch'] / flops[arm]:,.1f} ×"])
    head = ["data", "examples", "arm", "accuracy − scratch", "better?", "gap − scratch", "less overfit?",
            "fewer examples to scratch's best", "fewer FLOPs an example"]  # fmt: skip
    text = (
        "Differences are paired by seed, with 95 % intervals; “yes” and “no” mean that the interval excludes 0. "
        "The gap is training minus test accuracy: a network from scratch that fits nothing has a small one. FLOPs "
        "are those of the compiled train step; the head trains on cached features."
    )
    return Section("The promises", f"{text}\n\n{table(head, lines)}")


def _verdict(own: dict[str, Any], sign: int) -> str:
    if own["mean"] is None or own["ci95"] is None:
        return "unknown"
    return "undecided" if abs(own["mean"]) <= own["ci95"] else "yes" if sign * own["mean"] > 0 else "no"


def _figures(rows: list[dict[str, Any]], curves: list[dict[str, Any]]) -> list[Section]:
    sections = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = [row for row in rows if row["kind"] == kind]
        largest = max(row["size"] for row in own)
        few = min(row["size"] for row in own if row["size"] >= min(256, largest))
        of_few = [point for point in curves if point["kind"] == kind and point["size"] == few]
        trained = [row for row in own if row["arm"] in ARMS]
        sections += [
            Section(
                f"{kind}: accuracy",
                "On test, over seeds.",
                figures.over_sizes(own, "accuracy", "test accuracy"),
            ),
            Section(
                f"{kind}: time",
                "Wall time of training, validation and compilation included; within this run only.",
                figures.over_sizes(trained, "seconds", "training time (s)", log_y=True),
            ),
            Section(f"{kind}: overfitting", "Training minus test accuracy.", figures.gap_bars(trained)),
            Section(
                f"{kind}: learning curves", f"With {few} labelled examples.", figures.learning_curves(of_few)
            ),
        ]
    return sections


if __name__ == "__main__":
    main(run, Compare)
