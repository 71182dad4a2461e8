"""Segmentation: name the digit that each pixel of a scene belongs to, learned from few scenes.

Both arms have EfficientNet-Lite0 under a feature pyramid and a small decoder that adds up its levels (Kirillov et al.
2019, https://arxiv.org/abs/1901.02446), trained with cross-entropy and the Dice loss. The trunk of ``transfer`` is
pretrained on ImageNet, that of ``scratch`` has random weights; both see the same scenes, with as many updates. The
metrics are the means over classes of IoU (intersection over union) and of Dice's coefficient.

    python -m experiments.segmentation --out runs/segmentation
    python -m experiments.segmentation --out runs/segmentation --predict pictures/

The second command makes the masks of a picture, or those in a folder, with the model that the first left in ``OUT``.
The scenes are real digits over crops of two photographs. Public data: ``--data tfds:oxford_iiit_pet``; your own:
``--data FOLDER`` with ``images/`` and ``masks/``, whose values are the classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from experiments.common import ResumableRows, at_least, main, predictions
from experiments.common import dense_prediction as dense
from jtl import data
from jtl._files import write_file
from jtl.data import image
from jtl.data.batches.loader import Batches
from jtl.data.encode.annotated import Annotated, with_masks
from jtl.loss import Loss
from jtl.model import Model
from jtl.models.feature_pyramid import segmenter
from jtl.report import Result, Section, figures, table
from jtl.tasks import Dice, Segment, pixel_confusion, segmentation_scores

ABOUT = """\
Both arms have EfficientNet-Lite0 under a feature pyramid and a small decoder that adds up its levels (Kirillov et al.
2019, https://arxiv.org/abs/1901.02446), trained with cross-entropy and the Dice loss. The trunk of ``transfer`` is
pretrained on ImageNet, that of ``scratch`` has random weights; both see the same scenes for as many updates. The
metrics are the means over classes of IoU (intersection over union) and of Dice's coefficient. Learning rates are those
of ``experiments.detection``. Validation picks the checkpoint, which is tested once. The default scenes are real digits
over crops of two photographs, whose strokes are two to six pixels wide."""
SHOWN = 6


@dataclass(frozen=True, kw_only=True)
class Segmentation(dense.DenseConfig):
    """Settings of the application."""

    data: str = "scenes"
    """Images with masks: scenes, tfds:NAME, or a folder with images/ and masks/."""
    mask_column: str | None = None
    """Column of the masks in a tfds data set that has several."""
    updates: int = at_least(1, 400)
    """Updates of each arm."""


class Trainer(dense.Trainer[Segmentation]):
    """Segmenters and the overlap of their masks."""

    experiment, metric, metrics = "segmentation", "mean_iou", ("mean_iou", "mean_dice")
    quick_updates = 30

    def load(self) -> data.Dataset:
        """A data set with masks."""
        return data.load(self.config.data, "masks", mask_column=self.config.mask_column)

    def annotated(self, source: data.Source, how: image.Preprocess) -> Annotated:
        """Images and masks."""
        return with_masks(source, how)

    def classes(self, dataset: data.Dataset) -> tuple[str, ...]:
        """Names of the values of a mask."""
        return ("background", *dataset.classes) if dataset.name == "scenes" else dataset.classes

    def with_head(self, trunk: Model, classes: int, *, key: jax.Array, params: Any = None) -> Model:
        """``trunk`` under a decoder."""
        return segmenter(trunk, classes, key=key, params=params)

    def loss(self, stats: Literal["running", "batch"]) -> Loss:
        """Cross-entropy and Dice."""
        return Segment(stats=stats) + Dice(stats=stats)

    def scores(self, model: Model, split: Annotated) -> dict[str, float]:
        """IoU, Dice and the share of pixels that are right."""
        return segmentation_scores(self.confusion(model, split))

    def tested(self, model: Model, split: Annotated) -> dict[str, Any]:
        """The scores and the confusion of pixels."""
        confusion = self.confusion(model, split)
        return {**segmentation_scores(confusion), "confusion": confusion.tolist()}

    def confusion(self, model: Model, split: Annotated) -> np.ndarray:
        """Pixels of each true class (rows) that were given to each class."""
        return pixel_confusion(zip(split.fields["mask"], masks(model, split), strict=True), len(self.names))


def run(config: Segmentation) -> Result:
    """Train, test and report; writes into ``config.out`` and returns the result."""
    return dense.run(
        Trainer, config, _sections, title="Segmentation", about=ABOUT, metrics=("pixel_accuracy",)
    )


@jax.jit
def _classes(model: Model, image: jax.Array) -> jax.Array:
    return jnp.argmax(model({"image": image})["pixel_logits"], -1).astype(jnp.uint8)


def masks(model: Model, split: Annotated) -> np.ndarray:
    """The class of every pixel of ``split``, at the size of the resized images: uint8 (N, H, W)."""
    batches = Batches(split, min(16, len(split)), train=False)
    parts = [np.asarray(_classes(model, batch["image"]))[batch["weight"] > 0] for batch in batches]
    return np.concatenate(parts)


def predict(config: Segmentation) -> None:
    """Segment pictures by the model in ``config.out``; writes predictions.png and predictions/NAME.png, of classes."""
    assert config.predict is not None
    trainer, model, names = Trainer(config).restored()
    files, images = predictions.pictures(config.predict)
    out, drawn = Path(config.out), []
    (out / "predictions").mkdir(exist_ok=True)
    for file, pixels, mask in zip(files, images, masks(model, trainer.unlabelled(images)), strict=True):
        own = Image.fromarray(mask).resize(pixels.shape[1::-1], Image.Resampling.NEAREST)
        own.save(out / "predictions" / f"{file.stem}.png")
        drawn.append(np.asarray(own))
    picture = figures.masks(images[:SHOWN], {"found": drawn[:SHOWN]}, names, _clear(names))
    write_file(out / "predictions.png", figures.png(picture))
    print(f"{len(files)} masks: {out / 'predictions'}; drawn: {out / 'predictions.png'}")


def _clear(names: tuple[str, ...]) -> int | None:
    return names.index("background") if "background" in names else None


def _sections(trainer: Trainer, rows: ResumableRows) -> list[Section]:
    trainer, model, names = trainer.restored()
    some = trainer.first_of_test(SHOWN)
    shown = {"true": list(some.fields["mask"]), "transfer": list(masks(model, some))}
    confusion = np.array(next(row for row in rows.rows if row["arm"] == "transfer")["confusion"])
    hits, sizes = np.diag(confusion), confusion.sum(0) + confusion.sum(1)
    lines = [
        [name, int(confusion[c].sum()), float(hits[c] / max(sizes[c] - hits[c], 1)),
         float(2 * hits[c] / max(sizes[c], 1))]
        for c, name in enumerate(names)
    ]  # fmt: skip
    return [
        Section(
            "Masks",
            "The first test images, their true masks, and those of transfer, the first seed.",
            figures.masks(list(some.pixels), shown, names, _clear(names)),
        ),
        Section(
            "Learning curves",
            "Training loss (cross-entropy and Dice together) and validation mean IoU.",
            figures.learning_curves(rows.curves, "validation_mean_iou", loss="training loss"),
        ),
        Section(
            "Classes",
            "Of transfer on test, the first seed.\n\n" + table(["class", "pixels", "IoU", "Dice"], lines),
        ),
    ]


if __name__ == "__main__":
    main(run, Segmentation, predict)
