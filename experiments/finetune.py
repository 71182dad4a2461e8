"""Fine-tune a pretrained model on a data set by one technique, beside a linear probe on its frozen features.

Every run also measures the majority class and a logistic regression on the frozen features (the probe), which any
fine-tuning has to beat. Validation picks the checkpoint; the test split is used once.

    python -m experiments.finetune --out runs/finetune
    python -m experiments.finetune --technique lora --data reviews.csv --save --out runs/reviews

Data: a name (rotten_tomatoes, newsgroups20, reuters_r8, mnist5k, uci_digits), tfds:NAME, or your own CSV or JSONL file
or folder of images.

Papers: gradual unfreezing and layer-wise rates, https://arxiv.org/abs/1801.06146; LP-FT,
https://arxiv.org/abs/2202.10054; L2-SP, https://arxiv.org/abs/1802.01483; for adapters see ``jtl.adapters``.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from experiments.common import Config, above, at_least, finish, main, prepare, techniques
from experiments.common.classification import Classification, frozen, prepare_classification
from jtl import data, pretrained
from jtl.errors import InputError
from jtl.report import Result, Section, confident_errors, figures, table

QUICK_EPOCHS = 5  # of 256 examples


@dataclass(frozen=True, kw_only=True)
class Finetune(Config):
    """Settings of the fine-tuning."""

    model: str = "minilm"
    """minilm, efficientnet-lite0, a folder with config.json and weights, or a hub id org/name[@revision]."""
    data: str = "rotten_tomatoes"
    """rotten_tomatoes, newsgroups20, reuters_r8, mnist5k, uci_digits, tfds:NAME, a CSV or JSONL file, or a folder."""
    technique: techniques.Technique = "full"
    """How to adapt the model."""
    seeds: int = at_least(1, 1)
    """Repeat with this many seeds; intervals need at least two."""
    train_examples: int = at_least(0, 2000)
    """Labelled training examples, stratified; 0 for all there are."""
    test_examples: int = at_least(0, 1000)
    """Test examples; 0 for all there are."""
    epochs: int = at_least(1, 2)
    """Passes over the training examples; always 5 with --quick."""
    batch_size: int = at_least(1, 32)
    """Examples an update."""
    learning_rate: float | None = above(0, None)
    """Peak rate of AdamW; left out, the technique's usual one."""
    max_length: int = at_least(1, 128)
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
    """Fine-tune and test; writes into ``config.out`` and returns the result."""
    began = time.monotonic()
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

    rows: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []
    last = None
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
        curves += [{**point, "arm": config.technique, "seed": seed} for point in last.history]
    assert last is not None

    result = finish(
        "finetune",
        config,
        rows,
        _sections(task, last, curves),
        title=f"{config.technique}: {config.model} on {config.data}",
        about=_about(config, task, few),
        metrics=["accuracy", "macro_f1", "train_accuracy", "trained_parameters"],
        notes=_notes(few),
        seconds=time.monotonic() - began,
    )
    if config.save:
        names = dict(enumerate(task.dataset.classes))
        model = techniques.merge_adapter(last.model, config.technique)
        pretrained.save(model, out / "model", tokenizer=config.model, id2label=names, overwrite=config.resume)
    return result


def _check_savable(config: Finetune, task: Classification) -> None:
    model = techniques.initial_model(task, config.technique, jax.random.key(0))
    try:
        pretrained.check_savable(techniques.merge_adapter(model, config.technique))
    except ValueError as error:
        raise InputError(f"--save with --technique {config.technique} on {config.model}: {error}") from error


def _about(config: Finetune, task: Classification, few: Classification) -> str:
    sizes = {split: len(part) for split, part in few.splits.items()}
    return (
        f"The pretrained model `{config.model}` was adapted to `{config.data}` ({len(task.dataset.classes)} classes; "
        f"{sizes['train']:,} training, {sizes['validation']:,} validation and {sizes['test']:,} test examples) by "
        f"`{config.technique}`. `majority` always predicts the most frequent class; `probe` is a logistic regression "
        "on the frozen features. The model that validated best was tested, once."
    )


def _notes(task: Classification) -> list[str]:
    notes = [f"Data: {task.dataset.origin}.", *task.dataset.notes]
    if cut := getattr(task.splits["train"], "truncated", 0):
        notes.append(f"{cut} training texts were cut to {task.preprocessing['max_length']} tokens.")
    return notes


def _sections(task: Classification, last: techniques.Arm, curves: list[dict[str, Any]]) -> list[Section]:
    names = task.dataset.classes
    labels, test = last.test["label"], last.test
    before, _ = frozen(task, "test")
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
            figures.embeddings({"before": before, "after": test["features"]}, labels, names),
        ),
    ]
    probabilities = np.asarray(jax.nn.softmax(test["logits"]))
    source = task.dataset.splits["test"]
    rows = [source[i] for i in range(len(source))]
    if task.dataset.kind == "text":
        texts = [row["text"] for row in rows]
        sections.append(Section("Surest errors", confident_errors(texts, labels, probabilities, names)))
    else:
        sections.append(Section("Surest errors", *_image_errors(rows, labels, probabilities, names)))
    counts = np.bincount(data.labels(source), minlength=len(names))
    sizes = [[name, int(count)] for name, count in zip(names, counts, strict=True)]
    return [*sections, Section("Test classes", table(["class", "examples"], sizes))]


def _image_errors(
    rows: list[Any], labels: np.ndarray, probabilities: np.ndarray, names: tuple[str, ...]
) -> tuple[str, Any]:
    predicted = probabilities.argmax(-1)
    wrong = np.flatnonzero(predicted != labels)
    wrong = wrong[np.argsort(-probabilities[wrong, predicted[wrong]])][:12]
    if not len(wrong):
        return "No errors.", None
    figure = figures.images(
        [rows[i]["image"] for i in wrong],
        [names[labels[i]] for i in wrong],
        [names[predicted[i]] for i in wrong],
    )
    return "The wrong predictions that the model was surest of.", figure


if __name__ == "__main__":
    main(run, Finetune)
