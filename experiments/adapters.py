"""Parameter-efficient fine-tuning compared, on text and images: accuracy, parameters, memory, time, forgetting.

Every method trains from the same examples, with the same number of updates; its learning rate is searched on
validation, all rates and two seeds of their own in one program (``experiments.sweep``), and the model that validated
best is tested, once. ``probe`` is a logistic regression on the frozen features, ``head`` a head on them, ``full``
trains all. *Peak memory* is that of the compiled train step, for a batch of the median length. *Forgetting* is what a
probe for another data set loses when it is fitted on the adapted body's features instead of the pretrained ones. (One
kept from before would fail at a mere shift of their mean.)

    python -m experiments.adapters --out runs/adapters

The committed results, each of a core that other work shared in part (``seconds`` are rough; two hours and half an
hour): ``experiments/results/adapters.json`` has ``full`` 0.775 ± 0.048, ``loha``, ``vera``, ``lora``, ``dora``, ``ia3``
and ``lokr`` 0.750 to 0.756, ``prompt`` 0.613 ± 0.021 on texts; ``adapters_image.json`` ``head`` 0.906 ± 0.023, ``full``
0.857 ± 0.050, ``lora`` 0.820 ± 0.110. Searches began at other rates than today's ``arms.RATES``, which hold what they
found.

    python -m experiments.adapters --kinds text --out runs/adapters_text
    python -m experiments.adapters --kinds image --train-examples 1024 --steps 64 --out runs/adapters_image

The papers are those of the functions in ``jtl.adapters``; ``bitfit`` trains biases (Ben Zaken et al. 2022, 2106.10199).
A killed run goes on with ``--resume``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

from experiments.common import techniques
from experiments.common.classification import Classification, batches, prepare_classification, score
from experiments.common.command_line import main
from experiments.common.rate_grid import Grid, best_rate
from experiments.common.resumable_rows import ResumableRows
from experiments.common.settings import Config, command, prepare, settings
from jtl import features
from jtl.errors import InputError
from jtl.outputs import outputs
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
from jtl.tasks import accuracy

METHODS: tuple[techniques.Technique, ...] = ("head", "full", "bitfit", *techniques.ADAPTERS)
MEASURES = ("accuracy", "trained_parameters", "peak_memory", "seconds", "forgetting")


@dataclass(frozen=True, kw_only=True)
class Adapters(Config):
    """Settings of the comparison."""

    text_model: str = "minilm"
    """Model for the texts."""
    text_data: str = "rotten_tomatoes"
    """Texts with labels; see experiments.finetune --help."""
    text_source: str = "newsgroups20"
    """Texts on which forgetting is measured."""
    image_model: str = "efficientnet-lite0"
    """Model for the images."""
    image_data: str = "mnist5k"
    """Images with labels."""
    image_source: str = "uci_digits"
    """Images on which forgetting is measured."""
    image_size: int = 64
    """Side of the images in pixels."""
    kinds: tuple[str, ...] = ("text", "image")
    """Which to run: text, image or both."""
    methods: tuple[techniques.Technique, ...] = METHODS
    """Which to compare."""
    factors: tuple[float, ...] = (1.0, 3.0)
    """What multiplies a method's usual learning rate in the search."""
    train_examples: int = 2048
    """Labelled training examples."""
    steps: int = 128
    """Updates; ten times as many for head."""
    batch_size: int = 16
    """Examples an update."""
    source_examples: int = 500
    """Examples of the other data set, for fitting its classifier."""
    test_examples: int = 1000
    """Test examples."""
    seeds: int = 3
    """Repetitions."""


def run(config: Adapters) -> Result:
    """Search, train and measure; writes into ``config.out`` and returns the result."""
    if unknown := set(config.kinds) - {"text", "image"}:
        raise InputError(f"--kinds takes text and image, got {sorted(unknown)}")
    out = prepare(config, "adapters")
    ledger = ResumableRows(out, resume=config.resume)
    steps = 10 if config.quick else config.steps
    budget = techniques.Budget(
        epochs=1, min_steps=steps, max_steps=steps, batch_size=config.batch_size, validations=2
    )
    seeds = range(config.seed, config.seed + (1 if config.quick else config.seeds))
    for kind in config.kinds[:1] if config.quick else config.kinds:
        task, source = _tasks(config, kind)
        methods = [m for m in config.methods if kind == "text" or m not in techniques.ONLY_TEXT]
        for method in [m for m in methods if m in ("lora", "ia3")] if config.quick else methods:
            found = ledger.get(
                partial(_search, task, method, config, steps), kind=kind, arm=method, seed=None
            )
            for seed in seeds:
                few = task.with_train(config.train_examples or None, seed)
                measure = partial(_measure, few, source, method, seed, budget, found)
                row = ledger.get(measure, kind=kind, arm=method, seed=seed)
                print(
                    f"{kind}  {method}  seed {seed}  accuracy {row['accuracy']:.3f}"
                    f"  forgetting {row['forgetting']:.3f}"
                )
        for seed in seeds:
            few = task.with_train(config.train_examples or None, seed)
            ledger.get(lambda few=few: (techniques.probe(few)[1], []), kind=kind, arm="probe", seed=seed)

    rows = [row for row in ledger.rows if row["seed"] is not None]
    summary: dict[str, Any] = {}
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = [row for row in rows if row["kind"] == kind]
        for measure in MEASURES:
            summary[f"{measure}_{kind}"] = summarise(own, [measure])[measure]
    result = Result("adapters", settings(config), environment(), ledger.seconds, ledger.rows, summary)
    write_result(out, result)
    write_report(
        out,
        result,
        title="Adapters compared",
        about=" ".join(__doc__.split("\n\n")[1].split()),
        command=command("adapters", config),
        sections=[section for kind in config.kinds for section in _sections(kind, rows)],
        notes=["Seconds hold within this run only, and include compilation where a program is new."],
    )
    return result


def _tasks(config: Adapters, kind: str) -> tuple[Classification, Classification]:
    """The task, and the other one on which forgetting is measured."""
    small = config.quick
    model, data, source = (
        (config.text_model, config.text_data, config.text_source)
        if kind == "text"
        else (config.image_model, config.image_data, config.image_source)
    )
    size = {"image_size": config.image_size} if kind == "image" else {}
    task = prepare_classification(
        model,
        data,
        validation=200 if small else 500,
        test=200 if small else config.test_examples or None,
        quick=small,
        **size,
    )
    other = prepare_classification(
        model, source, max_length=64, validation=200, test=200 if small else 500, quick=small, **size
    )
    return task, other.with_train(200 if small else config.source_examples, 0)


Measured = tuple[dict[str, Any], list[dict[str, Any]]]  # a row and a learning curve, as the ledger keeps them


def _search(task: Classification, method: str, config: Adapters, steps: int) -> Measured:
    """The rate that validates best on examples and seeds of its own, and the compiled step's memory."""
    seed = config.seed + 100
    few = task.with_train(config.train_examples or None, seed)
    memory = techniques.peak_memory(few, method, techniques.Budget(batch_size=config.batch_size))
    usual = techniques.usual_rate(method, task.dataset.kind)
    if config.quick or method == "head":  # a head on cached features is no model that a grid could run
        return {"rate": usual, "peak_memory": memory}, []
    runs = tuple(product((usual * factor for factor in config.factors), (seed, seed + 1)))
    models, _ = Grid(few, method, runs, steps, config.batch_size, seed).together()
    validated = [score(model, task) for model in models]
    tried = [
        {"learning_rate": r, "seed": s, "accuracy": v} for (r, s), v in zip(runs, validated, strict=True)
    ]
    return {"rate": best_rate(runs, validated), "search": tried, "peak_memory": memory}, []


def _measure(
    task: Classification,
    source: Classification,
    method: str,
    seed: int,
    budget: techniques.Budget,
    found: dict[str, Any],
) -> Measured:
    """Train with the rate that was found, test, and test what is left of the other task."""
    done = techniques.run_arm(task, method, seed=seed, budget=budget, rate=found["rate"], progress=False)
    (x, y), validation, (test, labels) = (
        outputs(done.model, batches(source, split), ("features", "label")).values()
        for split in ("train", "validation", "test")
    )
    probe = features.fit_logistic(x, y, classes=source.classes, validation=tuple(validation))
    left = accuracy(probe(test), labels)
    lost = {"source_accuracy": left, "forgetting": techniques.probe(source)[1]["accuracy"] - left}
    return {**done.row, **lost, "peak_memory": found["peak_memory"]}, done.history


def _sections(kind: str, rows: list[dict[str, Any]]) -> list[Section]:
    own = [row for row in rows if row["kind"] == kind]
    if not own:
        return []
    found = summarise(own, MEASURES)
    shown = lambda estimate: format_estimate(estimate) if estimate else ""  # noqa: E731
    lines = []
    for arm in sorted(found["accuracy"], key=lambda arm: -found["accuracy"][arm]["mean"]):
        compared = arm != "full" and "full" in found["accuracy"]
        memory = found["peak_memory"].get(arm)
        lines.append(
            [
                arm,
                shown(found["accuracy"][arm]),
                shown(paired_difference(own, "accuracy", arm, "full") if compared else None),
                f"{found['trained_parameters'][arm]['mean']:,.0f}",
                f"{memory['mean'] / 1e6:,.0f}" if memory else "",
                f"{found['seconds'][arm]['mean']:.0f}",
                shown(found["forgetting"].get(arm)),
            ]
        )
    head = [
        "method",
        "accuracy",
        "less full",
        "trained parameters",
        "peak memory (MB)",
        "seconds",
        "forgetting",
    ]
    return [
        Section(f"{kind}: methods", table(head, lines)),
        Section(
            f"{kind}: accuracy against parameters",
            "Test accuracy; 95 % intervals over seeds.",
            figures.over_parameters([row for row in own if row["trained_parameters"]], "accuracy"),
        ),
    ]


if __name__ == "__main__":
    main(run, Adapters)
