"""Detection: find digits in scenes and name them, learned from few scenes.

Both arms have EfficientNet-Lite0 under a feature pyramid (Lin et al. 2017, https://arxiv.org/abs/1612.03144) and the
head of FCOS (Tian et al. 2019, https://arxiv.org/abs/1904.01355). The trunk of ``transfer`` is pretrained on ImageNet,
that of ``scratch`` has random weights; both see the same scenes, with as many updates. The metric is COCO's mean
average precision.

    python -m experiments.detection --out runs/detection
    python -m experiments.detection --out runs/detection --predict pictures/

The second command finds objects in a picture, or those in a folder, with the model that the first left in ``OUT``. The
scenes are real digits over crops of two photographs. Public data: ``--data tfds:voc/2007``, ``--data tfds:coco/2017``;
your own: ``--data FOLDER`` with ``annotations.json`` in COCO's layout and the images.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from experiments.common import ResumableRows, at_least, main, predictions
from experiments.common import dense_prediction as dense
from jtl import data
from jtl._files import write_file
from jtl.data import image
from jtl.data.batches.loader import Batches
from jtl.data.encode.annotated import Annotated, with_boxes
from jtl.loss import Loss
from jtl.model import Model
from jtl.models.feature_pyramid import detector
from jtl.report import Result, Section, figures
from jtl.tasks import Detect, Detections, average_precision, detect

ABOUT = """\
Both arms have EfficientNet-Lite0 under a feature pyramid (Lin et al. 2017, https://arxiv.org/abs/1612.03144) and the
anchor-free head of FCOS (Tian et al. 2019, https://arxiv.org/abs/1904.01355), which predicts in every cell of the
pyramid the class of the object that covers it and the distances to the object's edges. The trunk of ``transfer`` is
pretrained on ImageNet, that of ``scratch`` has random weights; both see the same scenes for as many updates. The metric
is COCO's mean average precision. Validation picks the checkpoint, which is tested once. The default scenes, real digits
over crops of two photographs, are far simpler than photographs of things."""
REACH = 4.0  # strides: a level ends at half the sizes of the paper, as the images are small
SHOWN = 12
SURE = 0.35  # least score of a box that is drawn or listed
EDGES = ("left", "top", "right", "bottom")


@dataclass(frozen=True, kw_only=True)
class Detection(dense.DenseConfig):
    """Settings of the application."""

    data: str = "scenes"
    """Images with boxes: scenes, tfds:NAME, or a folder in COCO's layout."""
    most_objects: int = at_least(1, 20)
    """Objects of an image that are learned, and found, at most."""


class Trainer(dense.Trainer[Detection]):
    """Detectors and their average precision."""

    experiment, metric, metrics = "detection", "map", ("map", "map_50", "map_75")
    quick_updates = 40

    def load(self) -> data.Dataset:
        """A data set with boxes."""
        return data.load(self.config.data, "boxes")

    def annotated(self, source: data.Source, how: image.Preprocess) -> Annotated:
        """Images and boxes."""
        return with_boxes(source, how, self.config.most_objects)

    def with_head(self, trunk: Model, classes: int, *, key: jax.Array, params: Any = None) -> Model:
        """``trunk`` under FCOS."""
        return detector(trunk, classes, key=key, params=params)

    def loss(self, stats: Literal["running", "batch"]) -> Loss:
        """That of FCOS."""
        return Detect(reach=REACH, stats=stats)

    def scores(self, model: Model, split: Annotated) -> dict[str, float]:
        """Average precision."""
        boxes, score, label = detections(model, split, self.config.most_objects)
        return average_precision(boxes, score, label, split.fields["boxes"], split.fields["box_label"])


def run(config: Detection) -> Result:
    """Train, test and report; writes into ``config.out`` and returns the result."""
    return dense.run(Trainer, config, _sections, title="Detection", about=ABOUT)


@partial(jax.jit, static_argnames=("most", "one_class"))
def _decoded(model: Model, image: jax.Array, most: int, one_class: bool) -> Detections:
    height, width = image.shape[1:3]
    return detect.decode(model({"image": image}), (height, width), most=most, one_class=one_class)


def detections(
    model: Model, split: Annotated, most: int, one_class: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes, scores and labels of every image of ``split``, in pixels of the resized images; see ``detect.decode``."""
    parts = []
    for batch in Batches(split, min(32, len(split)), train=False):
        decoded = _decoded(model, batch["image"], most, one_class)
        parts.append([np.asarray(x)[batch["weight"] > 0] for x in decoded])
    boxes, score, label = map(np.concatenate, zip(*parts, strict=True))
    return boxes, score, label


def _drawn(
    trainer: Trainer, model: Model, split: Annotated, names: tuple[str, ...]
) -> tuple[list[np.ndarray], list[list[tuple[str, float]]]]:
    """For each image the boxes of at least ``SURE``, and their names with scores."""
    boxes, score, label = detections(model, split, trainer.config.most_objects, one_class=True)
    sure = score >= SURE
    named = [
        [(names[c], float(s)) for c, s in zip(label[i][own], score[i][own], strict=True)]
        for i, own in enumerate(sure)
    ]
    return [boxes[i][own] for i, own in enumerate(sure)], named


def _titles(named: list[list[tuple[str, float]]]) -> list[list[str]]:
    return [[f"{name} {score:.2f}" for name, score in own] for own in named]


def predict(config: Detection) -> None:
    """Find objects in pictures with the model in ``config.out``; writes predictions.csv and predictions.png there."""
    assert config.predict is not None
    trainer, model, names = Trainer(config).restored()
    files, images = predictions.pictures(config.predict)
    boxes, named = _drawn(trainer, model, trainer.unlabelled(images), names)
    rows = []
    for i, (file, pixels) in enumerate(zip(files, images, strict=True)):
        height, width = pixels.shape[:2]
        boxes[i] = boxes[i] * np.array([width, height, width, height]) / trainer.config.image_size
        for box, (name, score) in zip(boxes[i], named[i], strict=True):
            edges = {edge: f"{value:.1f}" for edge, value in zip(EDGES, box, strict=True)}
            rows.append({"picture": str(file), "label": name, "score": f"{score:.4f}", **edges})
    out = Path(config.out)
    predictions.write_table(out / "predictions.csv", rows, ["picture", "label", "score", *EDGES])
    picture = figures.boxes(images[:SHOWN], boxes[:SHOWN], _titles(named[:SHOWN]))
    write_file(out / "predictions.png", figures.png(picture))
    print(
        f"{len(rows)} objects in {len(files)} pictures: {out / 'predictions.csv'}, {out / 'predictions.png'}"
    )


def _sections(trainer: Trainer, rows: ResumableRows) -> list[Section]:
    trainer, model, names = trainer.restored()
    some = trainer.first_of_test(SHOWN)
    boxes, named = _drawn(trainer, model, some, names)
    true = [own[real] for own, real in zip(some.fields["boxes"], some.fields["box_label"] >= 0, strict=True)]
    return [
        Section(
            "Found",
            f"The first test images under transfer, the first seed: boxes of a score of {SURE} or more in orange, with "
            "class and score; the true ones white and dashed.",
            figures.boxes(list(some.pixels), boxes, _titles(named), true),
        ),
        Section(
            "Learning curves",
            "Training loss (its three parts together) and validation mAP.",
            figures.learning_curves(rows.curves, "validation_map", loss="training loss"),
        ),
    ]


if __name__ == "__main__":
    main(run, Detection, predict)
