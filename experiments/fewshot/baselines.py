"""Few-shot baselines without meta-training: from scratch, and classifiers on frozen features."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.fewshot.episodes import episode, pooled, turned
from experiments.fewshot.methods import Recipe, Test, Trial, measure
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


# --- baselines -------------------------------------------------------------------------------------


def scratch(s: Trial) -> Recipe:
    """No training before: the network from its random start, fine-tuned on the support. Its rate is validated."""
    model = s.classifier(s.ways)
    inner = s.trains(model)

    def test(model: Model) -> Test:
        def at(rate: float) -> Test:
            evaluate = meta.make_evaluate(s.loss, steps=s.test_steps, rate=rate, labels=inner, chunk=s.chunk)
            return lambda batch, key: evaluate(model, batch, key)["accuracy"]

        return _validated(s, s.tasks.pools["validation"], at, SCRATCH_RATES)

    return Recipe(model, test)


def pretrained(s: Trial, module: Any = None) -> Recipe:
    """A network that classifies all training classes, turned ones as others; nothing is tested."""
    pool = s.tasks.pools["train"]
    classes = len(pool.classes) * (4 if s.turns else 1)
    model = s.classifier(classes)
    if module is not None:
        body = s.tasks.start(s.key)
        model = heads.attach(body, module(classes), on="features", width=s.tasks.width, key=s.key)
    label = s.tasks.labels["train"]

    def draw(source: Any, key: jax.Array) -> Batch:
        first, second = jax.random.split(key)
        rows = jax.random.randint(first, (64,), 0, len(label))
        batch = {name: array[rows] for name, array in source.items()}
        if s.turns:
            turns = jax.random.randint(second, (64,), 0, 4)
            batch["image"] = turned(batch["image"], turns)
            batch["label"] = batch["label"] + turns * len(pool.classes)
        return episode(batch)

    loss = Classify(stats="batch" if s.tasks.batch_norm else "running")
    source = {**pool.arrays, "label": jnp.asarray(label)}
    return Recipe(model, _nothing, draw, source, loss, labels=s.trains(model))


def _nothing(model: Model) -> Test:
    raise TypeError("a pretrained body is no few-shot learner: test head or nearest_centroid")


def feature_pools(s: Trial, model: Model | None) -> dict[str, episodes.Pool]:
    """Validation and test classes as the features of ``model`` by its running statistics; None: as they are."""
    if model is None:
        return s.tasks.pools
    pools = {}
    for split in ("validation", "test"):
        arrays, label = s.tasks.pools[split].arrays, s.tasks.labels[split]
        cuts = [slice(i, i + 256) for i in range(0, len(label), 256)]
        batches = [episode({name: array[cut] for name, array in arrays.items()}) for cut in cuts]
        x = outputs(model, batches, ("features",))["features"]
        pools[split] = pooled({"x": x.astype(np.float32)}, label)
    return pools


def on_features(s: Trial, pools: dict[str, episodes.Pool], algorithm: str) -> Test:
    """How ``head``, ``nearest_centroid`` and ``baseline_plus_plus`` classify episodes of features."""
    identity = function(lambda params, x: {"features": x}, {})
    if algorithm == "nearest_centroid":
        return partial(measure, meta.Prototypes(ways=s.ways, normalise="running"), identity, chunk=None)
    width = next(iter(pools["test"].arrays.values())).shape[-1]
    module = heads.Classifier(s.ways) if algorithm == "head" else meta.Cosine(s.ways, scale=10.0)
    model = heads.attach(identity, module, on="features", width=width, key=s.key)

    def at(rate: float) -> Test:
        evaluate = meta.make_evaluate(Classify(), steps=HEAD_STEPS, rate=rate)
        return lambda batch, key: evaluate(model, batch, key)["accuracy"]

    return _validated(s, pools["validation"], at, HEAD_RATES)


def _validated(s: Trial, pool: episodes.Pool, at: Callable[[float], Test], rates: tuple[float, ...]) -> Test:
    """The test at the rate that is best after the last step on 50 tasks of validation classes."""
    ways = min(s.ways, len(pool.classes))
    if ways < s.ways:
        raise InputError(
            f"{s.ways} ways, but validation has {ways} classes to choose rates by: ask for fewer"
        )
    batch = episode(episodes.sample(pool, s.key, tasks=50, ways=s.ways, shots=s.shots, queries=s.queries))

    def score(rate: float) -> float:
        try:
            return float(at(rate)(batch, s.key)[:, -1].mean())
        except meta.Diverged:
            return -1.0

    return at(max(rates, key=score))
