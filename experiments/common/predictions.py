"""What the applications share: the comparison that matters, and a model that is trained once and used again."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.common.classification import Classification
from jtl import pretrained
from jtl.model import Model

MODEL, TEST = "model", "test.npz"  # in --out


def keep(out: Path, model: Model, task: Classification, test: dict[str, np.ndarray]) -> None:
    """Store a classifier as a Hugging Face folder, with the names of its classes, and what it says on test."""
    pretrained.check_savable(model)
    tokenizer = task.model_name if task.dataset.kind == "text" else None
    names = dict(enumerate(task.dataset.classes))
    pretrained.save(model, out / MODEL, tokenizer=tokenizer, id2label=names, overwrite=True)
    np.savez(out / TEST, **{name: test[name] for name in ("logits", "label")})


def kept_test(out: Path) -> dict[str, np.ndarray]:
    """What the stored model says on test, in the order of the split: ``logits`` (N, C) and ``label`` (N,)."""
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


def surest(
    labels: np.ndarray, chances: np.ndarray, names: Sequence[str], count: int
) -> tuple[list[int], list[str]]:
    """The rows that a model was surest of, rightly and wrongly by halves, and a title for each."""
    predicted, sure = chances.argmax(-1), chances.max(-1)
    order = np.argsort(-sure, kind="stable")
    chosen = [
        int(i) for hit in (True, False) for i in order[(predicted == labels)[order] == hit][: count // 2]
    ]
    return chosen, [f"{names[predicted[i]]} ({sure[i]:.2f}), truly {names[labels[i]]}" for i in chosen]


def write_predictions(
    out: Path, what: str, things: Sequence[str], chances: np.ndarray, names: Sequence[str]
) -> None:
    """Write ``predictions.csv``, a row a thing, and print the first of them."""
    rows = [
        {what: thing, "label": names[int(own.argmax())], "probability": f"{own.max():.4f}"}
        for thing, own in zip(things, chances, strict=True)
    ]
    with (out / "predictions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for row in rows[:20]:
        print(f"{row['label']:>16}  {float(row['probability']):.2f}  {row[what][-100:]}")
    print(f"{len(rows)} {what}s labelled: {out / 'predictions.csv'}")
