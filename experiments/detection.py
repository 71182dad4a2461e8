"""Detection: where the digits of a scene are and which they are, learned from few scenes.

Both arms have EfficientNet-Lite0 under a feature pyramid (Lin et al. 2017, https://arxiv.org/abs/1612.03144) and the
head of FCOS (Tian et al. 2019, https://arxiv.org/abs/1904.01355), which says in every cell of the pyramid what object
it lies in and how far the edges are; no anchors. ``transfer`` begins with the weights of ImageNet, ``scratch`` with
random ones; both see the same scenes for as many updates. The metric is COCO's mean average precision. Models were
chosen on validation and tested once.

    python -m experiments.detection --out runs/detection

Expected (``experiments/results/detection.json``, three seeds, 23 minutes of one shared core): ``map`` 0.518 ± 0.036
(``transfer``) and 0.199 ± 0.069 (``scratch``), ``map_50`` 0.783 ± 0.067 and 0.351 ± 0.118.

The trained model lies in ``OUT``; it finds objects in a picture or a folder of them:

    python -m experiments.detection --out runs/detection --predict pictures/

The scenes are real digits over crops of two photographs (see ``experiments.data.scenes``): far
simpler than photographs of things. Public data: ``--data tfds:voc/2007``, ``--data tfds:coco/2017``; your own: a folder
with ``annotations.json`` in COCO's layout and the images.
"""

from __future__ import annotations

import csv
import time
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.common import dense_prediction as dense
from experiments.common import study
from experiments.common.command_line import main
from experiments.common.resumable_rows import ResumableRows
from experiments.common.settings import command, prepare, settings
from jtl import data
from jtl._files import write_file
from jtl.data.batches.loader import Batches
from jtl.data.encode.annotated import Annotated, with_boxes
from jtl.model import Model
from jtl.models.feature_pyramid import detector
from jtl.report import figures
from jtl.report.report import Result, Section, environment, summarise, write_report, write_result
from jtl.tasks import Detect, Detections, average_precision, detect

METRICS = ("map", "map_50", "map_75")
# By validation mAP after 300 updates, one seed each: of transfer 2e-3 (0.33), 5e-3 (0.38), and 5e-3 with the trunk at
# the full rate (0.24); of scratch 2e-3 (0.05) and 5e-3 (0.07).
RATES = {"transfer": 5e-3, "scratch": 5e-3}
REACH = 4.0  # strides: a level ends at half the sizes of the paper, as the images are small
SHOWN = 12
SURE = 0.35  # least score of a box that is drawn or listed


@dataclass(frozen=True, kw_only=True)
class Detection(dense.DenseConfig):
    """Settings of the application."""

    data: str = "scenes"
    """Images with boxes: scenes, tfds:NAME, or a folder in COCO's layout."""
    updates: int = 500
    """Updates of each arm."""
    most_objects: int = 20
    """Objects of an image that are learned, and found, at most."""


def run(config: Detection) -> Result:
    """Train, test and report; writes into ``config.out`` and returns the result."""
    config = dense.shortened(config, updates=40)
    dense.check(config, config.updates)
    out = prepare(config, "detection")
    ledger = ResumableRows(out, resume=config.resume)
    print(_dataset(config, config.seed))
    for seed in range(config.seed, config.seed + config.seeds):
        for arm in dense.ARMS:
            row = ledger.get(partial(trained, config, arm, seed), arm=arm, seed=seed)
            print(
                f"seed {seed}  {arm}  mAP {row['map']:.3f}  mAP 50 {row['map_50']:.3f}  {row['seconds']:.0f} s"
            )

    loaded = _dataset(config, config.seed)
    summary = summarise(ledger.rows, [*METRICS, "seconds"])
    result = Result("detection", settings(config), environment(), ledger.seconds, ledger.rows, summary)
    write_result(out, result)
    write_report(
        out,
        result,
        title="Detection",
        about=" ".join(__doc__.split("\n\n")[1].split()),
        command=command("detection", config),
        sections=_sections(config, loaded, ledger),
        notes=[f"Data: {loaded.origin}.", *loaded.notes],
    )
    return result


def trained(config: Detection, arm: str, seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The row and learning curve of a detector that learns from the scenes; keeps the first ``transfer``."""
    began = time.monotonic()
    loaded = _dataset(config, seed)
    splits = {split: _prepare(config, source) for split, source in loaded.splits.items()}
    keys = jax.random.split(jax.random.key(seed))
    model = detector(dense.trunk(config, arm, keys[0]), len(loaded.classes), key=keys[1])
    loss = Detect(reach=REACH, stats="batch" if arm == "scratch" else "running")
    fitted = dense.adapt(
        config, model, loss, splits["train"], lambda model: _score(config, model, splits["validation"]),
        arm=arm, metric="map", updates=config.updates, rate=RATES[arm], seed=seed,
    )  # fmt: skip
    if arm == "transfer" and seed == config.seed:
        dense.keep(config, fitted.model, loaded.classes)
    row = {
        **_score(config, fitted.model, splits["test"]),
        "validation_map": fitted.best["value"] if fitted.best else None,
        "seconds": time.monotonic() - began,
        "steps": config.updates,
        "learning_rate": config.learning_rate or RATES[arm],
    }
    return row, fitted.history


@lru_cache(1)
def _dataset(config: Detection, seed: int) -> data.Dataset:
    return dense.dataset(config, config.data, partial(data.load, config.data, "boxes"), seed)


def _prepare(config: Detection, source: data.Source) -> Annotated:
    return with_boxes(source, dense.preprocessing(config), config.most_objects)


# --- finding and scoring ---------------------------------------------------------------------------


@partial(jax.jit, static_argnames=("most", "one_class"))
def _decoded(model: Model, image: jax.Array, most: int, one_class: bool) -> Detections:
    return detect.decode(model({"image": image}), image.shape[1:3], most=most, one_class=one_class)


def found(model: Model, split: Annotated, most: int, one_class: bool = False) -> Detections:
    """What the model finds in every image of ``split``, in pixels of the resized images; see ``detect.decode``."""
    parts = []
    for batch in Batches(split, min(32, len(split)), train=False):
        decoded = _decoded(model, batch["image"], most, one_class)
        parts.append(jax.tree.map(lambda x, real=batch["weight"] > 0: np.asarray(x)[real], decoded))
    return Detections(*map(np.concatenate, zip(*parts, strict=True)))


def _score(config: Detection, model: Model, split: Annotated) -> dict[str, float]:
    return average_precision(
        *found(model, split, config.most_objects), split.fields["boxes"], split.fields["box_label"]
    )


# --- use again -------------------------------------------------------------------------------------


def label(config: Detection, path: Path) -> None:
    """Find objects in pictures by the model in ``config.out``; writes predictions.csv and predictions.png there."""
    trunk, head, names, config = dense.kept(config)
    files, images = dense.pictures(path)
    model = detector(trunk, len(names), key=jax.random.key(0), params=head)
    said = found(model, dense.unlabelled(config, images), config.most_objects, one_class=True)
    rows, drawn = [], []
    for i, (file, image) in enumerate(zip(files, images, strict=True)):
        height, width = image.shape[:2]
        sure = said.score[i] >= SURE
        boxes = said.boxes[i][sure] * np.array([width, height, width, height]) / config.image_size
        drawn.append(
            (
                boxes,
                [
                    f"{names[c]} {s:.2f}"
                    for c, s in zip(said.label[i][sure], said.score[i][sure], strict=True)
                ],
            )
        )
        for box, c, score in zip(boxes, said.label[i][sure], said.score[i][sure], strict=True):
            edges = dict(
                zip(("left", "top", "right", "bottom"), (f"{edge:.1f}" for edge in box), strict=True)
            )
            rows.append({"picture": str(file), "label": names[c], "score": f"{score:.4f}", **edges})
    out = Path(config.out)
    with (out / "predictions.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["picture", "label", "score", "left", "top", "right", "bottom"])
        writer.writeheader()
        writer.writerows(rows)
    boxes, named = zip(*drawn[:SHOWN], strict=True)
    write_file(out / "predictions.png", figures.png(figures.boxes(images[:SHOWN], boxes, named)))
    print(
        f"{len(rows)} objects in {len(files)} pictures: {out / 'predictions.csv'}, {out / 'predictions.png'}"
    )


# --- report ----------------------------------------------------------------------------------------


def _sections(config: Detection, loaded: data.Dataset, ledger: ResumableRows) -> list[Section]:
    trunk, head, names, _ = dense.kept(config)
    model = detector(trunk, len(names), key=jax.random.key(0), params=head)
    some = _prepare(
        config, data.Subset(loaded.splits["test"], np.arange(min(SHOWN, len(loaded.splits["test"]))))
    )
    said = found(model, some, config.most_objects, one_class=True)
    sure = said.score >= SURE
    labels = [
        [f"{names[c]} {s:.2f}" for c, s in zip(said.label[i][own], said.score[i][own], strict=True)]
        for i, own in enumerate(sure)
    ]
    real = some.fields["box_label"] >= 0
    picture = figures.boxes(
        list(some.pixels),
        [said.boxes[i][own] for i, own in enumerate(sure)],
        labels,
        [some.fields["boxes"][i][own] for i, own in enumerate(real)],
    )
    return [
        study.transferred_or_scratch(ledger.rows, METRICS),
        Section(
            "Found",
            f"The first test images under transfer, the first seed: boxes of a score of {SURE} or more in orange, with "
            "class and score; what is there, white and dashed.",
            picture,
        ),
        Section(
            "Learning curves",
            "Training loss (its three parts together) and validation mAP.",
            figures.learning_curves(ledger.curves, "validation_map", loss="training loss"),
        ),
    ]


def predict(config: Detection) -> None:
    """Find objects with what was trained."""
    assert config.predict is not None
    label(config, config.predict)


if __name__ == "__main__":
    main(run, Detection, predict)
