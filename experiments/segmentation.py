"""Segmentation: which digit every pixel of a scene belongs to, learned from few scenes.

Both arms have EfficientNet-Lite0 under a feature pyramid and a small decoder that adds up its levels (Kirillov et al.
2019, https://arxiv.org/abs/1901.02446), under cross-entropy and the Dice loss. ``transfer`` begins with the weights of
ImageNet, ``scratch`` with random ones; both see the same scenes for as many updates. The metrics are the mean over
classes of intersection over union and of Dice's coefficient. Rates are those
of ``experiments.detection``; the best of a run's validations was kept, and tested once.

    python -m experiments.segmentation --out runs/segmentation

Expected (``experiments/results/segmentation.json``, three seeds, 18 minutes of one shared core): ``mean_iou`` 0.534 ±
0.008 (``transfer``) and 0.248 ± 0.099 (``scratch``), ``mean_dice`` 0.685 ± 0.007 and 0.354 ± 0.144.

The trained model lies in ``OUT``; it gives the masks of a picture or a folder of them:

    python -m experiments.segmentation --out runs/segmentation --predict pictures/

The scenes are real digits over crops of two photographs (see ``experiments.data.scenes``); strokes
are two to six pixels wide. Public data: ``--data tfds:oxford_iiit_pet``; your own: a folder with ``images/`` and
``masks/``, whose values are the classes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from experiments.common import dense_prediction as dense
from experiments.common import study
from experiments.common.command_line import main
from experiments.common.resumable_rows import ResumableRows
from experiments.common.settings import command, prepare, settings
from jtl import data
from jtl._files import write_file
from jtl.data.batches.loader import Batches
from jtl.data.encode.annotated import Annotated, with_masks
from jtl.model import Model
from jtl.models.feature_pyramid import segmenter
from jtl.report import figures
from jtl.report.report import Result, Section, environment, summarise, table, write_report, write_result
from jtl.tasks import Dice, Segment, pixel_confusion, segmentation_scores

METRICS = ("mean_iou", "mean_dice")
# Those of detection, which were chosen on its validation scenes; no others were tried here.
RATES = {"transfer": 5e-3, "scratch": 5e-3}
SHOWN = 6


@dataclass(frozen=True, kw_only=True)
class Segmentation(dense.DenseConfig):
    """Settings of the application."""

    data: str = "scenes"
    """Images with masks: scenes, tfds:NAME, or a folder with images/ and masks/."""
    mask_column: str | None = None
    """Column of the masks in a tfds data set that has several."""
    updates: int = 400
    """Updates of each arm."""


def run(config: Segmentation) -> Result:
    """Train, test and report; writes into ``config.out`` and returns the result."""
    config = dense.shortened(config, updates=30)
    dense.check(config, config.updates)
    out = prepare(config, "segmentation")
    ledger = ResumableRows(out, resume=config.resume)
    print(_dataset(config, config.seed))
    for seed in range(config.seed, config.seed + config.seeds):
        for arm in dense.ARMS:
            row = ledger.get(partial(trained, config, arm, seed), arm=arm, seed=seed)
            scores = "  ".join(f"{name} {row[name]:.3f}" for name in METRICS)
            print(f"seed {seed}  {arm}  {scores}  {row['seconds']:.0f} s")

    loaded = _dataset(config, config.seed)
    summary = summarise(ledger.rows, [*METRICS, "pixel_accuracy", "seconds"])
    result = Result("segmentation", settings(config), environment(), ledger.seconds, ledger.rows, summary)
    write_result(out, result)
    write_report(
        out,
        result,
        title="Segmentation",
        about=" ".join(__doc__.split("\n\n")[1].split()),
        command=command("segmentation", config),
        sections=_sections(config, loaded, ledger),
        notes=[f"Data: {loaded.origin}.", *loaded.notes],
    )
    return result


def trained(config: Segmentation, arm: str, seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The row and learning curve of a segmenter that learns from the scenes; keeps the first ``transfer``."""
    began = time.monotonic()
    loaded = _dataset(config, seed)
    splits = {split: _prepare(config, source) for split, source in loaded.splits.items()}
    names = _names(loaded)
    keys = jax.random.split(jax.random.key(seed))
    model = segmenter(dense.trunk(config, arm, keys[0]), len(names), key=keys[1])
    stats = "batch" if arm == "scratch" else "running"
    fitted = dense.adapt(
        config, model, Segment(stats=stats) + Dice(stats=stats), splits["train"],
        lambda model: segmentation_scores(_confusion(model, splits["validation"], len(names))),
        arm=arm, metric="mean_iou", updates=config.updates, rate=RATES[arm], seed=seed,
    )  # fmt: skip
    if arm == "transfer" and seed == config.seed:
        dense.keep(config, fitted.model, names)
    confusion = _confusion(fitted.model, splits["test"], len(names))
    row = {
        **segmentation_scores(confusion),
        "confusion": confusion.tolist(),
        "validation_mean_iou": fitted.best["value"] if fitted.best else None,
        "seconds": time.monotonic() - began,
        "steps": config.updates,
        "learning_rate": config.learning_rate or RATES[arm],
    }
    return row, fitted.history


@lru_cache(1)
def _dataset(config: Segmentation, seed: int) -> data.Dataset:
    load = partial(data.load, config.data, "masks", mask_column=config.mask_column)
    return dense.dataset(config, config.data, load, seed)


def _names(loaded: data.Dataset) -> tuple[str, ...]:
    return ("background", *loaded.classes) if loaded.name == "scenes" else loaded.classes


def _prepare(config: Segmentation, source: data.Source) -> Annotated:
    return with_masks(source, dense.preprocessing(config))


# --- naming and scoring ----------------------------------------------------------------------------


@jax.jit
def _classes(model: Model, image: jax.Array) -> jax.Array:
    return jnp.argmax(model({"image": image})["pixel_logits"], -1).astype(jnp.uint8)


def named(model: Model, split: Annotated) -> np.ndarray:
    """The class of every pixel of ``split``, at the size of the resized images: uint8 (N, H, W)."""
    batches = Batches(split, min(16, len(split)), train=False)
    parts = [np.asarray(_classes(model, batch["image"]))[batch["weight"] > 0] for batch in batches]
    return np.concatenate(parts)


def _confusion(model: Model, split: Annotated, classes: int) -> np.ndarray:
    return pixel_confusion(zip(split.fields["mask"], named(model, split), strict=True), classes)


# --- use again -------------------------------------------------------------------------------------


def label(config: Segmentation, path: Path) -> None:
    """Segment pictures by the model in ``config.out``; writes predictions/NAME.png, of classes, and predictions.png."""
    trunk, head, names, config = dense.kept(config)
    files, images = dense.pictures(path)
    model = segmenter(trunk, len(names), key=jax.random.key(0), params=head)
    out, drawn = Path(config.out), []
    (out / "predictions").mkdir(exist_ok=True)
    for file, image, mask in zip(files, images, named(model, dense.unlabelled(config, images)), strict=True):
        own = Image.fromarray(mask).resize(image.shape[1::-1], Image.Resampling.NEAREST)
        own.save(out / "predictions" / f"{file.stem}.png")
        drawn.append(np.asarray(own))
    picture = figures.masks(images[:SHOWN], {"found": drawn[:SHOWN]}, names, _clear(names))
    write_file(out / "predictions.png", figures.png(picture))
    print(f"{len(files)} masks: {out / 'predictions'}; drawn: {out / 'predictions.png'}")


# --- report ----------------------------------------------------------------------------------------


def _clear(names: tuple[str, ...]) -> int | None:
    return names.index("background") if "background" in names else None


def _sections(config: Segmentation, loaded: data.Dataset, ledger: ResumableRows) -> list[Section]:
    trunk, head, names, _ = dense.kept(config)
    model = segmenter(trunk, len(names), key=jax.random.key(0), params=head)
    some = _prepare(
        config, data.Subset(loaded.splits["test"], np.arange(min(SHOWN, len(loaded.splits["test"]))))
    )
    rows = {"true": list(some.fields["mask"]), "transfer": list(named(model, some))}
    first = next(row for row in ledger.rows if row["arm"] == "transfer")
    confusion = np.array(first["confusion"])
    hits, sizes = np.diag(confusion), confusion.sum(0) + confusion.sum(1)
    lines = [
        [
            names[c],
            int(confusion[c].sum()),
            float(hits[c] / max(sizes[c] - hits[c], 1)),
            float(2 * hits[c] / max(sizes[c], 1)),
        ]
        for c in range(len(names))
    ]
    return [
        study.transferred_or_scratch(ledger.rows, METRICS),
        Section(
            "Masks",
            "The first test images, what is there, and what transfer says, the first seed.",
            figures.masks(list(some.pixels), rows, names, _clear(names)),
        ),
        Section(
            "Learning curves",
            "Training loss (cross-entropy and Dice together) and validation mean IoU.",
            figures.learning_curves(ledger.curves, "validation_mean_iou", loss="training loss"),
        ),
        Section(
            "Classes",
            "Of transfer on test, the first seed.\n\n" + table(["class", "pixels", "IoU", "Dice"], lines),
        ),
    ]


def predict(config: Segmentation) -> None:
    """Segment with what was trained."""
    assert config.predict is not None
    label(config, config.predict)


if __name__ == "__main__":
    main(run, Segmentation, predict)
