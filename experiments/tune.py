"""Search each technique's learning rate on validation examples; the test split is never read.

Every technique trains with every rate from the same examples, updates and seeds. The usual rates in
``experiments.common.techniques.RATES`` come from here, with seeds that ``compare`` does not use:

    python -m experiments.tune --out runs/tune_text --seed 100
    python -m experiments.tune --out runs/tune_image --seed 100 \\
        --model efficientnet-lite0 --data mnist5k --image-size 64

Each takes about half an hour on two CPU cores; a killed search goes on with ``--resume``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from experiments.common import Config, ResumableRows, above, at_least, finish, main, prepare
from experiments.common.classification import prepare_classification
from experiments.common.techniques import ONLY_TEXT, TECHNIQUES, Budget, Technique, run_arm, usual_rate
from jtl.report import Result, Section, format_estimate, summarise, table


@dataclass(frozen=True, kw_only=True)
class Tune(Config):
    """Settings of the search."""

    model: str = "minilm"
    """As for experiments.finetune."""
    data: str = "rotten_tomatoes"
    """As for experiments.finetune."""
    image_size: int | None = None
    """Side of images in pixels; left out, that of the model."""
    techniques: tuple[Technique, ...] = TECHNIQUES
    """Which to search for; those for texts alone are left out of images."""
    rates: tuple[float, ...] = above(0, ())
    """Peak learning rates; left out, the technique's usual one and those three times above and below."""
    train_examples: int = at_least(0, 256)
    """Labelled training examples; 0 for all there are."""
    steps: int = at_least(1, 60)
    """Updates of each training; ten times as many for head."""
    batch_size: int = at_least(1, 16)
    """Examples an update."""
    seeds: int = at_least(1, 2)
    """Repetitions."""


def run(config: Tune) -> Result:
    """Train with every rate; writes into ``config.out`` and returns the result."""
    rows = ResumableRows(prepare(config, "tune"), resume=config.resume)
    steps, seeds = (20, 1) if config.quick else (config.steps, config.seeds)
    budget = Budget(epochs=1, min_steps=steps, max_steps=steps, batch_size=config.batch_size, validations=3)
    task = prepare_classification(
        config.model,
        config.data,
        image_size=config.image_size,
        validation=200 if config.quick else 500,
        quick=config.quick,
    )
    task = dataclasses.replace(task, splits={**task.splits, "test": task.splits["validation"]})
    techniques = [t for t in config.techniques if task.dataset.kind == "text" or t not in ONLY_TEXT]
    for technique in techniques[-1:] if config.quick else techniques:
        usual = usual_rate(technique, task.dataset.kind)
        for rate in config.rates or (usual / 3, usual, usual * 3):
            for seed in range(config.seed, config.seed + seeds):

                def train(technique: str = technique, rate: float = rate, seed: int = seed) -> Any:
                    few = task.with_train(config.train_examples or None, seed)
                    done = run_arm(few, technique, seed=seed, budget=budget, rate=rate, progress=False)
                    return {"validation_accuracy": done.row["accuracy"]}, done.history

                row = rows.get(train, arm=technique, rate=rate, seed=seed)
                print(
                    f"{technique}  rate {rate:.2g}  seed {seed}  validation {row['validation_accuracy']:.3f}"
                )

    found = {}
    for rate in sorted({row["rate"] for row in rows.rows}):
        own = [row for row in rows.rows if row["rate"] == rate]
        found[rate] = summarise(own, ["validation_accuracy"])["validation_accuracy"]
    lines = []
    for arm in dict.fromkeys(row["arm"] for row in rows.rows):
        means = {rate: own[arm]["mean"] for rate, own in found.items() if arm in own}
        best = max(means, key=lambda rate: means[rate])
        lines.append([arm, f"{best:.2g}", format_estimate(found[best][arm])])
    return finish(
        "tune",
        config,
        rows,
        [Section("Best", table(["technique", "rate", "validation accuracy"], lines))],
        title=f"Learning rates of {config.model} on {config.data}",
        about=f"AdamW's peak rates, compared on validation: {config.train_examples} examples, {steps} updates.",
        summary={f"validation_accuracy_{rate:.2g}": own for rate, own in found.items()},
    )


if __name__ == "__main__":
    main(run, Tune)
