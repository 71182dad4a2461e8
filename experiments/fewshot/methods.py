"""The algorithms of ``experiments.fewshot``: what each trains, and how it then learns a new task.

An algorithm is a function from what all start with (``Trial``) to an ``EpisodicRecipe``. The papers are named in
``jtl.meta``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from experiments.fewshot.episodes import Tasks, episode, turned
from jtl import heads, meta, tree
from jtl.data import episodes
from jtl.model import Batch, Model
from jtl.tasks import Classify
from jtl.train import backprop

Algorithm = Literal[
    "maml", "fomaml", "anil", "boil", "reptile", "meta_sgd", "maml_plus_plus", "meta_curvature", "imaml",
    "prototypes", "matching", "relation", "ridge",
    "scratch", "head", "nearest_centroid", "baseline_plus_plus",
]  # fmt: skip
TABLE: tuple[Algorithm, ...] = (
    "maml", "fomaml", "anil", "reptile", "prototypes", "matching", "ridge",
    "scratch", "head", "nearest_centroid", "baseline_plus_plus",
)  # fmt: skip
METRIC = ("prototypes", "matching", "relation", "ridge")  # train once for all numbers of ways
ON_FEATURES = (
    "head",
    "nearest_centroid",
    "baseline_plus_plus",
)  # of a network that is trained once for all settings

# From a model, episodes and a key to the query accuracy of each task after each inner step, (T, K + 1); K may be 0.
Test = Callable[[Any, jax.Array], np.ndarray]


@dataclass(frozen=True)
class Trial:
    """What every algorithm starts with, for one seed and one N-way K-shot setting.

    Attributes:
        tasks: the data and the network.
        ways: N.
        shots: K.
        train_ways: of the episodes that metric learners train on.
        queries: query rows a class of training episodes.
        batch: tasks of an update.
        inner_steps: of training.
        test_steps: inner steps of testing.
        inner_rate: of the inner loop; None for the algorithm's own.
        normalise: statistics of batch normalisation, ``running`` for a network that has none.
        chunk: tasks that run at a time.
        turns: whether each class of a training task is turned by some quarters of a circle.
        seed: of new leaves.
    """

    tasks: Tasks
    ways: int
    shots: int
    train_ways: int
    queries: int
    batch: int
    inner_steps: int
    test_steps: int
    inner_rate: float | None
    normalise: meta.normalise.Normalise
    chunk: int | None
    turns: bool
    seed: int

    @property
    def key(self) -> jax.Array:
        """For new leaves."""
        return jax.random.key(self.seed)

    @property
    def loss(self) -> Any:
        """Cross-entropy of a task."""
        if self.normalise == "support":
            return meta.SupportStats(Classify(stats="batch"))
        return Classify(stats="batch" if self.normalise == "transductive" else "running")

    def classifier(self, classes: int) -> Model:
        """The network with a new linear head."""
        body = self.tasks.start(self.key)
        return heads.classifier(body, classes, key=self.key, on="features", width=self.tasks.width)

    def rate(self, usual: float) -> float:
        """The inner rate."""
        return usual if self.inner_rate is None else self.inner_rate

    def trains(self, model: Model, within: str = ".*") -> PyTree:
        """1 for the leaves that train and that ``within`` matches, else 0."""
        outer = tree.matches(self.tasks.trained, model.params) if self.tasks.trained != ".*" else None
        own = tree.matches(within, model.params)
        both = own if outer is None else jax.tree.map(lambda a, b: a and b, outer, own)
        return jax.tree.map(float, both)

    def episodes(
        self, ways: int | None = None, shots: int | None = None, queries: int | None = None
    ) -> Callable[[Any, jax.Array], Batch]:
        """Draws a batch of training episodes; what is not given is the setting'trial."""
        ways, shots, queries = ways or self.ways, shots or self.shots, queries or self.queries

        def draw(pool: episodes.Pool, key: jax.Array) -> Batch:
            first, second = jax.random.split(key)
            batch = episodes.sample(pool, first, tasks=self.batch, ways=ways, shots=shots, queries=queries)
            if self.turns:  # all rows of a class alike
                of_class = jax.random.randint(second, (self.batch, ways), 0, 4)
                for part in batch.values():
                    own = jnp.take_along_axis(of_class, part["label"], 1)
                    part["image"] = turned(part["image"], own)
            return episode(batch)

        return draw


@dataclass(frozen=True)
class EpisodicRecipe:
    """How an algorithm trains on batches that are drawn on the device, and is tested on new tasks.

    Attributes:
        model: before training.
        draw: from a source and a key to a batch; None if nothing trains.
        source: what it draws from.
        loss: what it minimises.
        gradient: how the update is taken.
        labels: what trains.
        outer_rate: the highest; None for that of all.
        sgd: whether the outer optimiser is plain gradient descent, as Reptile's; else Adam.
        test: from the trained model to how it is tested.
    """

    model: Model
    test: Callable[[Model], Test]
    draw: Callable[[Any, jax.Array], Batch] | None = None
    source: Any = None
    loss: Any = None
    gradient: Any = backprop
    labels: PyTree | None = None
    outer_rate: float | None = None
    sgd: bool = False


# --- gradients -------------------------------------------------------------------------------------


def _through(
    trial: Trial, model: Model, gradient: Any, rate: Any, inner: PyTree, **options: Any
) -> EpisodicRecipe:
    """Training by ``gradient`` and testing by the inner loop that it trains through."""
    draw = options.pop("draw", trial.episodes())
    evaluate = meta.make_evaluate(
        trial.loss, steps=trial.test_steps, rate=rate, labels=inner, chunk=trial.chunk
    )
    test = lambda model: lambda batch, key: evaluate(model, batch, key)["accuracy"]  # noqa: E731
    return EpisodicRecipe(
        model,
        test,
        draw,
        trial.tasks.pools["train"],
        trial.loss,
        gradient,
        labels=trial.trains(model),
        **options,
    )


def maml(trial: Trial, *, within: str = ".*", **options: Any) -> EpisodicRecipe:
    """The gradient through the inner loop."""
    model, rate = trial.classifier(trial.ways), trial.rate(0.4)
    inner = trial.trains(model, within)
    gradient = meta.maml(steps=trial.inner_steps, rate=rate, labels=inner, chunk=trial.chunk, **options)
    return _through(trial, model, gradient, rate, inner)


def fomaml(trial: Trial) -> EpisodicRecipe:
    """MAML without second derivatives."""
    return maml(trial, first_order=True)


def anil(trial: Trial) -> EpisodicRecipe:
    """The head alone adapts."""
    return maml(trial, within="head/.*")


def boil(trial: Trial) -> EpisodicRecipe:
    """All but the head adapts."""
    return maml(trial, within="(?!head/).*")


def reptile(trial: Trial) -> EpisodicRecipe:
    """Towards where five steps on ten rows each lead, as in the paper for Omniglot, if not with its inner Adam."""
    model, rate = trial.classifier(trial.ways), trial.rate(0.1)
    inner = trial.trains(model)
    # It trains on one set of rows, of as many as the others have in support and query; one row is for the metrics.
    rows = trial.shots + trial.queries
    draw = trial.episodes(shots=rows, queries=1)
    gradient = meta.reptile(
        steps=5, rate=rate, labels=inner, minibatch=min(10, rows * trial.ways), chunk=trial.chunk
    )
    return _through(trial, model, gradient, rate, inner, outer_rate=1.0, sgd=True, draw=draw)


def _learned(trial: Trial, rule: Any, **options: Any) -> EpisodicRecipe:
    model = meta.learn(trial.classifier(trial.ways), rule)
    inner = trial.trains(model)
    gradient = meta.maml(steps=trial.inner_steps, rate=rule, labels=inner, chunk=trial.chunk, **options)
    return _through(trial, model, gradient, rule, inner, draw=options.pop("draw", trial.episodes()))


def meta_sgd(trial: Trial) -> EpisodicRecipe:
    """MAML with a learned rate for each entry."""
    return _learned(trial, meta.MetaSGD(trial.rate(0.4)))


def meta_curvature(trial: Trial) -> EpisodicRecipe:
    """MAML with learned matrices on the gradients."""
    return _learned(trial, meta.MetaCurvature(trial.rate(0.4)))


def maml_plus_plus(trial: Trial) -> EpisodicRecipe:
    """MAML with a learned rate for each leaf and step, and the loss over all steps, evenly."""
    rule = meta.PerStep(trial.rate(0.4), trial.inner_steps)
    recipe = _learned(trial, rule, multi_step=True)
    weights = jnp.tile(meta.step_weights(trial.inner_steps, 0.0)[None], (trial.batch, 1))
    plain = trial.episodes()
    draw = lambda pool, key: {**plain(pool, key), "step_weight": weights}  # noqa: E731
    return replace(recipe, draw=draw)


def imaml(trial: Trial) -> EpisodicRecipe:
    """The implicit gradient at the end of the inner loop."""
    model, rate = trial.classifier(trial.ways), trial.rate(0.1)
    inner = trial.trains(model)
    gradient = meta.imaml(
        steps=trial.inner_steps, rate=rate, regularisation=2.0, cg_steps=5, labels=inner, chunk=trial.chunk
    )
    return _through(trial, model, gradient, rate, inner)


# --- metric learners -------------------------------------------------------------------------------


def _metric(trial: Trial, model: Model, learner: Callable[..., meta.Metric]) -> EpisodicRecipe:
    loss = learner(ways=trial.train_ways, normalise=trial.normalise)
    test = partial(accuracies, learner(ways=trial.ways, normalise=trial.normalise), chunk=trial.chunk)
    return EpisodicRecipe(
        model, lambda model: partial(test, model), trial.episodes(ways=trial.train_ways),
        trial.tasks.pools["train"], loss, labels=trial.trains(model),
    )  # fmt: skip


def prototypes(trial: Trial) -> EpisodicRecipe:
    """Distances to class means."""
    return _metric(trial, trial.tasks.start(trial.key), meta.Prototypes)


def matching(trial: Trial) -> EpisodicRecipe:
    """Attention to the support by cosine."""
    return _metric(trial, trial.tasks.start(trial.key), meta.Matching)


def relation(trial: Trial) -> EpisodicRecipe:
    """A learned comparison of class and query."""
    module = meta.Relation(hidden=64)
    model = meta.with_relation(trial.tasks.start(trial.key), module, width=trial.tasks.width, key=trial.key)
    return _metric(trial, model, partial(meta.RelationNet, module=module))


def ridge(trial: Trial) -> EpisodicRecipe:
    """A ridge regression on the support, solved in each task."""
    return _metric(trial, meta.with_ridge(trial.tasks.start(trial.key)), meta.Ridge)


def accuracies(
    learner: meta.Metric, model: Model, batch: Any, key: jax.Array, *, chunk: int | None
) -> np.ndarray:
    """The accuracy of each task, (T, 1)."""

    @jax.jit
    def run(model: Model, batch: Any) -> Any:
        one = lambda task: learner.tasks(model, jax.tree.map(lambda x: x[None], task))[1]["accuracy"]  # noqa: E731
        return jax.lax.map(one, batch, batch_size=chunk)

    return np.asarray(run(model, batch))
