"""Trains the image generators of ``experiments.art``, and samples and scores pictures."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.art import pictures
from experiments.art.config import Art
from experiments.art.judge import judge, keep, measured, restored
from experiments.common import recipe
from experiments.common.recipe import Recipe
from jtl import adapters, finetune, tree
from jtl._files import write_file
from jtl.data import SideBySide
from jtl.data.batches.loader import Batches, Steps
from jtl.data.encode.image import Images
from jtl.model import Model, remove
from jtl.models.unet import UNetConfig, example, unet, with_classes
from jtl.outputs import mean_loss
from jtl.tasks import FlowMatching
from jtl.tasks.flow_matching import noised, sample
from jtl.train import Checkpoints, Fitted

# Peaks of AdamW, tried on another seed: 3e-3, 1e-2 and 2e-2 for transfer, 2e-3 and 5e-3 for scratch.
RATES = {"pretraining": 2e-3, "transfer": 1e-2, "scratch": 2e-3}
# All dense and convolutional layers but those that read the class alone: they would learn a class's few pictures.
LAYERS = r"(?!label|.*norm|.*modulation).*"
DESCRIPTION, MODEL, PRETRAINED = "about.json", "model.npz", "pretrained.npz"  # in --out
SMALL = UNetConfig(patch_size=4, widths=(16,), num_attention_heads=2, condition_size=32)
TIMES = (-1.0, 1.0)  # a digit is all but settled at t = 0.4
POWER = 1.5  # of the times of sampling
ROWS = 100  # pictures of a batch


class Trainer:
    """The pictures, the models, and the arms that learn."""

    def __init__(self, config: Art) -> None:
        self.config, self.out = config, Path(config.out)
        self.pictures = pictures.load_pictures(config.data, config.samples)
        self.first = len(self.pictures.old_classes)
        self.architecture = replace(SMALL if config.quick else UNetConfig(), num_classes=self.first)

    # --- models ---

    def pretraining(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The row and the learning curve of pretraining; stores its model."""
        updates = self.config.pretraining_updates
        model = noised(unet(self.architecture, key=jax.random.key(0)), times=TIMES)
        batches = Batches(self.pictures.old, min(64, len(self.pictures.old)), steps=updates)
        fitted = self._fit(
            Recipe(model, FlowMatching(), batches), self.pictures.old_test, updates, 0,
            rate=RATES["pretraining"], decay="cosine", resume=self.config.resume,
            checkpoints=Checkpoints(self.out / "pretraining" / "checkpoints", keep=1),
        )  # fmt: skip
        keep(self.out / PRETRAINED, remove(fitted.state.model, "noised"))
        row = {
            "steps": updates,
            "learning_rate": RATES["pretraining"],
            "seconds": fitted.history[-1]["seconds"],
        }
        return {**row, "trained_parameters": tree.size(model.params)}, fitted.history

    @cached_property
    def pretrained(self) -> Model:
        """The model of pretraining."""
        return restored(self.out / PRETRAINED, unet(self.architecture, key=jax.random.key(0)))

    @cached_property
    def start(self) -> Model:
        """The pretrained model with the new classes, marked, before they are learned."""
        return with_classes(self.pretrained, self.pictures.like, key=jax.random.key(0))

    @cached_property
    def judge(self) -> Model:
        """The network whose features and classes the metrics read."""
        return judge(self.pictures, self.out / "judge.npz", 40 if self.config.quick else 300)

    def trained(self, arm: str, seed: int) -> tuple[Model, Fitted]:
        """The model of an arm, plain, and its training."""
        config, updates = self.config, self.config.updates
        few, others = self.pictures.split(config.shots, seed)
        init_key = jax.random.key(seed)
        size = min(config.batch_size, len(few))
        new = Batches(few, size, seed=seed, steps=updates)
        batches: Steps = new
        labels: Any = None
        if arm == "scratch":
            model = unet(self.start.config, key=init_key)
        else:
            model = adapters.lora(
                self.start, rank=config.rank, where=LAYERS, key=init_key, batch=example(self.start.config)
            )
            labels = finetune.train_only(model, ".*/lora/.*")
            prior = Batches(self.pictures.old, size, seed=seed, steps=updates)
            # One loss over both kinds of rows, in equal parts: the paper's with λ = 1, halved.
            batches = SideBySide([new, prior], hide_labels=False)
        fitted = self._fit(
            Recipe(noised(model, times=TIMES), FlowMatching(), batches, labels), others, updates, seed, rate=RATES[arm]
        )  # fmt: skip
        plain = remove(fitted.state.model, "noised")
        return (plain if arm == "scratch" else adapters.merge(plain)), fitted

    def _fit(self, method: Recipe, held_out: Images, updates: int, seed: int, **options: Any) -> Fitted:
        """Train for all ``updates``: validation is for the learning curve alone, and picks no checkpoint."""
        batch = held_out.batch(np.arange(min(100, len(held_out))))
        return recipe.train(
            method,
            steps=updates,
            seed=jax.random.fold_in(jax.random.key(seed), 1),
            b2=0.99,
            validate=lambda model: {"loss": held_out_loss(model, batch)},
            validate_every=-(-updates // (2 if self.config.quick else 6)),
            metric="loss",
            mode="min",
            **options,
        )

    # --- drawing and measuring ---

    def measured(self, arm: str, seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The row of an arm and its learning curve; stores the samples of the first seed."""
        began = time.monotonic()
        history: list[dict[str, Any]] = []
        row: dict[str, Any] = {}
        labels = np.asarray(self.pictures.reference.labels)
        if arm == "real":
            assert self.pictures.real is not None
            drawn, labels = pictures.pixels(self.pictures.real), np.asarray(self.pictures.real.labels)
        else:
            # Of the same structure as all others: one program draws for all.
            model = with_classes(self.pretrained, self.pictures.like, key=jax.random.key(0), apart=0.0)
            if arm != "before":
                model, fitted = self.trained(arm, seed)
                history = fitted.history
                row = {"steps": self.config.updates, "learning_rate": RATES[arm]}
                row["held_out_loss"] = history[-1]["validation_loss"]
                row["trained_parameters"] = tree.size(fitted.state.trained)
            drawn = draw(self.config, model, labels, seed)
            if arm != "scratch":
                row |= self._old(model, seed)
        row |= measured(self.judge, drawn, labels, pictures.pixels(self.pictures.reference), self.first)
        if seed == self.config.seed:
            (self.out / "samples").mkdir(exist_ok=True)
            write_file(
                self.out / "samples" / f"{arm}.npz",
                lambda file: np.savez(file, image=as_bytes(drawn), label=labels),
            )
            if arm == "transfer":
                self._keep(model)
        return {**row, "seconds": time.monotonic() - began}, history

    def _old(self, model: Model, seed: int) -> dict[str, float]:
        """The metrics of the old classes, on fewer pictures."""
        test = self.pictures.old_test
        test = test.take(np.arange(min(len(test), max(20, 2 * self.config.samples // 5))))
        labels = np.asarray(test.labels)
        drawn = draw(self.config, model, labels, seed)
        found = measured(self.judge, drawn, labels, pictures.pixels(test), self.first)
        return {f"old_{name}": found[name] for name in ("class_accuracy", "frechet")}

    def _keep(self, model: Model) -> None:
        keep(self.out / MODEL, model)
        about = {
            "architecture": asdict(model.config),
            "classes": [*(f"{pictures.OLD}/{c}" for c in self.pictures.old_classes), *self.pictures.classes],
        }
        write_file(self.out / DESCRIPTION, json.dumps(about))


def draw(config: Art, model: Model, labels: np.ndarray, seed: int) -> np.ndarray:
    """A picture of each of the classes ``labels``, -1 to 1: float32 (N, 28, 28, 3)."""
    key, found = jax.random.fold_in(jax.random.key(seed), 2), []
    for i in range(0, len(labels), ROWS):
        own = labels[i : i + ROWS]
        noise = jax.random.normal(jax.random.fold_in(key, i), (ROWS, 28, 28, 3))
        found.append(painted(config, model, noise[: len(own)], own))
    return np.concatenate(found)


def painted(config: Art, model: Model, noise: Any, labels: np.ndarray) -> np.ndarray:
    """The pictures that grow from at most ``ROWS`` draws of noise, in whole grey levels as real ones are."""
    whole = np.resize(noise, (ROWS, *noise.shape[1:])), np.resize(labels, ROWS)  # one shape, one program
    images = sample(
        model, *map(jnp.asarray, whole), steps=config.sampling_steps, guidance=config.guidance, power=POWER
    )
    return as_bytes(np.asarray(images))[: len(labels)] / np.float32(127.5) - 1


def held_out_loss(model: Model, batch: Any) -> float:
    """Mean squared error of the velocity on one batch, at the same noise and times for every model."""
    return mean_loss(FlowMatching(), model, [batch], train=True, keys=[jax.random.key(0)])[0]


def as_bytes(images: np.ndarray) -> np.ndarray:
    """Pictures of -1 to 1 in 256 levels."""
    return np.rint(127.5 * (np.clip(images, -1, 1) + 1)).astype(np.uint8)
