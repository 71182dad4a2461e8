"""The methods of ``experiments.distill``: what each puts on a student, minimises, and reads of the teacher.

A method is a function from what all start with (``Trial``) to a ``Recipe``. Losses of logits have the weights of
their papers. Those between layers depend on a network's widths, so no paper's weight fits another: such a term is
scaled to be as large as the cross-entropy before the first update, for every method alike. The papers are named in
``jtl.distill``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, SupportsIndex

import jax
import numpy as np

from experiments.common.recipe import Recipe
from experiments.distill.students import Student
from jtl import distill, ema
from jtl.data.batches.loader import Batches, Encoded, Steps
from jtl.data.batches.mixup import mixup
from jtl.loss import Loss
from jtl.model import Model, remove
from jtl.tasks import Classify

Method = Literal[
    "student_alone", "soft_targets", "dkd", "dist",
    "hint", "attention_transfer", "fsp", "pkt", "similarity", "rkd", "crd", "review_kd",
    "ema_teacher", "mutual", "transfer_set", "function_matching",
]  # fmt: skip
ONLY_IMAGE = ("review_kd", "function_matching")  # maps of two axes; mixed pixels
ONLY_MAPS = ("attention_transfer", "fsp", "review_kd")  # need layers whose positions correspond
NEGATIVES = 1024  # of CRD: the paper's 16,384 are of 50,000 examples


@dataclass(frozen=True)
class Trial:
    """What every method starts with, for one seed.

    Attributes:
        teacher: trained.
        student: before training.
        layers: which layers of both compare.
        second: another student, for those that learn in pairs.
        train: the encoded training examples.
        taught: the same, with the teacher's logits stored beside them.
        unlabelled: all training examples of the data, for methods that need no label.
        classes: C.
        steps: updates.
        batch_size: rows.
        buckets: padded lengths.
        seed: of new leaves and of the order of examples.
    """

    teacher: Model
    student: Model
    layers: Student
    second: Model
    train: Encoded
    taught: Encoded
    unlabelled: Encoded
    classes: int
    steps: int
    batch_size: int
    buckets: tuple[int, ...]
    seed: int

    @property
    def key(self) -> jax.Array:
        """For new leaves."""
        return jax.random.fold_in(jax.random.key(self.seed), 1)

    @property
    def task(self) -> Loss:
        """Cross-entropy of the labels."""
        return Classify(stats=self.layers.stats)

    @property
    def stats(self) -> dict[str, Any]:
        """The normalisation that every term must share."""
        return {"stats": self.layers.stats}

    @property
    def example(self) -> dict[str, np.ndarray]:
        """One batch, to see shapes."""
        return self.order(self.train)[0]

    def order(self, split: Encoded) -> Batches:
        """Training batches of a split."""
        size = min(self.batch_size, len(split))
        return Batches(split, size, seed=self.seed, steps=self.steps, buckets=self.buckets)

    def stored(self, loss: Loss) -> Recipe:
        """Training on the stored logits of the teacher."""
        return Recipe(self.student, loss, self.order(self.taught))

    def live(
        self, term: Loss, model: Model | None = None, finish: Callable[[Model], Model] = lambda m: m
    ) -> Recipe:
        """The labels, and a term between layers as large as they are at first, beside the teacher's forward."""
        model = self.student if model is None else model
        compute = jax.jit(lambda loss, model, batch: loss(model, batch, jax.random.key(0))[0])
        sizes = [
            compute(distill.Distill(self.teacher, loss), model, self.example)
            for loss in (self.task + 0.0 * term, 0.0 * self.task + term)
        ]
        weight = float(sizes[0] / sizes[1])
        loss = distill.Distill(self.teacher, self.task + weight * term)
        return Recipe(model, loss, self.order(self.train), finish=finish)

    def regressed(self, to: str, on: str) -> Model:
        """The student with a linear map of its layer ``on`` to the width of the teacher's ``to``."""
        shape = _shape(self.teacher, to, self.example)
        return distill.regressor(self.student, shape[-1], on=on, batch=self.example, key=self.key)


def student_alone(trial: Trial) -> Recipe:
    """From the labels alone: what distillation has to beat."""
    return Recipe(trial.student, trial.task, trial.order(trial.train))


# --- logits ----------------------------------------------------------------------------------------


def soft_targets(trial: Trial) -> Recipe:
    """The teacher's probabilities at temperature 4, nine parts to one of labels."""
    return trial.stored(0.1 * trial.task + 0.9 * distill.SoftTargets(4.0, **trial.stats))


def dkd(trial: Trial) -> Recipe:
    """Decoupled: the target class, and eight times the others among each other."""
    return trial.stored(trial.task + distill.DKD(temperature=4.0, **trial.stats))


def dist(trial: Trial) -> Recipe:
    """Correlations of probabilities over classes and over rows."""
    return trial.stored(trial.task + distill.DIST(temperature=4.0, beta=2.0, gamma=2.0, **trial.stats))


# --- layers and relations --------------------------------------------------------------------------


def hint(trial: Trial) -> Recipe:
    """A layer in the middle, through a regressor."""
    own, other = trial.layers.hint
    if _shape(trial.teacher, other, trial.example)[:-1] != _shape(trial.student, own, trial.example)[:-1]:
        own, other = "features", "features"
    term = distill.Hint("hint", other, over_units="mean", **trial.stats)
    return trial.live(term, trial.regressed(other, own), lambda model: remove(model, "hint"))


def attention_transfer(trial: Trial) -> Recipe:
    """Where the layers' energy lies."""
    own, other = zip(*trial.layers.maps, strict=True)
    return trial.live(distill.AttentionTransfer(own, other, **trial.stats))


def fsp(trial: Trial) -> Recipe:
    """How features flow from the first layers to the last of one resolution."""
    own, other = trial.layers.maps[0]
    first = ("embeddings", "embeddings") if own.startswith("encoder") else ("conv_2", "layer_1")
    model, taps = trial.student, []
    for name, layer, to in (("from", first[0], first[1]), ("to", own, other)):
        width = _shape(trial.teacher, to, trial.example)[-1]
        if (
            _shape(trial.student, layer, trial.example)[-1] != width
        ):  # as in the paper, where widths are equal
            model = distill.regressor(model, width, on=layer, name=name, batch=trial.example, key=trial.key)
            layer = name
        taps.append(layer)
    term = distill.FSP((taps[0], taps[1]), (first[1], other), **trial.stats)
    added = [name for name in ("from", "to") if name in taps]
    return trial.live(term, model, lambda model: remove(model, "|".join(added)) if added else model)


def pkt(trial: Trial) -> Recipe:
    """Probabilities of being neighbours in the batch."""
    return trial.live(distill.PKT(**trial.stats))


def similarity(trial: Trial) -> Recipe:
    """Products of rows of the batch."""
    return trial.live(distill.Similarity(**trial.stats))


def rkd(trial: Trial) -> Recipe:
    """Distances and angles between rows, one to two."""
    return trial.live(distill.RKD(**trial.stats))


def crd(trial: Trial) -> Recipe:
    """Contrast with all other examples."""
    count = len(trial.train)
    model = distill.memory(trial.student, trial.teacher, examples=count, batch=trial.example, key=trial.key)
    term = distill.CRD(negatives=min(NEGATIVES, count - 1), **trial.stats)
    return trial.live(term, model, lambda model: remove(model, "crd"))


def review_kd(trial: Trial) -> Recipe:
    """Maps of the two deepest levels, fused: to fuse the finest costs more than a small student does."""
    own, other = zip(*trial.layers.maps[-2:], strict=True)
    shapes = tuple((h, w, c) for _, h, w, c in (_shape(trial.teacher, name, trial.example) for name in other))
    review = distill.Review(shapes, width=24)
    model = distill.regressor(
        trial.student, review, on=own, name="review", batch=trial.example, key=trial.key
    )
    return trial.live(distill.ReviewKD(other, **trial.stats), model, lambda model: remove(model, "review"))


# --- without the teacher, or without labels ----------------------------------------------------------


def ema_teacher(trial: Trial) -> Recipe:
    """The student's own moving average for a teacher."""
    loss = distill.EMATeacher(loss=trial.task + distill.SoftTargets(1.0, **trial.stats))
    model = ema.with_average(trial.student, 0.99)
    return Recipe(model, loss, trial.order(trial.train), finish=ema.average_model)


def mutual(trial: Trial) -> Recipe:
    """Two students that teach each other; the first is kept."""
    model = distill.peers((trial.student, trial.second))
    finish = lambda model: distill.peer(model, 0)  # noqa: E731
    return Recipe(model, distill.Mutual(**trial.stats), trial.order(trial.train), finish=finish)


def transfer_set(trial: Trial) -> Recipe:
    """The teacher's probabilities alone, on all training examples, which need no label (Hinton et al. 2015, §2)."""
    loss = distill.Distill(trial.teacher, distill.SoftTargets(1.0, **trial.stats))
    return Recipe(trial.student, loss, trial.order(trial.unlabelled))


def function_matching(trial: Trial) -> Recipe:
    """Soft targets alone, on mixed images of all training examples, which need no label."""
    loss = distill.Distill(trial.teacher, distill.SoftTargets(1.0, **trial.stats))
    return Recipe(trial.student, loss, Blended(trial.order(trial.unlabelled), trial.seed))


@dataclass(frozen=True)
class Blended:
    """``batches`` under ``distill.mixup``, drawn anew at each step."""

    batches: Steps
    seed: int

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, step: SupportsIndex) -> dict[str, Any]:
        key = jax.random.fold_in(jax.random.key(self.seed), int(step))
        return jax.tree.map(np.asarray, mixup(self.batches[step], key))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[step] for step in range(len(self)))


def _shape(model: Model, name: str, batch: dict[str, np.ndarray]) -> tuple[int, ...]:
    taps = distill.term.taps((name,))
    return distill.term.read(jax.eval_shape(lambda m, b: m(b, taps=taps), model, batch), name).shape


METHODS: dict[Method, Callable[[Trial], Recipe]] = {
    "student_alone": student_alone, "soft_targets": soft_targets, "dkd": dkd, "dist": dist,
    "hint": hint, "attention_transfer": attention_transfer, "fsp": fsp, "pkt": pkt, "similarity": similarity,
    "rkd": rkd, "crd": crd, "review_kd": review_kd,
    "ema_teacher": ema_teacher, "mutual": mutual, "transfer_set": transfer_set, "function_matching": function_matching,
}  # fmt: skip
