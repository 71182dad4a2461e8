"""Image classification from a few pictures of each class, by networks that were trained on other pictures.

``transfer`` fine-tunes EfficientNet-Lite0, whose head a probe has set (LP-FT, Kumar et al. 2022,
https://arxiv.org/abs/2202.10054), on ``--shots`` labelled pictures a class; ``scratch`` trains the same architecture
from random weights on the same pictures, for as many updates. ``probe_...`` are logistic regressions on the frozen
features of each of ``--models``: a network trained on ImageNet, VGG16 as it was trained on to find edges, DINOv2 out of
a model of saliency. Models were chosen on validation and tested once.

    python -m experiments.image_classification --out runs/image_classification

Expected (``experiments/results/image_classification.json``, three seeds, 5 minutes of one shared core): ``accuracy``
0.838 ± 0.093 (``transfer``), 0.559 ± 0.070 (``scratch``), 0.782 ± 0.086 (``probe_efficientnet-lite0``), 0.846 ± 0.029
(``probe_vgg16``), 0.774 ± 0.011 (``probe_dinov2-small-focus``). On digits a probe of the edges that VGG16 knows is as
good as fine-tuning the smaller network.

The trained model lies in ``OUT/model``; it labels a picture or a folder of them:

    python -m experiments.image_classification --out runs/image_classification --predict pictures/

The default data are digits, far from the photographs that these networks know: what transfers is what is common to all
pictures. Public data: ``--data tfds:cifar10``, ``--data tfds:oxford_flowers102``; or a folder with a folder of pictures
for each class.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.common import predictions, study, techniques
from experiments.common.classification import Classification, prepare_classification
from experiments.common.command_line import main
from experiments.common.resumable_rows import ResumableRows
from experiments.common.settings import Config, command, prepare, settings
from jtl import pretrained
from jtl.data import image
from jtl.data.readers.images import read_image
from jtl.errors import InputError
from jtl.outputs import outputs
from jtl.report import figures
from jtl.report.report import Result, Section, environment, summarise, write_report, write_result
from jtl.tasks import occlusion

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
SHOWN = 12
PATCHES = 6  # squares that hide a part of the image, along a side


@dataclass(frozen=True, kw_only=True)
class ImageClassification(Config):
    """Settings of the application."""

    models: tuple[str, ...] = ("efficientnet-lite0", "vgg16", "dinov2-small-focus")
    """Pretrained networks: the first is fine-tuned, all are probed."""
    data: str = "mnist5k"
    """Labelled pictures: mnist5k, uci_digits, tfds:NAME, or a folder; see experiments.finetune."""
    shots: int = 20
    """Labelled training pictures of each class."""
    image_size: int = 56
    """Side of the pictures in pixels, a multiple of 14 for DINOv2."""
    updates: int = 80
    """Updates of transfer and of scratch."""
    batch_size: int = 16
    """Pictures of an update."""
    test_examples: int = 1000
    """Test pictures; 0 for all there are."""
    image_column: str | None = None
    """Column of the pictures in a tfds data set that has several."""
    seeds: int = 3
    """Repetitions: other training pictures, heads and orders."""
    predict: Path | None = None
    """A picture, or a folder of them, to label by the model that an earlier run left in --out."""


def run(config: ImageClassification) -> Result:
    """Train, test and report; writes into ``config.out`` and returns the result."""
    for name in ("shots", "image_size", "updates", "batch_size"):
        if getattr(config, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}")
    if not config.models:
        raise InputError("--models names no network: the first is fine-tuned, so give one or more")
    out = prepare(config, "image_classification")
    ledger = ResumableRows(out, resume=config.resume)
    models = config.models[:1] if config.quick else config.models
    tasks = {name: _task(config, name) for name in models}
    first = tasks[models[0]]
    print(first.dataset)
    for seed in range(config.seed, config.seed + (1 if config.quick else config.seeds)):
        few = {name: task.with_train(config.shots * task.classes, seed) for name, task in tasks.items()}
        for arm in ("transfer", "scratch"):
            row = ledger.get(partial(trained, config, few[models[0]], arm, seed), arm=arm, seed=seed)
            print(f"seed {seed}  {arm}  accuracy {row['accuracy']:.3f}  {row['seconds']:.0f} s")
        for name, task in few.items():
            row = ledger.get(
                lambda task=task: (techniques.probe(task)[1], []), arm=f"probe_{name}", seed=seed
            )
            print(f"seed {seed}  probe_{name}  accuracy {row['accuracy']:.3f}  {row['seconds']:.0f} s")

    summary = summarise(ledger.rows, ["accuracy", "macro_f1", "seconds"])
    result = Result(
        "image_classification", settings(config), environment(), ledger.seconds, ledger.rows, summary
    )
    write_result(out, result)
    write_report(
        out,
        result,
        title="Image classification",
        about=" ".join(__doc__.split("\n\n")[1].split()),
        command=command("image_classification", config),
        sections=_sections(first, out, ledger),
        notes=[f"Data: {first.dataset.origin}.", *first.dataset.notes],
    )
    return result


def _task(config: ImageClassification, model: str) -> Classification:
    return prepare_classification(
        model, config.data, image_size=config.image_size, validation=200 if config.quick else 500,
        test=200 if config.quick else config.test_examples or None, image_column=config.image_column,
    )  # fmt: skip


def trained(
    config: ImageClassification, few: Classification, arm: str, seed: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The row and learning curve of a network that learns from the few pictures; keeps the first ``transfer``."""
    updates = 40 if config.quick else config.updates
    budget = techniques.Budget(
        1, min_steps=updates, max_steps=updates, batch_size=config.batch_size, validations=4
    )
    found = techniques.run_arm(few, {"transfer": "lp_ft"}.get(arm, arm), seed=seed, budget=budget)
    if arm == "transfer" and seed == config.seed:
        predictions.keep(Path(config.out), found.model, few, found.test)
    return found.row, found.history


# --- use again -------------------------------------------------------------------------------------


def label(config: ImageClassification, path: Path) -> None:
    """Label pictures by the model in ``config.out``; writes predictions.csv there."""
    out = Path(config.out)
    names = predictions.kept_classes(out)
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in PICTURES) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"--predict {path} holds no pictures ({', '.join(PICTURES)})")
    pictures = [{"image": read_image(file), "label": 0} for file in files]
    model = pretrained.load(out / predictions.MODEL)
    split = image.prepare(pictures, _how(config.models[0], config.image_size))
    batch = split.batch(np.arange(len(files)), split.buckets[0], None)
    said = outputs(model, [{"image": batch["image"]}], ("logits",))
    chances = np.asarray(jax.nn.softmax(said["logits"]))
    predictions.write_predictions(out, "picture", [str(file) for file in files], chances, names)


def _how(model: str, side: int) -> image.Preprocess:
    return image.Preprocess(**pretrained.image_processor(model)).resized(side)


# --- report ----------------------------------------------------------------------------------------


def _sections(task: Classification, out: Path, ledger: ResumableRows) -> list[Section]:
    test, names = predictions.kept_test(out), task.dataset.classes
    predicted = test["logits"].argmax(-1)
    chances = np.asarray(jax.nn.softmax(test["logits"]))
    chosen, titles = predictions.surest(test["label"], chances, names, SHOWN)
    places = np.array(chosen)
    side = task.preprocessing["size"][0]
    batch = task.splits["test"].batch(places, task.buckets[0], None)
    hide = jax.jit(partial(occlusion, patch=max(2, 2 * side // (PATCHES + 1))))
    maps = np.asarray(hide(pretrained.load(out / predictions.MODEL), {"image": batch["image"]}))
    pictures = [task.dataset.splits["test"][int(i)]["image"] for i in places]
    return [
        study.transferred_or_scratch(ledger.rows, ("accuracy", "macro_f1")),
        Section(
            "Learning curves",
            "Training loss and validation accuracy.",
            figures.learning_curves(ledger.curves),
        ),
        Section(
            "Confusion",
            "True against predicted, transfer, the first seed.",
            figures.confusion(test["label"], predicted, names),
        ),
        Section(
            "What it leans on",
            "Parts of a picture whose absence costs the predicted class probability, blue, and gains it some, orange, "
            "in the pictures of which the model was surest, rightly and wrongly.",
            figures.saliency(pictures, list(maps), titles),
        ),
    ]


def predict(config: ImageClassification) -> None:
    """Label with what was trained."""
    assert config.predict is not None
    label(config, config.predict)


if __name__ == "__main__":
    main(run, ImageClassification, predict)
