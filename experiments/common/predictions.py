"""Saves the model of an application, loads it for ``--predict``, and writes what it predicts."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common.classification import Classification
from jtl import pretrained
from jtl._files import write_file
from jtl.data.readers.images import IMAGES, read_image
from jtl.model import Model
from jtl.report import to_json

MODEL, TEST = "model", "test.npz"  # in --out


def keep(out: Path, model: Model, task: Classification, test: dict[str, np.ndarray]) -> None:
    """Store a classifier as a Hugging Face folder with the names of its classes, and its outputs on test."""
    pretrained.check_savable(model)
    tokenizer = task.model_name if task.dataset.kind == "text" else None
    names = dict(enumerate(task.dataset.classes))
    pretrained.save(model, out / MODEL, tokenizer=tokenizer, id2label=names, overwrite=True)
    np.savez(out / TEST, logits=test["logits"], label=test["label"])


def kept_test(out: Path) -> dict[str, np.ndarray]:
    """The stored model's outputs on test, in the order of the split: ``logits`` (N, C) and ``label`` (N,)."""
    with np.load(out / TEST) as stored:
        found = dict(stored)
    order = np.argsort(
        found.pop("index", np.arange(len(found["label"])))
    )  # earlier versions kept that of batches
    return {name: rows[order] for name, rows in found.items()}


def trained(path: Path) -> Path:
    """``path``, where a run left its model. Raises FileNotFoundError if there is none."""
    if not path.exists():
        raise FileNotFoundError(
            f"--predict needs a trained model, and {path} is none: run without --predict first"
        )
    return path


def kept_classes(out: Path) -> tuple[str, ...]:
    """The classes of the stored model. Raises FileNotFoundError if there is none."""
    folder = trained(out / MODEL)
    names = json.loads((folder / "config.json").read_text())["id2label"]
    return tuple(names[str(i)] for i in range(len(names)))


def keep_texts(path: Path, examples: Sequence[Mapping[str, Any]], arm: str, texts: Sequence[str]) -> None:
    """Store the texts that an arm writes in ``path``, a column beside the examples and the arms before it."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else examples
    write_file(path, to_json([{**row, arm: text} for row, text in zip(known, texts, strict=True)]))


def surest(
    labels: np.ndarray, probabilities: np.ndarray, names: Sequence[str], count: int
) -> tuple[list[int], list[str]]:
    """The rows with the most confident predictions, half of them right and half wrong, and a title for each."""
    predicted, confidence = probabilities.argmax(-1), probabilities.max(-1)
    order = np.argsort(-confidence, kind="stable")
    chosen = [
        int(i) for hit in (True, False) for i in order[(predicted == labels)[order] == hit][: count // 2]
    ]
    titles = [f"{names[predicted[i]]} ({confidence[i]:.2f}), truly {names[labels[i]]}" for i in chosen]
    return chosen, titles


def pictures(path: Path) -> tuple[list[Path], list[np.ndarray]]:
    """A picture, or those of a folder: files and pixels. Raises FileNotFoundError if there are none."""
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in IMAGES) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"--predict {path} holds no pictures ({', '.join(IMAGES)})")
    return files, [read_image(file) for file in files]


def write_labels(
    out: Path, kind: str, inputs: Sequence[str], probabilities: np.ndarray, names: Sequence[str]
) -> None:
    """Write ``predictions.csv``, a row for each input, under the column ``kind``; print the first 20."""
    rows = [
        {kind: one, "label": names[int(own.argmax())], "probability": f"{own.max():.4f}"}
        for one, own in zip(inputs, probabilities, strict=True)
    ]
    write_table(out / "predictions.csv", rows, list(rows[0]))
    for row in rows[:20]:
        print(f"{row['label']:>16}  {float(row['probability']):.2f}  {row[kind][-100:]}")
    print(f"{len(rows)} {kind}s labelled: {out / 'predictions.csv'}")


def write_table(path: Path, rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> None:
    """Write rows as a CSV file."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def write_json(out: Path, rows: Sequence[Mapping[str, Any]], line: str, done: str) -> None:
    """Write ``predictions.json``, print the first 20 rows in the format ``line``, and how many were ``done``."""
    write_file(out / "predictions.json", to_json(rows))
    for row in rows[:20]:
        print(line.format(**row))
    print(f"{len(rows)} {done}: {out / 'predictions.json'}")
