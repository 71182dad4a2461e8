"""Training of the methods of ``domain_adaptation``: what each says on the way, and the choice of every rule."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.domain_adaptation import methods as methods
from experiments.domain_adaptation.domains import DomainPair
from jtl import domain
from jtl.data.batches.loader import Batches, Encoded, loader
from jtl.domain import protocol
from jtl.model import Model
from jtl.outputs import outputs
from jtl.tasks import accuracy
from jtl.train import adamw, fit, make_step, schedule

RULES = (
    "information_maximisation", "source_validation", "entropy", "neighbourhood_density", "deep_embedded_validation",
    "oracle", "last",
)  # fmt: skip
CHOSEN = RULES[0]


@dataclass(frozen=True)
class Snapshot:
    """What a model says at one point of the run; ``label`` (N,), ``logits`` (N, C), ``features`` (N, D) of each."""

    step: int
    source: dict[str, np.ndarray]
    validation: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    scores: dict[str, float]


Run = tuple[
    Model, list[Snapshot], list[dict[str, Any]]
]  # best on source, at every validation, learning curve


def key_of(rule: str) -> str:
    """The field of a row with the accuracy that a rule chose."""
    return "accuracy" if rule == CHOSEN else f"accuracy_{rule}"


class Trainer:
    """Trains the methods of one seed, which share their start and the model trained on source.

    Args:
        transfer: source and target.
        seed: of the start and of the order of examples.
        steps: updates of every method.
        validations: points of the run that a rule can choose from.
        batch_size: examples of each domain in an update.
        rate: peak learning rate of AdamW.
    """

    def __init__(
        self, transfer: DomainPair, *, seed: int, steps: int, validations: int, batch_size: int, rate: float
    ) -> None:
        self.transfer, self.seed, self.steps, self.rate = transfer, seed, steps, rate
        self.validations = min(validations, steps)
        self.setting = methods.Trial(
            model=transfer.start(jax.random.key(seed)),
            train={"source": transfer.source["train"], "target": transfer.target["train"]},
            classes=len(transfer.classes),
            steps=self.steps,
            batch_size=batch_size,
            stats=transfer.stats,
            width=transfer.width,
            seed=seed,
            buckets=transfer.buckets,
            trained_on_source=lambda: self.baseline[0],
        )

    @cached_property
    def baseline(self) -> Run:
        """Training on source alone, from which other methods go on."""
        return self.train(methods.source_only(self.setting), "source_only")

    def __call__(self, method: str, stored: Path | None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The row of a method and its learning curve; what its chosen model says is stored, if asked."""
        began = time.monotonic()
        history: list[dict[str, Any]] = []
        if method == "adabn":
            adapted = domain.adabn(self.setting.trained, self.setting.unlabelled())
            snapshots = [self.look(adapted, self.steps)]
        elif method == "tent":
            snapshots = [self.tent()]
        elif method == "source_only":
            _, snapshots, history = self.baseline
        else:
            recipe = getattr(methods, method)(self.setting)
            _, snapshots, history = self.train(recipe, method)
        if method == "target_trained":  # it has target labels, and may choose by them
            for snapshot in snapshots:
                snapshot.scores.update(dict.fromkeys(RULES, snapshot.scores["oracle"]))
        row: dict[str, Any] = {"seconds": time.monotonic() - began, "steps": self.steps}
        for rule in RULES:
            best = max(snapshots, key=lambda s, rule=rule: (s.scores[rule], s.step))  # type: ignore[misc]
            row[key_of(rule)] = accuracy(best.test["logits"], best.test["label"])
            row[f"step_{rule}"] = best.step
        chosen = max(snapshots, key=lambda s: (s.scores[CHOSEN], s.step))
        row["source_accuracy"] = chosen.scores["source_validation"]
        if stored is not None:
            stored.parent.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(
                stored, source=chosen.source["features"], features=chosen.test["features"],
                logits=chosen.test["logits"], label=chosen.test["label"],
            )  # fmt: skip
        return row, history

    def train(self, recipe: methods.Recipe, title: str) -> tuple[Model, list[Snapshot], list[dict[str, Any]]]:
        """The model that validated best on source, what each validated one says, and the learning curve."""
        every = -(-self.steps // self.validations)
        optimizer = adamw(schedule(self.rate, self.steps), weight_decay=0.01)
        step = make_step(recipe.loss, optimizer, recipe.labels)
        state = step.init(recipe.model, jax.random.key(self.seed))
        snapshots: list[Snapshot] = []
        models: list[Model] = []
        history: list[dict[str, Any]] = []
        print(f"{title}:")

        def validate(model: Model) -> dict[str, float]:
            done = min(every * (len(snapshots) + 1), self.steps)
            snapshots.append(self.look(recipe.finish(model), done))
            scores = snapshots[-1].scores
            return {"accuracy": scores["source_validation"], "target_accuracy": scores["oracle"]}

        for stage in range(recipe.stages):
            ends = self.steps * (stage + 1) // recipe.stages
            batches = recipe.batches(state.model)
            fitted = fit(step, state, loader(batches), steps=ends, validate=validate, validate_every=every)
            state, history = fitted.state, [*history, *fitted.history]
            models.append(fitted.model)
        return recipe.finish(models[-1]), snapshots, history

    def look(self, model: Model, step: int) -> Snapshot:
        """What a model says, and how each rule scores it."""
        source = self.says(model, self.transfer.source["validation"])
        target = self.says(model, self.transfer.target["validation"])
        test = self.says(model, self.transfer.target["test"])
        return Snapshot(step, source, target, test, scores(source, target, step))

    def says(self, model: Model, split: Encoded) -> dict[str, np.ndarray]:
        """Logits, features and labels of a split."""
        batches = Batches(split, 100, train=False, buckets=self.transfer.buckets)
        return outputs(model, batches, ("logits", "features", "label"))

    def tent(self) -> Snapshot:
        """The source model adapting online to the target's test examples, in one pass, as they come."""
        model = self.setting.trained
        split = self.transfer.target["test"]
        order = np.random.default_rng(self.seed).permutation(len(split))
        cut = [order[i : i + 100] for i in range(0, len(order), 100)]
        batches = [split.batch(rows, 1, None) for rows in cut]
        step = make_step(
            domain.Tent(),
            adamw(schedule(1e-3, len(batches)), weight_decay=0.0),
            domain.norm_only(model, batches[0]),
        )
        logits = domain.adapt(step, model, batches, key=jax.random.key(self.seed))
        before = self.look(model, self.steps)
        test = {**before.test, "logits": logits[np.argsort(order)]}
        return replace(before, test=test)


def scores(source: dict[str, np.ndarray], target: dict[str, np.ndarray], step: int) -> dict[str, float]:
    """The score of each rule; half of the source validation rows stand for training rows in the density ratio."""
    logits, label = source["logits"], source["label"]
    half = np.arange(len(label)) % 2 == 0
    wrong = (logits.argmax(-1) != label).astype(float)
    return {
        "information_maximisation": protocol.mutual_information(target["logits"]),
        "source_validation": protocol.source_validation(logits, label),
        "entropy": protocol.negative_entropy(target["logits"]),
        "neighbourhood_density": protocol.soft_neighbourhood_density(target["logits"]),
        "deep_embedded_validation": protocol.deep_embedded_validation(
            source["features"][half], target["features"], source["features"][~half], wrong[~half]
        ),
        "oracle": accuracy(target["logits"], target["label"]),
        "last": float(step),
    }
