"""Methods of ``progressive`` with one network for all tasks, which training on a new task changes."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from experiments.common.recipe import Recipe
from experiments.progressive.trial import Learning, Tracked, Trial, together
from jtl import continual, distill, finetune, tree
from jtl.continual import packnet
from jtl.data import Arrays
from jtl.data.batches.loader import Steps
from jtl.loss import Loss
from jtl.model import Batch, Mode, Model, Outputs
from jtl.tasks import Classify
from jtl.train import backprop

SI_STRENGTH = 0.3
FISHER_ROWS = 500
LWF_TEMPERATURE = 2.0  # as in the paper
KEEP = 0.5  # the share of a task's weights that PackNet keeps, by the paper's smaller pruning


class Full:
    """Fine-tuning of the whole network on one task after the other; the base of the other single networks."""

    KNOWN = False

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.model = trial.network(known=self.KNOWN)

    def learn(self, task: int) -> Learning:
        """Train on the task."""
        self.model = yield Recipe(self.model, Classify(), self.trial.batches(task))

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
            count = len(self.trial.tasks.names)
            rows = together([split["train"] for split in self.trial.tasks.splits])
            batches = self.trial.cut(rows, count * self.trial.steps, 0)
            self.model = yield Recipe(self.model, Classify(), batches)


class Ewc(Full):
    """A penalty for each task learned, weighted by the Fisher information of single examples."""

    def __init__(self, trial: Trial) -> None:
        super().__init__(trial)
        self.penalty: finetune.EWC | None = None

    def learn(self, task: int) -> Learning:
        """Train under the penalties, then measure what the task needs."""
        loss: Loss = Classify() if self.penalty is None else Classify() + self.penalty
        self.model = yield Recipe(self.model, loss, self.trial.batches(task))
        rows = self.trial.tasks.splits[task]["train"]
        few = rows.batch(np.random.default_rng(self.trial.seed).permutation(len(rows))[:FISHER_ROWS])
        found = finetune.fisher(self.model, [few], mode="exact", chunk=50)
        own = finetune.EWC(self.model.params, found, jnp.float32(self.trial.ewc_strength))
        self.penalty = own if self.penalty is None else finetune.consolidate(self.penalty, own)


class Si(Full):
    """The penalty of synaptic intelligence."""

    def __init__(self, trial: Trial) -> None:
        super().__init__(trial)
        self.penalty: finetune.SI | None = None
        self.state: Any = None  # the optimiser's, which the trainer leaves here

    def learn(self, task: int) -> Learning:
        """Train under the penalty, tracking the path."""
        loss: Loss = Classify() if self.penalty is None else Classify() + self.penalty
        start = self.model.params
        self.model = yield Tracked(self.model, loss, self.trial.batches(task), penalty=self.penalty)
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
        self.model = yield Recipe(self.model, loss, self.trial.batches(task))


class Replay(Full):
    """As many remembered rows as new ones in every batch."""

    APART = False

    def __init__(self, trial: Trial) -> None:
        super().__init__(trial)
        self.memory: list[Arrays] = []

    def learn(self, task: int) -> Learning:
        """Train beside the memory, then remember some of the task."""
        batches: Steps = self.trial.batches(task)
        gradient = backprop
        if self.memory:
            size = self.trial.batch_size
            batches = continual.Rehearse(
                batches, together(self.memory), size, self.trial.seed, apart=self.APART
            )
            gradient = continual.agem if self.APART else backprop
        self.model = yield Recipe(self.model, Classify(), batches, gradient=gradient)
        self.memory.append(self.trial.remembered(task))


class Agem(Replay):
    """Gradients projected against raising the loss on the memory."""

    APART = True


class Head(Full):
    """The body of the first task, frozen, and a new head for each: the paper's second baseline."""

    KNOWN = True

    def learn(self, task: int) -> Learning:
        """Train all for the first task, then heads."""
        labels = None if task == 0 else finetune.train_only(self.model, "head/.*")
        self.model = yield Recipe(self.model, Classify(), self.trial.batches(task), labels)


class PackNet(Full):
    """Weights dealt out to tasks: two thirds of the updates before pruning, a third after."""

    KNOWN = True

    def __init__(self, trial: Trial) -> None:
        super().__init__(trial)
        self.model = packnet.pack(self.model, f"{trial.tasks.layers}/kernel")
        self.learned = 0

    def learn(self, task: int) -> Learning:
        """Train, prune, retrain."""
        if task:
            self.model = packnet.next_task(self.model)
        labels = (
            None
            if task == 0
            else finetune.train_only(self.model, f"{self.trial.tasks.layers}/kernel|head/.*")
        )
        trained = yield Recipe(self.model, Classify(), self.trial.batches(task, 2 / 3), labels)
        # The last task may keep all that is left.
        keep = 1.0 if task + 1 == len(self.trial.tasks.names) else KEEP
        pruned = packnet.prune(trained, keep)
        self.model = yield Recipe(pruned, Classify(), self.trial.batches(task, 1 / 3, 1), labels)
        self.learned = task + 1

    def view(self, task: int) -> Model:
        """The weights of the tasks up to this one."""
        return packnet.select(self.model, min(task + 1, max(self.learned, 1)))
