"""The judge of generated pictures: a network trained on real ones, and the distances in its features."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.art.pictures import Pictures
from experiments.common import recipe
from jtl import data, heads, tree
from jtl._files import write_file
from jtl.data.batches.loader import Batches
from jtl.model import Model, linen
from jtl.models.conv4 import Conv4
from jtl.outputs import outputs
from jtl.tasks import Classify, diversity, frechet_distance, kernel_distance

WIDTH = 32  # of the judge
METRICS = ("frechet", "kernel", "class_accuracy", "in_style", "diversity")


def judge(pictures: Pictures, path: Path, updates: int) -> Model:
    """A Conv4 that tells old and new classes apart, trained on real pictures, as many of both; stored in ``path``."""
    classes = len(pictures.old_classes) + len(pictures.classes)

    def train(model: Model) -> Model:
        parts = [
            Batches(part, size, seed=seed, steps=updates)
            for seed, part in enumerate((pictures.old, pictures.held_in))
            for size in [min(64, len(part))]
        ]
        mixed = data.SideBySide(parts, hide_labels=False)
        return recipe.train(
            recipe.Recipe(model, Classify(stats="batch"), mixed), steps=updates, rate=3e-3, seed=0
        ).model

    return once(path, _judge(classes), train)


def _judge(classes: int) -> Model:
    module = Conv4(WIDTH, momentum=0.9)
    body = linen(module, jax.jit(module.init)(jax.random.key(0), jnp.zeros((2, 28, 28, 3))))
    return heads.classifier(body, classes, key=jax.random.key(1), on="features", width=WIDTH)


def once(path: Path, model: Model, train: Callable[[Model], Model]) -> Model:
    """``train(model)``, whose leaves are stored in ``path``; read from there if they are there already."""
    if not path.exists():
        keep(path, train(model))
    return restored(path, model)


def keep(path: Path, model: Model) -> None:
    """Store the leaves of a model, by path."""
    leaves: dict[str, Any] = {name: np.asarray(leaf) for name, leaf in tree.flatten(model.variables).items()}
    write_file(path, lambda file: np.savez(file, **leaves))


def restored(path: Path, model: Model) -> Model:
    """``model`` with the leaves stored in ``path``."""
    with np.load(path) as stored:
        return model.replace(variables=jax.tree.map(jnp.asarray, tree.nest(dict(stored))))


def judged(network: Model, images: np.ndarray, rows: int = 100) -> dict[str, np.ndarray]:
    """``features`` (N, D) and ``logits`` (N, C) of pictures of -1 to 1."""
    whole = -(-len(images) // rows) * rows
    padded = np.pad(images, ((0, whole - len(images)), *((0, 0),) * 3))
    found = outputs(
        network, [{"image": padded[i : i + rows]} for i in range(0, whole, rows)], ("features", "logits")
    )
    return {name: values[: len(images)] for name, values in found.items()}


def measured(
    network: Model, images: np.ndarray, labels: np.ndarray, reference: np.ndarray, first: int
) -> dict[str, float]:
    """The metrics of pictures of the classes ``labels``, the new of which begin at ``first``, beside real ones.

    ``class_accuracy``: the judge names the class among the new ones, or among the old if ``labels`` are old;
    ``in_style``: it takes a picture for one of these rather than of the others.
    """
    found, real = judged(network, images), judged(network, reference)["features"]
    old, new = found["logits"][:, :first], found["logits"][:, first:]
    own, other, start = (new, old, first) if labels.min() >= first else (old, new, 0)
    return {
        "frechet": frechet_distance(found["features"], real),
        "kernel": kernel_distance(found["features"], real),
        "class_accuracy": float(np.mean(own.argmax(-1) == labels - start)),
        "in_style": float(np.mean(own.max(-1) > other.max(-1))),
        "diversity": diversity(found["features"], labels),
    }
