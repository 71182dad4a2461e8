"""The main job: adapt a real pretrained model to real data by one technique, and report it.

Beside the technique it always measures the majority class and a logistic probe on the frozen features, which
any fine-tuning has to beat. Everything is chosen on validation; the test split is used once.

    python -m experiments.finetune --out runs/finetune

Expected (MiniLM, 2,000 Rotten Tomatoes snippets split by film, 1,000 for test, seed 0): accuracy 0.60 for the majority
class, 0.74 for the probe, 0.79 for ``full``, in about 3 minutes on two CPU cores with nothing cached; see
``experiments/results/finetune.json``.

Howard and Ruder 2018 (gradual unfreezing, layer-wise rates), Kumar et al. 2022 (LP-FT), Li et al. 2018 (L2-SP).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from experiments.common import techniques
from experiments.common.classification import Classification, frozen, prepare_classification
from experiments.common.command_line import main
from experiments.common.settings import Config, command, prepare, settings
from jtl import data, pretrained
from jtl.errors import InputError
from jtl.report import figures
from jtl.report.report import (
    Result,
    Section,
    confident_errors,
    environment,
    summarise,
    table,
    write_report,
    write_result,
)

QUICK_EPOCHS = 5  # of 256 examples


@dataclass(frozen=True, kw_only=True)
class Finetune(Config):
    """Settings of the main job."""

    model: str = "minilm"
    """minilm, efficientnet-lite0, a folder with config.json and weights, or a hub id org/name[@revision]."""
    data: str = "rotten_tomatoes"
    """rotten_tomatoes, newsgroups20, reuters_r8, mnist5k, uci_digits, tfds:NAME, a CSV or JSONL file, or a folder."""
    technique: techniques.Technique = "full"
    """How to adapt the model."""
    seeds: int = 1
    """Repeat with this many seeds; intervals need at least two."""
    train_examples: int = 2000
    """Labelled training examples, stratified; 0 for all there are."""
    test_examples: int = 1000
    """Test examples; 0 for all there are."""
    epochs: int = 2
    """Passes over the training examples; always 5 with --quick."""
    batch_size: int = 32
    """Examples an update."""
    learning_rate: float | None = None
    """Peak rate of AdamW; left out, the technique's usual one."""
    max_length: int = 128
    """Longest text in tokens; the rest is cut off."""
    image_size: int | None = None
    """Side of images in pixels; left out, that of the model."""
    text_column: str | None = None
    """Column of the texts in your own file."""
    label_column: str | None = None
    """Column of the labels in your own file."""
    image_column: str | None = None
    """Column of the images in a tfds data set that has several."""
    save: bool = False
    """Also save the adapted model as a Hugging Face folder, OUT/model; adapters are merged into its weights."""


def run(config: Finetune) -> Result:
    """Run the main job; writes into ``config.out`` and returns the result."""
    began = time.monotonic()
    for name in ("epochs", "batch_size", "max_length"):
        if getattr(config, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}")
    if config.learning_rate is not None and config.learning_rate <= 0:
        raise InputError(f"--learning-rate must be positive, got {config.learning_rate}")
    out = prepare(config, "finetune")
    task = prepare_classification(
        config.model,
        config.data,
        max_length=config.max_length,
        image_size=config.image_size,
        validation=200 if config.quick else 500,
        test=200 if config.quick else config.test_examples or None,
        text_column=config.text_column,
        label_column=config.label_column,
        image_column=config.image_column,
        quick=config.quick,
    )
    print(task.dataset)
    epochs = QUICK_EPOCHS if config.quick else config.epochs
    budget = techniques.Budget(epochs, min_steps=1, batch_size=config.batch_size, validations=max(3, epochs))
    count = 256 if config.quick else config.train_examples or None

    rows, curves, last = [], [], None
    for seed in range(config.seed, config.seed + config.seeds):
        few = task.with_train(count, seed)
        if config.save and last is None:
            _check_savable(config, few)
        rows.append({**techniques.majority(few), "seed": seed})
        rows.append({**techniques.probe(few)[1], "seed": seed})
        print(
            f"seed {seed}: majority {rows[-2]['accuracy']:.3f}, probe {rows[-1]['accuracy']:.3f};"
            f" now {config.technique}"
        )
        last = techniques.run_arm(
            few,
            config.technique,
            seed=seed,
            budget=budget,
            rate=config.learning_rate,
            out=out if config.seeds == 1 else out / f"seed_{seed}",
            resume=config.resume,
        )
        rows.append(last.row)
        curves += techniques.named(config.technique, seed, last.history)
    assert last is not None

    result = Result(
        experiment="finetune",
        config=settings(config),
        environment=environment(),
        seconds=time.monotonic() - began,
        rows=rows,
        summary=summarise(rows, ["accuracy", "macro_f1", "train_accuracy", "seconds", "trained_parameters"]),
    )
    write_result(out, result)
    write_report(
        out,
        result,
        title=f"{config.technique}: {config.model} on {config.data}",
        about=_about(config, task, few),
        command=command("finetune", config),
        sections=_sections(task, last, curves),
        notes=_notes(few),
    )
    if config.save:
        names = dict(enumerate(task.dataset.classes))
        model = techniques.plain(last.model, config.technique)
        pretrained.save(model, out / "model", tokenizer=config.model, id2label=names, overwrite=config.resume)
    return result


def _check_savable(config: Finetune, task: Classification) -> None:
    start = techniques.start(task, config.technique, jax.random.key(0))
    try:
        pretrained.check_savable(techniques.plain(start, config.technique))
    except ValueError as error:
        raise InputError(f"--save with --technique {config.technique} on {config.model}: {error}") from error


def _about(config: Finetune, task: Classification, few: Classification) -> str:
    sizes = {split: len(part) for split, part in few.splits.items()}
    return (
        f"The pretrained model `{config.model}` was adapted to `{config.data}` ({len(task.dataset.classes)} classes; "
        f"{sizes['train']:,} training, {sizes['validation']:,} validation and {sizes['test']:,} test examples) by "
        f"`{config.technique}`. `majority` always names the commonest class; `probe` is a logistic regression on the "
        "frozen features. The model that validated best was tested, once."
    )


def _notes(task: Classification) -> list[str]:
    notes = [f"Data: {task.dataset.origin}.", *task.dataset.notes]
    cut = getattr(task.splits["train"], "truncated", 0)
    return (
        [*notes, f"{cut} training texts were cut to {task.preprocessing['max_length']} tokens."]
        if cut
        else notes
    )


def _sections(task: Classification, last: techniques.Arm, curves: list[dict[str, Any]]) -> list[Section]:
    names = task.dataset.classes
    labels, test = last.test["label"], last.test
    before, _ = frozen(task, "test")
    same = {"before": before, "after": test["features"]}
    sections = [
        Section("Learning curves", "Training loss and validation accuracy.", figures.learning_curves(curves)),
        Section(
            "Confusion",
            "True against predicted classes of the last seed, on test.",
            figures.confusion(labels, test["logits"].argmax(-1), names),
        ),
        Section(
            "Features before and after",
            "Test examples in the first two principal components of the model's features.",
            figures.embeddings(same, labels, names),
        ),
    ]
    chances = np.asarray(jax.nn.softmax(test["logits"]))
    source = task.dataset.splits["test"]
    rows = [source[i] for i in range(len(source))]
    if task.dataset.kind == "text":
        texts = [row["text"] for row in rows]
        sections.append(Section("Surest errors", confident_errors(texts, labels, chances, names)))
    else:
        sections.append(Section("Surest errors", *_picture_errors(rows, labels, chances, names)))
    counts = np.bincount(data.labels(task.dataset.splits["test"]), minlength=len(names))
    sections.append(
        Section(
            "Test classes",
            table(["class", "examples"], [[n, int(c)] for n, c in zip(names, counts, strict=True)]),
        )
    )
    return sections


def _picture_errors(
    rows: list[Any], labels: np.ndarray, chances: np.ndarray, names: tuple[str, ...]
) -> tuple[str, Any]:
    predicted = chances.argmax(-1)
    wrong = np.flatnonzero(predicted != labels)
    wrong = wrong[np.argsort(-chances[wrong, predicted[wrong]])][:12]
    if not len(wrong):
        return "No errors.", None
    pictures = [rows[i]["image"] for i in wrong]
    figure = figures.images(pictures, [names[labels[i]] for i in wrong], [names[predicted[i]] for i in wrong])
    return "The wrong predictions that the model was surest of.", figure


if __name__ == "__main__":
    main(run, Finetune)
