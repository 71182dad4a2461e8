"""The methods of ``experiments.progressive``: what each trains for a new task, and which model answers which task.

A method is a class. ``learn(task)`` yields what is to be trained, one ``Recipe`` after another, and is sent the trained
model; ``view(task)`` is the model that answers a task. ``KNOWN`` methods have leaves of each task's own, so they must
be told at test time which task a row is of. The others have one head where the tasks share their classes, and else a
head for each task, which all methods are told.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, PyTree

from experiments.sequences import Tasks
from jtl import adapters, continual, distill, finetune, heads, progressive, tree
from jtl.continual import packnet
from jtl.data import subset_indices
from jtl.data.loader import Batches, Steps
from jtl.features import Rows
from jtl.loss import Loss
from jtl.model import Batch, Mode, Model, Outputs
from jtl.tasks import Classify
from jtl.train import backprop

Name = Literal[
    "separate", "progressive", "progressive_linear", "progressive_random", "head", "full", "joint", "ewc", "si", "lwf",
    "agem", "replay", "packnet", "lora",
]  # fmt: skip
NAMES: tuple[str, ...] = get_args(Name)
SI_STRENGTH = 0.3
FISHER_ROWS = 500
LWF_TEMPERATURE = 2.0  # as in the paper
MEMORY = 20  # remembered examples of each class and task, and rows of them in a batch
KEEP = 0.5  # the share of a task's weights that PackNet keeps, by the paper's smaller pruning


@dataclass(frozen=True)
class Recipe:
    """One training.

    Attributes:
        model: what it starts from.
        loss: what it minimises.
        batches: of the whole training.
        labels: what trains; None for all.
        gradient: how the gradient is taken.
        tracked: sum up the path integral of SI, beside this penalty if there is one.
        share: of the updates of a task.
    """

    model: Model
    loss: Loss
    batches: Steps
    labels: PyTree | None = None
    gradient: Callable[..., Any] = backprop
    tracked: bool = False
    penalty: finetune.SI | None = None
    share: float = 1.0


@dataclass(frozen=True)
class Setting:
    """What every method starts with, for one seed.

    Attributes:
        tasks: the sequence.
        steps: updates for each task.
        batch_size: rows of an update.
        seed: of new leaves and of the order of examples.
        ewc_strength: λ of EWC.
    """

    tasks: Tasks
    steps: int
    batch_size: int
    seed: int
    ewc_strength: float
    _columns: dict[int, Model] = field(default_factory=dict, repr=False, compare=False)

    def key(self, *numbers: int) -> Array:
        """A key for what is drawn."""
        key = jax.random.key(self.seed)
        for number in numbers:
            key = jax.random.fold_in(key, number)
        return key

    @property
    def example(self) -> Batch:
        """A smallest batch."""
        return self.tasks.splits[0]["train"].batch(np.array([0]))

    def column(self, task: int) -> Model:
        """A network for one task alone; that of task 0 is what single networks start from."""
        if task not in self._columns:
            key, t = self.key(task), self.tasks
            drawn = heads.classifier(t.body(key), t.classes, key=key, on="features", width=t.width)
            self._columns[task] = drawn
        return self._columns[task]

    def network(self, *, known: bool = False) -> Model:
        """One network for all tasks: with one head if they share their classes and ``known`` is off."""
        t, key = self.tasks, self.key(0)
        if t.shared and not known:
            return self.column(0)
        return continual.task_heads(
            t.body(key), len(t.names), t.classes, key=key, on="features", width=t.width
        )

    def batches(self, task: int, share: float = 1.0, part: int = 0) -> Batches:
        """The training batches of a task, for a share of its updates."""
        return self.cut(self.tasks.splits[task]["train"], round(share * self.steps), task + 100 * part)

    def cut(self, rows: Rows, steps: int, order: int) -> Batches:
        """``steps`` batches of ``rows``."""
        size = min(self.batch_size, len(rows))
        epochs = -(-steps // (len(rows) // size))
        return Batches(rows, size, seed=self.seed + 1000 * order, epochs=epochs)

    def remembered(self, task: int) -> Rows:
        """A few training examples of a task, as many of each class."""
        rows = self.tasks.splits[task]["train"]
        count = min(MEMORY * self.tasks.classes, len(rows))
        few = subset_indices(rows.arrays["label"], count, self.seed)
        return Rows({name: values[few] for name, values in rows.arrays.items()})


Learning = Generator[Recipe, Model, None]


def together(parts: list[Rows]) -> Rows:
    """The rows of all parts."""
    return Rows({name: np.concatenate([p.arrays[name] for p in parts]) for name in parts[0].arrays})


class Full:
    """Fine-tuning of the whole network on one task after the other; the base of the other single networks."""

    KNOWN = False

    def __init__(self, setting: Setting) -> None:
        self.s = setting
        self.model = setting.network(known=self.KNOWN)

    def learn(self, task: int) -> Learning:
        """Train on the task."""
        self.model = yield Recipe(self.model, Classify(), self.s.batches(task))

    def view(self, task: int) -> Model:
        """The one network."""
        return self.model

    @property
    def parameters(self) -> int:
        """Scalars that are kept to answer the tasks learned so far."""
        return tree.size(self.model.params)


class Joint(Full):
    """All tasks at once, with the updates of all: the upper bound of one network."""

    def learn(self, task: int) -> Learning:
        """Train on everything, at the first task."""
        if task == 0:
            count = len(self.s.tasks.names)
            rows = together([split["train"] for split in self.s.tasks.splits])
            self.model = yield Recipe(
                self.model, Classify(), self.s.cut(rows, count * self.s.steps, 0), share=count
            )


class Ewc(Full):
    """A penalty for each task learned, weighted by the Fisher information of single examples."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.penalty: finetune.EWC | None = None

    def learn(self, task: int) -> Learning:
        """Train under the penalties, then measure what the task needs."""
        loss: Loss = Classify() if self.penalty is None else Classify() + self.penalty
        self.model = yield Recipe(self.model, loss, self.s.batches(task))
        rows = self.s.tasks.splits[task]["train"]
        few = rows.batch(np.random.default_rng(self.s.seed).permutation(len(rows))[:FISHER_ROWS])
        found = finetune.fisher(self.model, [few], mode="exact", chunk=50)
        own = finetune.EWC(self.model.params, found, jnp.float32(self.s.ewc_strength))
        self.penalty = own if self.penalty is None else finetune.consolidate(self.penalty, own)


class Si(Full):
    """The penalty of synaptic intelligence."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.penalty: finetune.SI | None = None
        self.state: Any = None  # the optimiser's, which the trainer leaves here

    def learn(self, task: int) -> Learning:
        """Train under the penalty, tracking the path."""
        loss: Loss = Classify() if self.penalty is None else Classify() + self.penalty
        start = self.model.params
        self.model = yield Recipe(self.model, loss, self.s.batches(task), tracked=True, penalty=self.penalty)
        before = None if self.penalty is None else self.penalty.importance
        omega = finetune.path_importance(self.state, start, self.model.params, before=before)
        self.penalty = finetune.SI(self.model.params, omega, jnp.float32(SI_STRENGTH))


class OldAnswers(Loss):
    """Learning without forgetting (Li and Hoiem 2016, https://arxiv.org/abs/1606.09282): keep the old network's answers
    to the new examples, by the heads of the tasks it learned.

    Attributes:
        teacher: the network before the task.
        old: the number of its tasks.
    """

    teacher: Model
    old: int = struct.field(pytree_node=False)

    def mode(self) -> Mode:
        """One forward of the student."""
        return Mode(train=True)

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The sum over heads of the distillation loss."""
        taught = self.teacher(batch)
        if "task_logits" not in outputs:
            return distill.soft_targets(outputs["logits"], taught["logits"], LWF_TEMPERATURE), {}
        parts = [
            distill.soft_targets(outputs["task_logits"][:, i], taught["task_logits"][:, i], LWF_TEMPERATURE)
            for i in range(self.old)
        ]
        return sum(parts, jnp.zeros(())), {}


class Lwf(Full):
    """Distillation from the network before the task."""

    def learn(self, task: int) -> Learning:
        """Train beside the old answers."""
        loss: Loss = Classify() if task == 0 else Classify() + OldAnswers(self.model, task)
        self.model = yield Recipe(self.model, loss, self.s.batches(task))


class Replay(Full):
    """As many remembered rows as new ones in every batch."""

    APART = False

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.memory: list[Rows] = []

    def learn(self, task: int) -> Learning:
        """Train beside the memory, then remember some of the task."""
        batches: Steps = self.s.batches(task)
        gradient = backprop
        if self.memory:
            size = self.s.batch_size
            batches = continual.Rehearse(batches, together(self.memory), size, self.s.seed, apart=self.APART)
            gradient = continual.agem if self.APART else backprop
        self.model = yield Recipe(self.model, Classify(), batches, gradient=gradient)
        self.memory.append(self.s.remembered(task))


class Agem(Replay):
    """Gradients projected against raising the loss on the memory."""

    APART = True


class Head(Full):
    """The body of the first task, frozen, and a new head for each: the paper's second baseline."""

    KNOWN = True

    def learn(self, task: int) -> Learning:
        """Train all for the first task, then heads."""
        labels = None if task == 0 else finetune.train_only(self.model, "head/.*")
        self.model = yield Recipe(self.model, Classify(), self.s.batches(task), labels)


class PackNet(Full):
    """Weights dealt out to tasks: two thirds of the updates before pruning, a third after."""

    KNOWN = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.model = packnet.pack(self.model, f"{setting.tasks.layers}/kernel")
        self.learned = 0

    def learn(self, task: int) -> Learning:
        """Train, prune, retrain."""
        if task:
            self.model = packnet.next_task(self.model)
        labels = (
            None if task == 0 else finetune.train_only(self.model, f"{self.s.tasks.layers}/kernel|head/.*")
        )
        trained = yield Recipe(self.model, Classify(), self.s.batches(task, 2 / 3), labels, share=2 / 3)
        # The last task may keep all that is left.
        keep = 1.0 if task + 1 == len(self.s.tasks.names) else KEEP
        pruned = packnet.prune(trained, keep)
        self.model = yield Recipe(pruned, Classify(), self.s.batches(task, 1 / 3, 1), labels, share=1 / 3)
        self.learned = task + 1

    def view(self, task: int) -> Model:
        """The weights of the tasks up to this one."""
        return packnet.select(self.model, min(task + 1, max(self.learned, 1)))


class Separate:
    """A network for each task, and nothing between them: the single column of transfer scores."""

    KNOWN = True

    def __init__(self, setting: Setting) -> None:
        self.s = setting
        self.models: dict[int, Model] = {}

    def learn(self, task: int) -> Learning:
        """Train a new network."""
        self.models[task] = yield Recipe(self.s.column(task), Classify(), self.s.batches(task))

    def view(self, task: int) -> Model:
        """The network of the task, or what it will start from."""
        return self.models.get(task, self.s.column(task))

    @property
    def parameters(self) -> int:
        """Those of all networks."""
        return sum(tree.size(model.params) for model in self.models.values())


class Lora(Separate):
    """The network of the first task, frozen; of each later one low-rank factors beside its layers, and a head."""

    def learn(self, task: int) -> Learning:
        """Train a whole network first, then adapters of it."""
        if task == 0:
            yield from super().learn(task)
            return
        t, key = self.s.tasks, self.s.key(task)
        kept = {name: leaf for name, leaf in self.models[0].params.items() if name != "head"}
        body = self.models[0].with_params(kept).replace(techniques=())
        model = heads.classifier(body, t.classes, key=key, on="features", width=t.width)
        model = adapters.lora(model, rank=8, where=t.layers, key=key, batch=self.s.example)
        labels = finetune.train_only(model, ".*/lora/.*|head/.*")
        self.models[task] = yield Recipe(model, Classify(), self.s.batches(task), labels)

    @property
    def parameters(self) -> int:
        """The first network once, and what each later task adds."""
        added = (finetune.train_only(model, ".*/lora/.*|head/.*") for model in list(self.models.values())[1:])
        own = [
            tree.partition(m.params, mask)[0]
            for m, mask in zip(list(self.models.values())[1:], added, strict=True)
        ]
        return tree.size(self.models[0].params) + sum(map(tree.size, own))


class Progressive:
    """A column for each task, with laterals; each column starts as ``separate``'s network of the task does."""

    KNOWN = True
    LATERALS: Literal["nonlinear", "linear"] = "nonlinear"

    def __init__(self, setting: Setting) -> None:
        self.s = setting
        self.model = setting.column(0)

    def grown(self, task: int) -> Model:
        """The network with a column for the task."""
        where = f"{self.s.tasks.blocks}|head"
        return progressive.grow(
            self.model, self.s.column(task), where=where, batch=self.s.example, key=self.s.key(task, 2),
            laterals=self.LATERALS,
        )  # fmt: skip

    def learn(self, task: int) -> Learning:
        """Grow and train the new column."""
        model = self.model if task == 0 else self.grown(task)
        self.model = yield Recipe(model, Classify(), self.s.batches(task), progressive.labels(model))

    def view(self, task: int) -> Model:
        """The columns up to the task's, or what the task will start from."""
        known = task < progressive.columns(self.model)
        return progressive.task(self.model, task + 1) if known else self.s.column(task)

    @property
    def parameters(self) -> int:
        """Those of all columns."""
        return tree.size(self.model.params)


class ProgressiveLinear(Progressive):
    """Plain connections in place of the adapters."""

    LATERALS = "linear"


class ProgressiveRandom(Progressive):
    """The paper's fourth baseline: as many columns and laterals, but earlier columns as they were drawn."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.answers: dict[int, Model] = {}

    def learn(self, task: int) -> Learning:
        """Train a column beside untrained ones, and go on from the untrained one."""
        model = self.model if task == 0 else self.grown(task)
        self.answers[task] = yield Recipe(model, Classify(), self.s.batches(task), progressive.labels(model))
        self.model = model

    def view(self, task: int) -> Model:
        """The network that was trained for the task."""
        return self.answers.get(task, self.s.column(task))


METHODS: dict[str, Callable[[Setting], Any]] = {
    "separate": Separate, "progressive": Progressive, "progressive_linear": ProgressiveLinear,
    "progressive_random": ProgressiveRandom, "head": Head, "full": Full, "joint": Joint, "ewc": Ewc, "si": Si,
    "lwf": Lwf, "agem": Agem, "replay": Replay, "packnet": PackNet, "lora": Lora,
}  # fmt: skip
