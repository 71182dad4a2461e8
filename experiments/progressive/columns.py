"""Methods of ``progressive`` that give each task a network, adapters or a column of its own."""

from __future__ import annotations

from typing import Literal

from experiments.common.recipe import Recipe
from experiments.progressive.trial import Learning, Trial
from jtl import adapters, finetune, heads, progressive, tree
from jtl.model import Model
from jtl.tasks import Classify


class Separate:
    """A network for each task, and nothing between them: the single column of transfer scores."""

    KNOWN = True

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.models: dict[int, Model] = {}

    def learn(self, task: int) -> Learning:
        """Train a new network."""
        self.models[task] = yield Recipe(self.trial.column(task), Classify(), self.trial.batches(task))

    def view(self, task: int) -> Model:
        """The network of the task, or what it will start from."""
        return self.models.get(task, self.trial.column(task))

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
        t, key = self.trial.tasks, self.trial.key(task)
        kept = {name: leaf for name, leaf in self.models[0].params.items() if name != "head"}
        body = self.models[0].with_params(kept).replace(techniques=())
        model = heads.classifier(body, t.classes, key=key, on="features", width=t.width)
        model = adapters.lora(model, rank=8, where=t.layers, key=key, batch=self.trial.example)
        labels = finetune.train_only(model, ".*/lora/.*|head/.*")
        self.models[task] = yield Recipe(model, Classify(), self.trial.batches(task), labels)

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

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.model = trial.column(0)

    def grown(self, task: int) -> Model:
        """The network with a column for the task."""
        where = f"{self.trial.tasks.blocks}|head"
        return progressive.grow(
            self.model, self.trial.column(task), where=where, batch=self.trial.example, key=self.trial.key(task, 2),
            laterals=self.LATERALS,
        )  # fmt: skip

    def learn(self, task: int) -> Learning:
        """Grow and train the new column."""
        model = self.model if task == 0 else self.grown(task)
        self.model = yield Recipe(model, Classify(), self.trial.batches(task), progressive.labels(model))

    def view(self, task: int) -> Model:
        """The columns up to the task's, or what the task will start from."""
        known = task < progressive.columns(self.model)
        return progressive.task(self.model, task + 1) if known else self.trial.column(task)

    @property
    def parameters(self) -> int:
        """Those of all columns."""
        return tree.size(self.model.params)


class ProgressiveLinear(Progressive):
    """Plain connections in place of the adapters."""

    LATERALS = "linear"


class ProgressiveRandom(Progressive):
    """The paper's fourth baseline: as many columns and laterals, but earlier columns as they were drawn."""

    def __init__(self, trial: Trial) -> None:
        super().__init__(trial)
        self.answers: dict[int, Model] = {}

    def learn(self, task: int) -> Learning:
        """Train a column beside untrained ones, and go on from the untrained one."""
        model = self.model if task == 0 else self.grown(task)
        self.answers[task] = yield Recipe(
            model, Classify(), self.trial.batches(task), progressive.labels(model)
        )
        self.model = model

    def view(self, task: int) -> Model:
        """The network that was trained for the task."""
        return self.answers.get(task, self.trial.column(task))
