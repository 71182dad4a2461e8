"""Trains each method of domain adaptation, and selects its checkpoint by each criterion."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.domain_adaptation.config import DomainAdaptation
from experiments.domain_adaptation.domains import DomainPair
from experiments.domain_adaptation.methods import METHODS, STAGES, Method, Trial
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
    """The outputs of a model at one point of the run: ``label`` (N,), ``logits`` (N, C) and ``features`` (N, D).

    Attributes:
        step: updates so far.
        source: on validation examples of the source.
        validation: on validation examples of the target.
        test: on test examples of the target.
        scores: of each rule; the highest chooses.
    """

    step: int
    source: dict[str, np.ndarray]
    validation: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    scores: dict[str, float]


class Run(NamedTuple):
    """A trained method.

    Attributes:
        model: that validated best on source.
        snapshots: at every validation.
        history: the learning curve.
    """

    model: Model
    snapshots: list[Snapshot]
    history: list[dict[str, Any]]


def key_of(rule: str) -> str:
    """The field of a row with the accuracy that a rule chose."""
    return "accuracy" if rule == CHOSEN else f"accuracy_{rule}"


def file_of(out: Path, target: str, arm: str) -> Path:
    """Where the outputs of a method's chosen model are stored, of the first seed."""
    return out / "outputs" / f"{target.replace(':', '_').replace('/', '_')}_{arm}.npz"


class Trainer:
    """Trains the methods on a pair of domains; those of one seed share their start and the model trained on source.

    Args:
        pair: source and target.
        config: settings.
    """

    def __init__(self, pair: DomainPair, config: DomainAdaptation) -> None:
        self.pair, self.config = pair, config
        self.steps = 30 if config.quick else config.steps or pair.steps
        self.trial = lru_cache(1)(self._trial)
        self.baseline = lru_cache(1)(lambda seed: self.train("source_only", self.trial(seed)))

    def _trial(self, seed: int) -> Trial:
        pair = self.pair
        return Trial(
            model=pair.start(jax.random.key(seed)),
            train={"source": pair.source["train"], "target": pair.target["train"]},
            classes=len(pair.classes),
            steps=self.steps,
            batch_size=self.config.batch_size,
            stats=pair.stats,
            width=pair.width,
            seed=seed,
            buckets=pair.buckets,
            trained_on_source=lambda: self.baseline(seed).model,
        )

    def __call__(
        self, *, task: str, target: str, arm: Any, seed: int
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The row of a method and its learning curve; of the first seed, outputs of its chosen model are stored."""
        began, trial = time.monotonic(), self.trial(seed)
        history: list[dict[str, Any]] = []
        if arm == "adabn":
            snapshots = [self.look(domain.adabn(trial.trained, trial.unlabelled()), self.steps)]
        elif arm == "tent":
            snapshots = [self.tent(trial)]
        else:
            _, snapshots, history = self.baseline(seed) if arm == "source_only" else self.train(arm, trial)
        if arm == "target_trained":  # it has target labels, and may choose by them
            for snapshot in snapshots:
                snapshot.scores.update(dict.fromkeys(RULES, snapshot.scores["oracle"]))
        chosen = {rule: max(snapshots, key=lambda s: (s.scores[rule], s.step)) for rule in RULES}
        row: dict[str, Any] = {"seconds": time.monotonic() - began, "steps": self.steps}
        for rule, best in chosen.items():
            row[key_of(rule)] = accuracy(best.test["logits"], best.test["label"])
            row[f"step_{rule}"] = best.step
        best = chosen[CHOSEN]
        row["source_accuracy"] = best.scores["source_validation"]
        if seed == self.config.seed:
            path = file_of(self.config.out, target, arm)
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(
                path, source=best.source["features"], features=best.test["features"],
                logits=best.test["logits"], label=best.test["label"],
            )  # fmt: skip
        return row, history

    def train(self, method: Method, trial: Trial) -> Run:
        """Train a method. Its stages share one optimiser; each takes its batches from the model of the stage before."""
        stages, recipe = STAGES.get(method, 1), METHODS[method](trial)
        every = -(-self.steps // min(self.config.validations, self.steps))
        optimizer = adamw(
            schedule(self.config.learning_rate or self.pair.rate, self.steps), weight_decay=0.01
        )
        step = make_step(recipe.loss, optimizer, recipe.labels)
        state, finish = step.init(recipe.model, jax.random.key(trial.seed)), recipe.finish
        snapshots: list[Snapshot] = []
        history: list[dict[str, Any]] = []
        print(f"{method}:")

        def validate(model: Model) -> dict[str, float]:
            done = min(every * (len(snapshots) + 1), self.steps)
            snapshots.append(self.look(finish(model), done))
            scores = snapshots[-1].scores
            return {"accuracy": scores["source_validation"], "target_accuracy": scores["oracle"]}

        for stage in range(1, stages + 1):
            if stage > 1:
                recipe = METHODS[method](trial.after(state.model))
            fitted = fit(
                step, state, loader(recipe.batches), steps=self.steps * stage // stages, validate=validate,
                validate_every=every,
            )  # fmt: skip
            state, history = fitted.state, [*history, *fitted.history]
        return Run(finish(fitted.model), snapshots, history)

    def look(self, model: Model, step: int) -> Snapshot:
        """The outputs of a model, and how each rule scores it."""
        source = self.outputs(model, self.pair.source["validation"])
        target = self.outputs(model, self.pair.target["validation"])
        test = self.outputs(model, self.pair.target["test"])
        return Snapshot(step, source, target, test, scores(source, target, step))

    def outputs(self, model: Model, split: Encoded) -> dict[str, np.ndarray]:
        """Logits, features and labels of a split."""
        batches = Batches(split, 100, train=False, buckets=self.pair.buckets)
        return outputs(model, batches, ("logits", "features", "label"))

    def tent(self, trial: Trial) -> Snapshot:
        """The source model adapting online to the target's test examples, in one pass, as they come."""
        model, split = trial.trained, self.pair.target["test"]
        order = np.random.default_rng(trial.seed).permutation(len(split))
        batches = [split.batch(order[i : i + 100], 1, None) for i in range(0, len(order), 100)]
        optimizer = adamw(schedule(1e-3, len(batches)), weight_decay=0.0)
        step = make_step(domain.Tent(), optimizer, domain.norm_only(model, batches[0]))
        logits = domain.adapt(step, model, batches, key=jax.random.key(trial.seed))
        before = self.look(model, self.steps)
        return replace(before, test={**before.test, "logits": logits[np.argsort(order)]})


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
