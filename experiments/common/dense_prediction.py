"""What ``detection`` and ``segmentation`` share: settings, data, arms, and the model that is kept for later."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from experiments.common import techniques
from experiments.common.classification import body
from experiments.common.predictions import MODEL
from experiments.common.settings import Config
from experiments.data.scenes import load_scenes
from jtl import data, pretrained, tree
from jtl._files import write_file
from jtl.data import image
from jtl.data.batches.loader import Batches, loader
from jtl.data.encode.annotated import Annotated, stretched
from jtl.data.readers.images import IMAGES, read_image
from jtl.errors import InputError
from jtl.model import Model
from jtl.train import Fitted, adamw, fit, make_step, schedule

C = TypeVar("C", bound="DenseConfig")
ARMS = ("transfer", "scratch")
HEAD, ABOUT = "head.npz", "about.json"  # beside the trunk in --out
TRUNK_SHARE = 0.3  # rate of a pretrained trunk, as a share of that of its new head


@dataclass(frozen=True, kw_only=True)
class DenseConfig(Config):
    """Settings of both applications."""

    model: str = "efficientnet-lite0"
    """The trunk: an EfficientNet-Lite, a ResNet or a ConvNeXt; a short name, a folder or a hub id."""
    image_size: int = 96
    """Side of the images in pixels, into which they are stretched; a multiple of 32."""
    train_examples: int = 500
    """Training images; 0 for all there are."""
    test_examples: int = 300
    """Test images; 0 for all there are."""
    batch_size: int = 8
    """Images of an update."""
    validations: int = 4
    """How often the model is validated; the best of them is kept."""
    learning_rate: float | None = None
    """Peak rate of the head, for both arms; left out, what was chosen for each on validation."""
    seeds: int = 3
    """Repetitions: other training images, heads and orders."""
    predict: Path | None = None
    """A picture, or a folder of them, for the model that an earlier run left in --out."""


def check(config: DenseConfig, updates: int) -> None:
    """Raise ValueError for settings that make no sense, before anything is loaded."""
    counts = {"updates": updates, "batch-size": config.batch_size, "validations": config.validations}
    for name, value in counts.items():
        if value < 1:
            raise InputError(f"--{name} must be at least 1, got {value}")
    if config.image_size < 32 or config.image_size % 32:
        raise InputError(
            f"--image-size must be a multiple of 32, the stride of the coarsest map, got {config.image_size}"
        )
    if config.learning_rate is not None and not config.learning_rate > 0:
        raise InputError(f"--learning-rate must be positive, got {config.learning_rate:g}")


def shortened(config: C, updates: int) -> C:
    """The settings of a quick run, if it is one: small images, few of them, few updates."""
    if not config.quick:
        return config
    return replace(
        config, image_size=64, train_examples=160, test_examples=60, validations=2, seeds=1, updates=updates
    )  # type: ignore[call-arg]


def dataset(config: DenseConfig, name: str, load: Callable[[], data.Dataset], seed: int) -> data.Dataset:
    """The data set called ``name``, with the images that the run of this seed sees.

    Args:
        config: how many.
        name: "scenes", or else what ``load`` loads.
        load: loads it.
        seed: of the training images.
    """
    train, validation, test = config.train_examples, 40 if config.quick else 100, config.test_examples
    if name == "scenes":
        return load_scenes(
            config.image_size, train=train or 5000, validation=validation, test=test or 1000, seed=seed
        )
    whole = load()
    splits = dict(whole.splits)
    for split, most, own in (("train", train, seed), ("validation", validation, 0), ("test", test, 0)):
        if 0 < most < len(splits[split]):
            order = np.random.default_rng(own).permutation(len(splits[split]))
            splits[split] = data.Subset(splits[split], np.sort(order[:most]))
    return replace(whole, splits=splits)


def preprocessing(config: DenseConfig) -> image.Preprocess:
    """How the trunk wants its images, whole."""
    return stretched(image.Preprocess(**pretrained.image_processor(config.model)), config.image_size)


def trunk(config: DenseConfig, arm: str, key: jax.Array) -> Model:
    """Where an arm begins, without its head: pretrained or random."""
    return body(config.model) if arm == "transfer" else techniques.random_body(config.model, key)


def adapt(
    config: DenseConfig,
    model: Model,
    loss: Any,
    train: Annotated,
    validate: Callable[[Model], dict[str, float]],
    *,
    arm: str,
    metric: str,
    updates: int,
    rate: float,
    seed: int,
) -> Fitted:
    """Train ``model`` under ``loss``; the model of the best validation is kept. A pretrained trunk trains slower."""
    size = min(config.batch_size, len(train))
    epochs = -(-updates // (len(train) // size))
    labels = None
    if arm == "transfer":
        labels = tree.assign([("head/.*", 1.0), (".*", TRUNK_SHARE)], model.params)
    step = make_step(loss, adamw(schedule(config.learning_rate or rate, updates)), labels)
    return fit(
        step,
        step.init(model, jax.random.fold_in(jax.random.key(seed), 1)),
        loader(Batches(train, size, seed=seed, epochs=epochs)),
        steps=updates,
        validate=validate,
        validate_every=-(-updates // config.validations),
        metric=metric,
    )


# --- use again -------------------------------------------------------------------------------------


def keep(config: DenseConfig, model: Model, classes: tuple[str, ...]) -> None:
    """Store a model in ``config.out``: its trunk as a Hugging Face folder, its head and its classes beside it."""
    out = Path(config.out)
    bare = {name: leaves for name, leaves in model.params.items() if name != "head"}
    pretrained.save(model.with_params(bare).replace(techniques=()), out / MODEL, overwrite=True)
    np.savez(out / HEAD, **tree.flatten(model.params["head"]))
    write_file(
        out / ABOUT, json.dumps({"classes": classes, "image_size": config.image_size, "model": config.model})
    )


def kept(config: DenseConfig) -> tuple[Model, dict[str, Any], tuple[str, ...], DenseConfig]:
    """The stored trunk, the leaves of its head, its classes, and ``config`` with the settings that it was trained with.

    Raises FileNotFoundError if there is none.
    """
    out = Path(config.out)
    if not (out / ABOUT).is_file():
        raise FileNotFoundError(
            f"--predict needs a trained model, and {out} holds none: run without --predict first"
        )
    about = json.loads((out / ABOUT).read_text(encoding="utf-8"))
    with np.load(out / HEAD) as stored:
        head = tree.nest(dict(stored))
    settings = replace(config, image_size=about["image_size"], model=about["model"])
    return pretrained.load(out / MODEL), head, tuple(about["classes"]), settings


def pictures(path: Path) -> tuple[list[Path], list[np.ndarray]]:
    """A picture, or those of a folder: files and pixels. Raises FileNotFoundError if there are none."""
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in IMAGES) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"--predict {path} holds no pictures ({', '.join(IMAGES)})")
    return files, [read_image(file) for file in files]


def unlabelled(config: DenseConfig, images: list[np.ndarray]) -> Annotated:
    """Pictures made ready for the model."""
    how = preprocessing(config)
    return Annotated(how, image.stack([how.resize(one) for one in images]), {})
