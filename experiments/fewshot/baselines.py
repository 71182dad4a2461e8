"""Few-shot baselines without meta-training: from scratch, and classifiers on frozen features."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.fewshot.episodes import episode, pooled, turned
from experiments.fewshot.methods import EpisodicRecipe, Test, Trial, accuracies
from jtl import heads, meta
from jtl.data import episodes
from jtl.errors import InputError
from jtl.model import Batch, Model
from jtl.outputs import outputs
from jtl.tasks import Classify
from jtl.wrap import function

HEAD_RATES = (0.01, 0.1, 1.0)  # tried on validation classes, as are those of scratch
SCRATCH_RATES = (0.01, 0.1, 0.4)
HEAD_STEPS = 100


def scratch(trial: Trial) -> EpisodicRecipe:
    """No training before: the network from its random start, fine-tuned on the support. Its rate is validated."""
    model = trial.classifier(trial.ways)
    inner = trial.trains(model)

    def test(model: Model) -> Test:
        def at(rate: float) -> Test:
            evaluate = meta.make_evaluate(
                trial.loss, steps=trial.test_steps, rate=rate, labels=inner, chunk=trial.chunk
            )
            return lambda batch, key: evaluate(model, batch, key)["accuracy"]

        return _validated(trial, trial.tasks.pools["validation"], at, SCRATCH_RATES)

    return EpisodicRecipe(model, test)


def pretrained(trial: Trial, module: Any = None) -> EpisodicRecipe:
    """A network that classifies all training classes, turned ones as others; nothing is tested."""
    pool = trial.tasks.pools["train"]
    classes = len(pool.classes) * (4 if trial.turns else 1)
    model = trial.classifier(classes)
    if module is not None:
        body = trial.tasks.start(trial.key)
        model = heads.attach(body, module(classes), on="features", width=trial.tasks.width, key=trial.key)
    label = trial.tasks.labels["train"]

    def draw(source: Any, key: jax.Array) -> Batch:
        first, second = jax.random.split(key)
        rows = jax.random.randint(first, (64,), 0, len(label))
        batch = {name: array[rows] for name, array in source.items()}
        if trial.turns:
            turns = jax.random.randint(second, (64,), 0, 4)
            batch["image"] = turned(batch["image"], turns)
            batch["label"] = batch["label"] + turns * len(pool.classes)
        return episode(batch)

    loss = Classify(stats="batch" if trial.tasks.batch_norm else "running")
    source = {**pool.arrays, "label": jnp.asarray(label)}
    return EpisodicRecipe(model, _nothing, draw, source, loss, labels=trial.trains(model))


def _nothing(model: Model) -> Test:
    raise TypeError("a pretrained body is no few-shot learner: test head or nearest_centroid")


def feature_pools(trial: Trial, model: Model | None) -> dict[str, episodes.Pool]:
    """Validation and test classes as the features of ``model`` by its running statistics; None: as they are."""
    if model is None:
        return trial.tasks.pools
    pools = {}
    for split in ("validation", "test"):
        arrays, label = trial.tasks.pools[split].arrays, trial.tasks.labels[split]
        cuts = [slice(i, i + 256) for i in range(0, len(label), 256)]
        batches = [episode({name: array[cut] for name, array in arrays.items()}) for cut in cuts]
        x = outputs(model, batches, ("features",))["features"]
        pools[split] = pooled({"x": x.astype(np.float32)}, label)
    return pools


def on_features(trial: Trial, pools: dict[str, episodes.Pool], algorithm: str) -> Test:
    """How ``head``, ``nearest_centroid`` and ``baseline_plus_plus`` classify episodes of features."""
    identity = function(lambda params, x: {"features": x}, {})
    if algorithm == "nearest_centroid":
        return partial(
            accuracies, meta.Prototypes(ways=trial.ways, normalise="running"), identity, chunk=None
        )
    width = next(iter(pools["test"].arrays.values())).shape[-1]
    module = heads.Classifier(trial.ways) if algorithm == "head" else meta.Cosine(trial.ways, scale=10.0)
    model = heads.attach(identity, module, on="features", width=width, key=trial.key)

    def at(rate: float) -> Test:
        evaluate = meta.make_evaluate(Classify(), steps=HEAD_STEPS, rate=rate)
        return lambda batch, key: evaluate(model, batch, key)["accuracy"]

    return _validated(trial, pools["validation"], at, HEAD_RATES)


def _validated(
    trial: Trial, pool: episodes.Pool, at: Callable[[float], Test], rates: tuple[float, ...]
) -> Test:
    """The test at the rate that is best after the last step on 50 tasks of validation classes."""
    ways = min(trial.ways, len(pool.classes))
    if ways < trial.ways:
        raise InputError(
            f"{trial.ways} ways, but validation has {ways} classes to choose rates by: ask for fewer"
        )
    batch = episode(
        episodes.sample(pool, trial.key, tasks=50, ways=trial.ways, shots=trial.shots, queries=trial.queries)
    )

    def score(rate: float) -> float:
        try:
            return float(at(rate)(batch, trial.key)[:, -1].mean())
        except meta.Diverged:
            return -1.0

    return at(max(rates, key=score))
