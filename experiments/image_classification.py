"""Image classification: learn from a few labelled pictures of each class with networks pretrained on other pictures.

``transfer`` fine-tunes the first of ``--models``, whose head begins as a linear probe (LP-FT, Kumar et al. 2022,
https://arxiv.org/abs/2202.10054), on ``--shots`` labelled pictures of each class; ``scratch`` trains the same
architecture from random weights, with as many updates. ``probe_MODEL`` is a logistic regression on the frozen features
of each of ``--models``.

    python -m experiments.image_classification --out runs/image_classification
    python -m experiments.image_classification --out runs/image_classification --predict pictures/

The second command labels a picture, or those in a folder, with the model that the first left in ``OUT/model``. Public
data: ``--data tfds:cifar10``, ``--data tfds:oxford_flowers102``; your own: ``--data FOLDER`` with a folder of pictures
for each class.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.common import Config, ResumableRows, at_least, main, predictions, prepare, study, techniques
from experiments.common.classification import Classification, prepare_classification
from jtl import pretrained
from jtl.data import image
from jtl.errors import InputError
from jtl.outputs import outputs
from jtl.report import Result, Section, figures
from jtl.tasks import occlusion

ABOUT = """\
``transfer`` fine-tunes EfficientNet-Lite0, whose head begins as a linear probe (LP-FT, Kumar et al. 2022,
https://arxiv.org/abs/2202.10054), on ``--shots`` labelled pictures of each class; ``scratch`` trains the same
architecture from random weights on the same pictures, for as many updates. ``probe_MODEL`` is a logistic regression on
the frozen features of each of ``--models``: by default a network pretrained on ImageNet, the VGG16 of an edge detector,
and the DINOv2 of a saliency model. Validation picks the checkpoint, which is tested once. The default data are digits,
far from the photographs that these networks were trained on: what transfers is what all pictures have in common."""
SHOWN = 12
PATCHES = 6  # squares that hide a part of the image, along a side


@dataclass(frozen=True, kw_only=True)
class ImageClassification(Config):
    """Settings of the application."""

    models: tuple[str, ...] = ("efficientnet-lite0", "vgg16", "dinov2-small-focus")
    """Pretrained networks: the first is fine-tuned, all are probed."""
    data: str = "mnist5k"
    """Labelled pictures: mnist5k, uci_digits, tfds:NAME, or a folder; see experiments.finetune."""
    shots: int = at_least(1, 20)
    """Labelled training pictures of each class."""
    image_size: int = at_least(1, 56)
    """Side of the pictures in pixels, a multiple of 14 for DINOv2."""
    updates: int = at_least(1, 80)
    """Updates of transfer and of scratch."""
    batch_size: int = at_least(1, 16)
    """Pictures of an update."""
    test_examples: int = at_least(0, 1000)
    """Test pictures; 0 for all there are."""
    image_column: str | None = None
    """Column of the pictures in a tfds data set that has several."""
    seeds: int = at_least(1, 3)
    """Repetitions: other training pictures, heads and orders."""
    predict: Path | None = None
    """A picture, or a folder of them, to label by the model that an earlier run left in --out."""


def run(config: ImageClassification) -> Result:
    """Train, test and report; writes into ``config.out`` and returns the result."""
    if not config.models:
        raise InputError("--models names no network: the first is fine-tuned, so give one or more")
    out = prepare(config, "image_classification")
    rows = ResumableRows(out, resume=config.resume)
    models = config.models[:1] if config.quick else config.models
    tasks = {name: _task(config, name) for name in models}
    first = tasks[models[0]]
    print(first.dataset)
    for seed in range(config.seed, config.seed + (1 if config.quick else config.seeds)):
        few = {name: task.with_train(config.shots * task.classes, seed) for name, task in tasks.items()}
        for arm in ("transfer", "scratch"):
            row = rows.get(partial(trained, config, few[models[0]], arm, seed), arm=arm, seed=seed)
            print(f"seed {seed}  {arm}  accuracy {row['accuracy']:.3f}  {row['seconds']:.0f} s")
        for name, task in few.items():
            row = rows.get(partial(probed, task), arm=f"probe_{name}", seed=seed)
            print(f"seed {seed}  probe_{name}  accuracy {row['accuracy']:.3f}  {row['seconds']:.0f} s")

    return study.finish(
        "image_classification", config, rows, _sections(first, out, rows), title="Image classification", about=ABOUT,
        metrics=("accuracy", "macro_f1"), notes=[f"Data: {first.dataset.origin}.", *first.dataset.notes],
    )  # fmt: skip


def _task(config: ImageClassification, model: str) -> Classification:
    return prepare_classification(
        model, config.data, image_size=config.image_size, validation=200 if config.quick else 500,
        test=200 if config.quick else config.test_examples or None, image_column=config.image_column,
    )  # fmt: skip


def probed(few: Classification) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The row of a logistic regression on frozen features."""
    return techniques.probe(few)[1], []


def trained(
    config: ImageClassification, few: Classification, arm: str, seed: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The row and learning curve of a trained arm; stores the first ``transfer``."""
    updates = 40 if config.quick else config.updates
    budget = techniques.Budget(
        1, min_steps=updates, max_steps=updates, batch_size=config.batch_size, validations=4
    )
    found = techniques.run_arm(few, {"transfer": "lp_ft"}.get(arm, arm), seed=seed, budget=budget)
    if arm == "transfer" and seed == config.seed:
        predictions.keep(Path(config.out), found.model, few, found.test)
    return found.row, found.history


# --- use again -------------------------------------------------------------------------------------


def predict(config: ImageClassification) -> None:
    """Label pictures with the model in ``config.out``; writes predictions.csv there."""
    assert config.predict is not None
    out = Path(config.out)
    names = predictions.kept_classes(out)
    files, pixels = predictions.pictures(config.predict)
    model = pretrained.load(out / predictions.MODEL)
    how = image.Preprocess(**pretrained.image_processor(config.models[0])).resized(config.image_size)
    split = image.prepare([{"image": one, "label": 0} for one in pixels], how)
    batch = split.batch(np.arange(len(files)), split.buckets[0], None)
    logits = outputs(model, [{"image": batch["image"]}], ("logits",))["logits"]
    probabilities = np.asarray(jax.nn.softmax(logits))
    predictions.write_labels(out, "picture", [str(file) for file in files], probabilities, names)


# --- report ----------------------------------------------------------------------------------------


def _sections(task: Classification, out: Path, rows: ResumableRows) -> list[Section]:
    test, names = predictions.kept_test(out), task.dataset.classes
    probabilities = np.asarray(jax.nn.softmax(test["logits"]))
    chosen, titles = predictions.surest(test["label"], probabilities, names, SHOWN)
    places = np.array(chosen)
    side = task.preprocessing["size"][0]
    batch = task.splits["test"].batch(places, task.buckets[0], None)
    hide = jax.jit(partial(occlusion, patch=max(2, 2 * side // (PATCHES + 1))))
    maps = np.asarray(hide(pretrained.load(out / predictions.MODEL), {"image": batch["image"]}))
    pictures = [task.dataset.splits["test"][int(i)]["image"] for i in places]
    return [
        study.transferred_or_scratch(rows.rows, ("accuracy", "macro_f1")),
        Section(
            "Learning curves",
            "Training loss and validation accuracy.",
            figures.learning_curves(rows.curves),
        ),
        Section(
            "Confusion",
            "True against predicted, transfer, the first seed.",
            figures.confusion(test["label"], test["logits"].argmax(-1), names),
        ),
        Section(
            "What it leans on",
            "Parts of a picture that lower the probability of the predicted class if hidden, blue, or raise it, "
            "orange, in the pictures that the model was most confident about, right and wrong ones.",
            figures.saliency(pictures, list(maps), titles),
        ),
    ]


if __name__ == "__main__":
    main(run, ImageClassification, predict)
