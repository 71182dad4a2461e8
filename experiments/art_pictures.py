"""What ``art`` learns from and is judged by: old pictures, a few new ones, others held out, and a network for both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jtl import data, heads, tree
from jtl._files import write_file
from jtl.data import image, shift
from jtl.data.dataset import DataError
from jtl.data.fewshot import Joined
from jtl.data.files import IMAGES, ImageFiles
from jtl.data.image import Images, Preprocess
from jtl.data.loader import Batches, loader
from jtl.model import Model, linen
from jtl.models.conv4 import Conv4
from jtl.tasks import Classify, diversity, frechet_distance, kernel_distance
from jtl.train import adamw, fit, make_step, outputs, schedule

OLD, POSTER = "mnist5k", "poster"
HOW = Preprocess((28, 28), (0.5,) * 3, (0.5,) * 3)  # -1 to 1
WIDTH = 32  # of the judge
METRICS = ("frechet", "kernel", "class_accuracy", "in_style", "diversity")


@dataclass(frozen=True, eq=False)
class Pictures:
    """Old pictures with the labels 0 to K - 1, and new ones with those from K on.

    Attributes:
        old: to pre-train on.
        old_test: held out.
        old_classes: K names.
        pool: new pictures, of which few are learned from.
        held_in: new pictures for the judge.
        reference: new pictures that nothing was trained on (see ``notes`` where there are none).
        real: others of the same kind, to be measured as if they were generated; None if there are too few.
        classes: names of the new ones.
        whole: whether all of ``pool`` is learned from.
        origin: where they come from.
        notes: what a reader of results should know.
    """

    old: Images
    old_test: Images
    old_classes: tuple[str, ...]
    pool: Images
    held_in: Images
    reference: Images
    real: Images | None
    classes: tuple[str, ...]
    whole: bool
    origin: str
    notes: tuple[str, ...]

    @property
    def like(self) -> tuple[int | None, ...]:
        """For each new class the old one of its name, or None."""
        return tuple(self.old_classes.index(c) if c in self.old_classes else None for c in self.classes)

    def split(self, shots: int, seed: int) -> tuple[Images, Images]:
        """``shots`` new pictures of each class, and a hundred others to validate with, if there are any."""
        if self.whole:
            return self.pool, self.pool
        count = min(shots * len(self.classes), len(self.pool))
        order = data.subset_indices(self.pool.labels, len(self.pool), seed)
        few = self.pool.take(order[:count])
        return few, self.pool.take(order[count : count + 100]) if count < len(order) else few


def load_pictures(name: str, most: int) -> Pictures:
    """The pictures called ``name``.

    Args:
        name: ``poster``; what ``jtl.data.load`` knows; a folder of pictures, or of folders, one a class.
        most: reference pictures at most.
    """
    old = data.load(OLD)
    train, old_test = (image.prepare(old.splits[split], HOW) for split in ("train", "test"))
    old_test = old_test.take(
        data.subset_indices(old_test.labels, len(old_test), 0)
    )  # its first rows: all classes
    first = len(old.classes)
    notes: tuple[str, ...] = ()
    whole, folder = False, Path(name).expanduser()
    if name == POSTER:
        new = {
            s: shift.Shifted(part, lambda pixels, _: shift.printed(pixels)) for s, part in old.splits.items()
        }
        pool, held_in, test = new["validation"], new["train"], new["test"]
        classes, origin = old.classes, f"{old.origin}, printed in two colours"
    elif folder.is_dir() and not (folder / "train").is_dir():
        whole, (pool, classes) = True, _folder(folder)
        held_in = test = pool
        origin = f"your pictures in {folder}"
        notes = (
            "No picture is held out: distances are to those that were learned from, and the judge knows no others",
        )
    else:
        loaded = data.load(name)
        if loaded.kind != "image":
            raise DataError(f"--data {name} holds {loaded.kind}s; art needs pictures")
        pool = held_in = loaded.splits["train"]
        test, classes, origin, notes = loaded.splits["test"], loaded.classes, loaded.origin, loaded.notes

    def ready(source: data.Source) -> Images:
        prepared = image.prepare(source, HOW)
        return replace(prepared, known_labels=np.asarray(prepared.labels) + first)

    held_out = ready(test)
    half = len(held_out) if whole else min(most, len(held_out) // 2)
    order = data.subset_indices(held_out.labels, max(half if whole else 2 * half, len(classes)), 0)
    return Pictures(
        train, old_test, old.classes, ready(pool), ready(held_in), held_out.take(order[:half]),
        None if whole else held_out.take(order[half:]), tuple(classes), whole, origin, notes,
    )  # fmt: skip


def _folder(folder: Path) -> tuple[data.Source, tuple[str, ...]]:
    """All pictures of a folder, and the names of its classes."""
    if any(entry.is_dir() and not entry.name.startswith(".") for entry in folder.iterdir()):
        loaded = data.load(folder)
        if loaded.kind != "image":
            raise DataError(f"--data {folder} holds {loaded.kind}s; art needs pictures")
        return Joined(tuple(loaded.splits.values())), loaded.classes
    files = tuple(sorted(f for f in folder.iterdir() if f.suffix.lower() in IMAGES))
    if len(files) < 2:
        raise DataError(
            f"--data {folder}: expected pictures ({', '.join(IMAGES)}), or a folder of them for each class; it holds "
            f"{[entry.name for entry in sorted(folder.iterdir())[:8]] or 'nothing'}"
        )
    return ImageFiles(files, (0,) * len(files)), (folder.name,)


def pixels(images: Images, indices: np.ndarray | None = None) -> np.ndarray:
    """The pictures as the network reads them, -1 to 1: float32 (N, 28, 28, 3)."""
    return images.batch(np.arange(len(images)) if indices is None else indices)["image"]


# --- the judge -------------------------------------------------------------------------------------


def judge(pictures: Pictures, path: Path, updates: int) -> Model:
    """A Conv4 that tells old and new classes apart, trained on real pictures, as many of both; stored in ``path``."""
    classes = len(pictures.old_classes) + len(pictures.classes)

    def train(model: Model) -> Model:
        parts = [
            Batches(part, size, seed=seed, epochs=-(-updates // (len(part) // size)))
            for seed, part in enumerate((pictures.old, pictures.held_in))
            for size in [min(64, len(part))]
        ]
        step = make_step(Classify(stats="batch"), adamw(schedule(3e-3, updates)))
        mixed = data.Mixed(parts, hide_labels=False)
        return fit(step, step.init(model, jax.random.key(0)), loader(mixed), steps=updates).state.model

    return once(path, _judge(classes), train)


def _judge(classes: int) -> Model:
    module = Conv4(WIDTH, momentum=0.9)
    body = linen(module, jax.jit(module.init)(jax.random.key(0), jnp.zeros((2, 28, 28, 3))))
    return heads.classifier(body, classes, key=jax.random.key(1), on="features", width=WIDTH)


def once(path: Path, model: Model, train: Callable[[Model], Model]) -> Model:
    """``train(model)``, whose leaves are stored in ``path``; read from there if they are there already."""
    if not path.exists():
        keep(path, train(model))
    return kept(path, model)


def keep(path: Path, model: Model) -> None:
    """Store the leaves of a model, by path."""
    leaves = {name: np.asarray(leaf) for name, leaf in tree.flatten(model.variables).items()}
    write_file(path, lambda file: np.savez(file, **leaves))


def kept(path: Path, model: Model) -> Model:
    """``model`` with the leaves stored in ``path``."""
    with np.load(path) as stored:
        return model.replace(variables=jax.tree.map(jnp.asarray, tree.nest(dict(stored))))


def seen(network: Model, images: np.ndarray, rows: int = 100) -> dict[str, np.ndarray]:
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
    found, real = seen(network, images), seen(network, reference)["features"]
    old, new = found["logits"][:, :first], found["logits"][:, first:]
    own, other, start = (new, old, first) if labels.min() >= first else (old, new, 0)
    return {
        "frechet": frechet_distance(found["features"], real),
        "kernel": kernel_distance(found["features"], real),
        "class_accuracy": float(np.mean(own.argmax(-1) == labels - start)),
        "in_style": float(np.mean(own.max(-1) > other.max(-1))),
        "diversity": diversity(found["features"], labels),
    }
