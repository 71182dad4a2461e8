"""Parameter-efficient fine-tuning compared, on text and images: accuracy, parameters, memory, time, forgetting.

Every method trains from the same examples with the same number of updates; its learning rate is searched on validation.
``head`` trains a head on frozen features, ``full`` all parameters, ``bitfit`` the biases; the others are the adapters
of ``jtl.adapters``, where their papers are cited.

    python -m experiments.adapters --out runs/adapters
    python -m experiments.adapters --kinds text --out runs/adapters_text
    python -m experiments.adapters --kinds image --train-examples 1024 --steps 64 --out runs/adapters_image

BitFit: https://arxiv.org/abs/2106.10199. Takes hours on two CPU cores; a killed run goes on with ``--resume``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, Literal

from experiments.common import Config, ResumableRows, above, at_least, finish, main, prepare, techniques
from experiments.common.classification import Classification, batches, prepare_classification, score
from experiments.common.rate_grid import Grid, best_rate
from jtl import features
from jtl.outputs import outputs
from jtl.report import Result, Section, figures, format_estimate, paired_difference, summarise, table
from jtl.tasks import accuracy

Measured = tuple[dict[str, Any], list[dict[str, Any]]]  # a row and a learning curve
METHODS: tuple[techniques.Technique, ...] = (
    "head", "full", "bitfit", *techniques.TECHNIQUES[techniques.TECHNIQUES.index("lora") :],
)  # fmt: skip
MEASURES = ("accuracy", "trained_parameters", "peak_memory", "seconds", "forgetting")
ABOUT = (
    "Every method trains from the same examples, with the same number of updates; its learning rate is searched on "
    "validation, all rates and two seeds of their own in one program, and the model that validated best is tested. "
    "`probe` is a logistic regression on the frozen features, `head` a head on them; `full` trains all parameters. "
    "*Peak memory* is that of the compiled train step, for a batch of the median length. *Forgetting* is what a probe "
    "for another data set loses when it is fitted on the adapted body's features instead of the pretrained ones. (One "
    "kept from before would fail at a mere shift of their mean.)"
)


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
    image_size: int = at_least(1, 64)
    """Side of the images in pixels."""
    kinds: tuple[Literal["text", "image"], ...] = ("text", "image")
    """Which to run: text, image or both."""
    methods: tuple[techniques.Technique, ...] = METHODS
    """Which to compare."""
    factors: tuple[float, ...] = above(0, (1.0, 3.0))
    """What multiplies a method's usual learning rate in the search."""
    train_examples: int = at_least(0, 2048)
    """Labelled training examples; 0 for all there are."""
    steps: int = at_least(1, 128)
    """Updates; ten times as many for head."""
    batch_size: int = at_least(1, 16)
    """Examples an update."""
    source_examples: int = at_least(1, 500)
    """Examples of the other data set, for fitting its classifier."""
    test_examples: int = at_least(0, 1000)
    """Test examples; 0 for all there are."""
    seeds: int = at_least(1, 3)
    """Repetitions."""


def run(config: Adapters) -> Result:
    """Search, train and measure; writes into ``config.out`` and returns the result."""
    rows = ResumableRows(prepare(config, "adapters"), resume=config.resume)
    steps = 10 if config.quick else config.steps
    budget = techniques.Budget(
        epochs=1, min_steps=steps, max_steps=steps, batch_size=config.batch_size, validations=2
    )
    seeds = range(config.seed, config.seed + (1 if config.quick else config.seeds))
    for kind in config.kinds[:1] if config.quick else config.kinds:
        task, source = _tasks(config, kind)
        methods = [m for m in config.methods if kind == "text" or m not in techniques.ONLY_TEXT]
        for method in [m for m in methods if m in ("lora", "ia3")] if config.quick else methods:
            found = rows.get(partial(_search, task, method, config, steps), kind=kind, arm=method, seed=None)
            for seed in seeds:
                few = task.with_train(config.train_examples or None, seed)
                measure = partial(_measure, few, source, method, seed, budget, found)
                row = rows.get(measure, kind=kind, arm=method, seed=seed)
                told = f"accuracy {row['accuracy']:.3f}  forgetting {row['forgetting']:.3f}"
                print(f"{kind}  {method}  seed {seed}  {told}")
        for seed in seeds:
            few = task.with_train(config.train_examples or None, seed)
            rows.get(partial(_probe, few), kind=kind, arm="probe", seed=seed)

    tested = [row for row in rows.rows if row["seed"] is not None]
    summary: dict[str, Any] = {}
    for kind in dict.fromkeys(row["kind"] for row in tested):
        own = [row for row in tested if row["kind"] == kind]
        summary |= {f"{metric}_{kind}": of_arms for metric, of_arms in summarise(own, MEASURES).items()}
    return finish(
        "adapters",
        config,
        rows,
        [section for kind in config.kinds for section in _sections(kind, tested)],
        title="Adapters compared",
        about=ABOUT,
        summary=summary,
        notes=["Seconds hold within this run only, and include compilation where a program is new."],
    )


def _tasks(config: Adapters, kind: str) -> tuple[Classification, Classification]:
    """The task, and the other one on which forgetting is measured."""
    quick = config.quick
    model, data, source = (
        (config.text_model, config.text_data, config.text_source)
        if kind == "text"
        else (config.image_model, config.image_data, config.image_source)
    )
    load = partial(prepare_classification, model, image_size=config.image_size, quick=quick)
    test = 200 if quick else config.test_examples or None
    task = load(data, validation=200 if quick else 500, test=test)
    other = load(source, max_length=64, validation=200, test=200 if quick else 500)
    return task, other.with_train(200 if quick else config.source_examples, 0)


def _probe(task: Classification) -> Measured:
    return techniques.probe(task)[1], []


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
    found_on = {
        split: outputs(done.model, batches(source, split), ("features", "label"))
        for split in ("train", "validation", "test")
    }
    (x, y), validation, (test, labels) = ((own["features"], own["label"]) for own in found_on.values())
    probe = features.fit_logistic(x, y, classes=source.classes, validation=validation)
    left = accuracy(probe(test), labels)
    lost = {"source_accuracy": left, "forgetting": techniques.probe(source)[1]["accuracy"] - left}
    return {**done.row, **lost, "peak_memory": found["peak_memory"]}, done.history


def _sections(kind: str, rows: list[dict[str, Any]]) -> list[Section]:
    own = [row for row in rows if row["kind"] == kind]
    if not own:
        return []
    found = summarise(own, MEASURES)
    lines = []
    for arm in sorted(found["accuracy"], key=lambda arm: -found["accuracy"][arm]["mean"]):
        compared = arm != "full" and "full" in found["accuracy"]
        memory, forgetting = found["peak_memory"].get(arm), found["forgetting"].get(arm)
        less = format_estimate(paired_difference(own, "accuracy", arm, "full")) if compared else ""
        lines.append(
            [arm, format_estimate(found["accuracy"][arm]), less,
             f"{found['trained_parameters'][arm]['mean']:,.0f}", f"{memory['mean'] / 1e6:,.0f}" if memory else "",
             f"{found['seconds'][arm]['mean']:.0f}", format_estimate(forgetting) if forgetting else ""]
        )  # fmt: skip
    columns = ("accuracy", "less full", "trained parameters", "peak memory (MB)", "seconds", "forgetting")
    return [
        Section(f"{kind}: methods", table(["method", *columns], lines)),
        Section(
            f"{kind}: accuracy against parameters",
            "Test accuracy; 95 % intervals over seeds.",
            figures.over_parameters([row for row in own if row["trained_parameters"]], "accuracy"),
        ),
    ]


if __name__ == "__main__":
    main(run, Adapters)
