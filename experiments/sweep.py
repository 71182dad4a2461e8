"""A grid of learning rates and seeds, trained in one compiled program over one frozen backbone.

Each run of the grid has an adapter and a head of its own; all read the same batches. The rate that validates best, on
average over the seeds, is tested. Then the same runs are trained one after another, to check that the models agree and
to measure the time that one program saves.

    python -m experiments.sweep --out runs/sweep

LoRA: https://arxiv.org/abs/2106.09685.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from experiments.common import Config, above, at_least, finish, main, prepare, techniques
from experiments.common.classification import prepare_classification, score
from experiments.common.rate_grid import Grid, best_rate
from jtl.errors import InputError
from jtl.report import Result, Section, figures, summarise, table

TIMES = (
    "`time_ratio` is the time of one program over that of the runs one after another, compilation included in both "
    "and none of it from a cache: `programs` where each run compiles, as in commands of their own, `one_process` "
    "where they share one compilation. A CPU computes no faster for several runs at once: what it saves is "
    "compilation."
)


@dataclass(frozen=True, kw_only=True)
class SweepConfig(Config):
    """Settings of the grid."""

    model: str = "minilm"
    """As for experiments.finetune."""
    data: str = "rotten_tomatoes"
    """As for experiments.finetune."""
    image_size: int | None = None
    """Side of images in pixels; left out, that of the model."""
    technique: techniques.Technique = "lora"
    """What each run trains; whatever does not train is held once for all."""
    rates: tuple[float, ...] = above(0, (3e-4, 1e-3, 3e-3, 1e-2))
    """Peak learning rates of AdamW."""
    seeds: int = at_least(1, 2)
    """Runs of each rate: other heads, adapters and dropout on the same examples."""
    train_examples: int = at_least(0, 256)
    """Labelled training examples; 0 for all there are."""
    steps: int = at_least(1, 60)
    """Updates."""
    batch_size: int = at_least(1, 16)
    """Examples an update."""
    validation_examples: int = at_least(0, 500)
    """Validation examples; 0 for all there are."""
    test_examples: int = at_least(0, 1000)
    """Test examples; 0 for all there are."""
    alone: bool = True
    """Also train the runs one after another."""


def run(config: SweepConfig) -> Result:
    """Train the grid; writes into ``config.out`` and returns the result."""
    if not config.rates:
        raise InputError("--rates needs at least one learning rate")
    prepare(config, "sweep")
    began = time.monotonic()
    quick = config.quick
    task = prepare_classification(
        config.model,
        config.data,
        image_size=config.image_size,
        validation=200 if quick else config.validation_examples or None,
        test=200 if quick else config.test_examples or None,
        quick=quick,
    ).with_train(config.train_examples or None, config.seed)
    rates = config.rates[-2:] if quick else config.rates
    runs = tuple(product(rates, range(config.seed, config.seed + config.seeds)))
    grid = Grid(task, config.technique, runs, 10 if quick else config.steps, config.batch_size, config.seed)
    with _fresh():
        models, together = grid.together()
    validated = [score(model, task) for model in models]
    rows: list[dict[str, Any]] = [
        {"arm": config.technique, "learning_rate": rate, "seed": seed, "validation_accuracy": value}
        for (rate, seed), value in zip(runs, validated, strict=True)
    ]
    best = best_rate(runs, validated)
    kept = [row for row in rows if row["learning_rate"] == best]
    for row in kept:
        row["accuracy"] = score(models[rows.index(row)], task, "test")

    summary: dict[str, Any] = summarise(kept, ["accuracy"])
    for rate in rates:
        own = summarise([row for row in rows if row["learning_rate"] == rate], ["validation_accuracy"])
        summary[f"validation_accuracy_{rate:.2g}"] = own["validation_accuracy"]
    lines, notes = [["one program", f"{together:.1f}", ""]], []
    if config.alone:
        furthest = 0.0
        for i, row in enumerate(rows):
            with _fresh():
                model, seconds = grid.alone(i)
            row |= {f"{name}_seconds_alone": value for name, value in seconds.items()}
            furthest = max(furthest, abs(score(model, task) - validated[i]))
        training = sum(row["training_seconds_alone"] for row in rows)
        compilation = [row["compilation_seconds_alone"] for row in rows]
        apart = {"programs": training + sum(compilation), "one_process": training + compilation[0]}
        summary["time_ratio"] = {
            name: {"mean": together / seconds, "ci95": None, "n": 1} for name, seconds in apart.items()
        }
        words = ("one after another, each compiled", "one after another, compiled once")
        lines += [
            [how, f"{s:.1f}", f"{together / s:.2f}"] for how, s in zip(words, apart.values(), strict=True)
        ]
        notes = [
            f"No run's validation accuracy differs by more than {furthest:.3f} from that run's alone.",
            TIMES,
        ]

    times = table([f"{len(runs)} runs of {grid.steps} updates", "seconds", "one program / these"], lines)
    learned = figures.over_rates(rows, "validation_accuracy")
    return finish(
        "sweep",
        config,
        rows,
        [
            Section("Learning rates", "Validation accuracy.", learned),
            Section("Time", "\n\n".join([times, *notes])),
        ],
        title=f"{len(runs)} runs of {config.technique} in one program",
        about=f"`{config.technique}` on `{config.model}`, {len(task.splits['train']):,} examples of `{config.data}`, "
        f"{len(rates)} learning rates x {config.seeds} seeds. The rate {best:.2g} validated best and was tested.",
        summary=summary,
        notes=["The seeds share the training examples and their order: the intervals are of training alone."],
        seconds=time.monotonic() - began,
    )


@contextmanager
def _fresh() -> Iterator[None]:
    """Compile as a process does that has just started: with nothing in memory or on disk."""
    kept = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX asks only once in a process whether there is one
    jax.clear_caches()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", kept)
        compilation_cache.reset_cache()


if __name__ == "__main__":
    main(run, SweepConfig)
