"""What ``detection`` and ``segmentation`` share: settings, data, arms, and the model that is kept for later."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar

import jax
import numpy as np

from experiments.common import predictions, recipe, study, techniques
from experiments.common.classification import body
from experiments.common.resumable_rows import ResumableRows
from experiments.common.settings import Config, above, at_least, prepare
from experiments.data.scenes import load_scenes
from jtl import data, pretrained, tree
from jtl._files import write_file
from jtl.data import image
from jtl.data.batches.loader import Batches
from jtl.data.encode.annotated import Annotated, stretched
from jtl.errors import InputError
from jtl.loss import Loss
from jtl.model import Model
from jtl.report import Result, Section

C = TypeVar("C", bound="DenseConfig")
HEAD, DESCRIPTION = "head.npz", "about.json"  # beside the trunk in --out
TRUNK_SHARE = 0.3  # rate of a pretrained trunk, as a share of that of its new head
# Peaks of AdamW: the better of 2e-3 and 5e-3 for each arm, by detection's validation; segmentation takes them over.
RATES = {"transfer": 5e-3, "scratch": 5e-3}


@dataclass(frozen=True, kw_only=True)
class DenseConfig(Config):
    """Settings of both applications."""

    model: str = "efficientnet-lite0"
    """The trunk: an EfficientNet-Lite, a ResNet or a ConvNeXt; a short name, a folder or a hub id."""
    image_size: int = at_least(32, 96)
    """Side of the images in pixels, into which they are stretched; a multiple of 32."""
    train_examples: int = at_least(0, 500)
    """Training images; 0 for all there are."""
    test_examples: int = at_least(0, 300)
    """Test images; 0 for all there are."""
    batch_size: int = at_least(1, 8)
    """Images of an update."""
    validations: int = at_least(1, 4)
    """How often the model is validated; the best of them is kept."""
    learning_rate: float | None = above(0, None)
    """Peak rate of the head, for both arms; left out, what was chosen for each on validation."""
    seeds: int = at_least(1, 3)
    """Repetitions: other training images, heads and orders."""
    predict: Path | None = None
    """A picture, or a folder of them, for the model that an earlier run left in --out."""
    data: str = "scenes"
    """Images with annotations: scenes, tfds:NAME, or a folder."""
    updates: int = at_least(1, 500)
    """Updates of each arm."""


class Trainer(ABC, Generic[C]):
    """A data set, a head, a loss and scores, and the arms that learn by them.

    Attributes:
        config: the settings.
        dataset: the data set with the training images of a seed.
        experiment: name of the command.
        metric: of validation, which picks the checkpoint.
        metrics: what is compared.
        quick_updates: updates with ``--quick``.
    """

    experiment: ClassVar[str]
    metric: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]]
    quick_updates: ClassVar[int]

    def __init__(self, config: C) -> None:
        self.config = config
        self.dataset: Callable[[int], data.Dataset] = lru_cache(1)(self._dataset)

    @abstractmethod
    def load(self) -> data.Dataset:
        """The data set that ``config`` names, if that is not ``scenes``."""

    @abstractmethod
    def annotated(self, source: data.Source, how: image.Preprocess) -> Annotated:
        """Images and annotations made ready for the model."""

    @abstractmethod
    def with_head(self, trunk: Model, classes: int, *, key: jax.Array, params: Any = None) -> Model:
        """``trunk`` under a head, new or of known ``params``."""

    @abstractmethod
    def loss(self, stats: Literal["running", "batch"]) -> Loss:
        """What training minimises."""

    @abstractmethod
    def scores(self, model: Model, split: Annotated) -> dict[str, float]:
        """The metrics on a split."""

    def tested(self, model: Model, split: Annotated) -> dict[str, Any]:
        """What a row says of the test split: the scores, and more where there is more."""
        return self.scores(model, split)

    def classes(self, dataset: data.Dataset) -> tuple[str, ...]:
        """Names of what the head tells apart."""
        return dataset.classes

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The classes, the same for all seeds."""
        return self.classes(self.dataset(self.config.seed))

    def measured(self, arm: str, seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The row and learning curve of an arm; stores the first ``transfer``."""
        config, began = self.config, time.monotonic()
        splits = {split: self.prepare(source) for split, source in self.dataset(seed).splits.items()}
        trunk_key, head_key = jax.random.split(jax.random.key(seed))
        if arm == "transfer":
            trunk = body(config.model)
        else:
            trunk = techniques.random_body(config.model, trunk_key)
        model, labels = self.with_head(trunk, len(self.names), key=head_key), None
        if arm == "transfer":
            labels = tree.assign([("head/.*", 1.0), (".*", TRUNK_SHARE)], model.params)
        loss = self.loss("batch" if arm == "scratch" else "running")
        size, rate = min(config.batch_size, len(splits["train"])), config.learning_rate or RATES[arm]
        fitted = recipe.train(
            recipe.Recipe(
                model, loss, Batches(splits["train"], size, seed=seed, steps=config.updates), labels
            ),
            steps=config.updates,
            rate=rate,
            seed=jax.random.fold_in(jax.random.key(seed), 1),
            validate=lambda model: self.scores(model, splits["validation"]),
            validate_every=-(-config.updates // config.validations),
            metric=self.metric,
        )
        if arm == "transfer" and seed == config.seed:
            self._keep(fitted.model)
        row = {
            **self.tested(fitted.model, splits["test"]),
            f"validation_{self.metric}": fitted.best["value"] if fitted.best else None,
            "seconds": time.monotonic() - began,
            "steps": config.updates,
            "learning_rate": rate,
        }
        return row, fitted.history

    # --- data ---

    def _dataset(self, seed: int) -> data.Dataset:
        config = self.config
        counts = {
            "train": config.train_examples, "validation": 40 if config.quick else 100, "test": config.test_examples,
        }  # fmt: skip
        if config.data == "scenes":
            train, test = counts["train"] or 5000, counts["test"] or 1000
            return load_scenes(
                config.image_size, train=train, validation=counts["validation"], test=test, seed=seed
            )
        whole = self.load()
        splits = dict(whole.splits)
        for split, most in counts.items():
            if 0 < most < len(splits[split]):
                order = np.random.default_rng(seed if split == "train" else 0).permutation(len(splits[split]))
                splits[split] = data.Subset(splits[split], np.sort(order[:most]))
        return replace(whole, splits=splits)

    @property
    def preprocessing(self) -> image.Preprocess:
        """How the trunk reads images, whole."""
        how = image.Preprocess(**pretrained.image_processor(self.config.model))
        return stretched(how, self.config.image_size)

    def prepare(self, source: data.Source) -> Annotated:
        """Images and annotations made ready for the model."""
        return self.annotated(source, self.preprocessing)

    def first_of_test(self, count: int) -> Annotated:
        """The first test images, made ready for the model."""
        test = self.dataset(self.config.seed).splits["test"]
        return self.prepare(data.Subset(test, np.arange(min(count, len(test)))))

    def unlabelled(self, images: list[np.ndarray]) -> Annotated:
        """Pictures made ready for the model."""
        how = self.preprocessing
        return Annotated(how, image.stack([how.resize(one) for one in images]), {})

    # --- use again ---

    def _keep(self, model: Model) -> None:
        """Store a model in ``config.out``: its trunk as a Hugging Face folder, its head and its classes beside it."""
        config, out = self.config, Path(self.config.out)
        bare = {name: leaves for name, leaves in model.params.items() if name != "head"}
        pretrained.save(
            model.with_params(bare).replace(techniques=()), out / predictions.MODEL, overwrite=True
        )
        np.savez(out / HEAD, **tree.flatten(model.params["head"]))
        about = {"classes": self.names, "image_size": config.image_size, "model": config.model}
        write_file(out / DESCRIPTION, json.dumps(about))

    def restored(self) -> tuple[Self, Model, tuple[str, ...]]:
        """The trainer with the settings of the stored model, that model, and its classes.

        Raises FileNotFoundError if none is stored.
        """
        out = Path(self.config.out)
        about = json.loads(predictions.trained(out / DESCRIPTION).read_text(encoding="utf-8"))
        with np.load(out / HEAD) as stored:
            head = tree.nest(dict(stored))
        trainer = type(self)(replace(self.config, image_size=about["image_size"], model=about["model"]))
        names = tuple(about["classes"])
        trunk = pretrained.load(out / predictions.MODEL)
        return trainer, self.with_head(trunk, len(names), key=jax.random.key(0), params=head), names


def run(
    kind: type[Trainer[C]],
    config: C,
    sections: Callable[[Any, ResumableRows], list[Section]],
    *,
    title: str,
    about: str,
    metrics: tuple[str, ...] = (),
) -> Result:
    """Train, test and report; writes into ``config.out`` and returns the result.

    Args:
        kind: gives the rows.
        config: the settings.
        sections: of the report, from the trainer and the rows, behind the comparison of the arms.
        title: of the report.
        about: of the report.
        metrics: to summarise beside those that are compared.
    """
    if config.image_size % 32:
        raise InputError(
            f"--image-size must be a multiple of 32, the stride of the coarsest map, got {config.image_size}"
        )
    if config.quick:
        config = replace(
            config, image_size=64, train_examples=160, test_examples=60, validations=2, seeds=1,
            updates=kind.quick_updates,
        )  # fmt: skip
    out = prepare(config, kind.experiment)
    rows, trainer = ResumableRows(out, resume=config.resume), kind(config)
    print(trainer.dataset(config.seed))
    for seed in range(config.seed, config.seed + config.seeds):
        for arm in ("transfer", "scratch"):
            row = rows.get(partial(trainer.measured, arm, seed), arm=arm, seed=seed)
            scores = "  ".join(f"{name} {row[name]:.3f}" for name in kind.metrics)
            print(f"seed {seed}  {arm}  {scores}  {row['seconds']:.0f} s")
    dataset = trainer.dataset(config.seed)
    compared = study.transferred_or_scratch(rows.rows, kind.metrics)
    return study.finish(
        kind.experiment, config, rows, [compared, *sections(trainer, rows)], title=title, about=about,
        metrics=(*kind.metrics, *metrics), notes=[f"Data: {dataset.origin}.", *dataset.notes],
    )  # fmt: skip
