"""Meta-training and testing the algorithms; what settings can share is trained once."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import optax

from experiments.common.device_loop import train
from experiments.fewshot import baselines, methods
from experiments.fewshot.config import BLOCK, FewShot
from experiments.fewshot.episodes import Tasks, episode
from experiments.fewshot.methods import METRIC, ON_FEATURES, Algorithm, EpisodicRecipe, Trial
from jtl import meta
from jtl.data import episodes
from jtl.report import estimate
from jtl.train import make_step, schedule

METHODS: dict[Algorithm, Callable[[Trial], EpisodicRecipe]] = {  # all but ON_FEATURES
    "maml": methods.maml, "fomaml": methods.fomaml, "anil": methods.anil, "boil": methods.boil,
    "reptile": methods.reptile, "meta_sgd": methods.meta_sgd, "maml_plus_plus": methods.maml_plus_plus,
    "meta_curvature": methods.meta_curvature, "imaml": methods.imaml,
    "prototypes": methods.prototypes, "matching": methods.matching, "relation": methods.relation,
    "ridge": methods.ridge, "scratch": baselines.scratch,
}  # fmt: skip
Curve = list[dict[str, Any]]
Trained = tuple[
    Any, Curve, float
]  # a model or features by it, its learning curve and the seconds that they took


class Trainer:
    """Trains and tests the algorithms; what the settings of a seed can share is trained once."""

    def __init__(self, tasks: Tasks, config: FewShot) -> None:
        self.tasks, self.config = tasks, config
        self.updates = 100 if config.quick else config.updates
        self.seed = config.seed
        self.done: dict[tuple[Any, ...], Trained] = {}  # of that seed

    def __call__(self, *, arm: Algorithm, setting: str, seed: int) -> tuple[dict[str, Any], Curve]:
        """The row of an algorithm in a setting, and its learning curve if it was trained for it."""
        if seed != self.seed:
            self.seed, self.done = seed, {}
        config, on_features = self.config, arm in ON_FEATURES
        trial = self.trial(arm, setting)
        if on_features:
            pools, curve, seconds = self.features(trial, arm)
            pool = pools["test"]
        else:
            model, curve, seconds = self.trained(trial, arm)
            pool = self.tasks.pools["test"]
        began = time.monotonic()
        test = baselines.on_features(trial, pools, arm) if on_features else METHODS[arm](trial).test(model)
        count = 100 if config.quick else config.test_episodes
        key = jax.random.fold_in(jax.random.key(seed), 2)
        drawn = episodes.sample(
            pool, key, tasks=count, ways=trial.ways, shots=trial.shots, queries=config.test_queries
        )
        curves = test(episode(drawn), key)
        found = estimate(curves[:, -1].tolist())
        row = {
            "accuracy": found["mean"],
            "ci95": found["ci95"],
            "episodes": count,
            "accuracy_by_task": curves[:, -1],
            "accuracy_by_step": curves.mean(0),
            "normalise": "running" if on_features or not self.tasks.batch_norm else config.normalise,
            "training_seconds": seconds,
            "seconds": seconds + time.monotonic() - began,
        }
        return row, curve

    def trial(self, algorithm: Algorithm, setting: str) -> Trial:
        """What the algorithm starts with."""
        config = self.config
        ways, shots = config.settings[setting]
        return Trial(
            tasks=self.tasks,
            ways=ways,
            shots=shots,
            train_ways=min(config.metric_ways, len(self.tasks.pools["train"].classes)),
            queries=config.queries,
            batch=config.metric_tasks if algorithm in METRIC else config.tasks,
            inner_steps=config.inner_steps,
            test_steps=config.test_steps,
            inner_rate=config.inner_rate,
            normalise=config.normalise if self.tasks.batch_norm else "running",
            # One task after another is a fifth faster on a CPU, and needs the memory of one.
            chunk=1 if jax.default_backend() == "cpu" else None,
            turns=config.turns and "image" in self.tasks.pools["train"].arrays,
            seed=self.seed,
        )

    def trained(self, trial: Trial, algorithm: Algorithm) -> Trained:
        """The model of an algorithm. Metric learners serve any number of ways."""
        key = (algorithm, trial.shots) if algorithm in METRIC else (algorithm, trial.ways, trial.shots)
        title = f"{algorithm} {trial.ways}-way {trial.shots}-shot"
        return self._once(key, lambda: self.train(METHODS[algorithm](trial), title))

    def features(self, trial: Trial, algorithm: Algorithm) -> Trained:
        """Pools of features for the baselines on them: two networks, with a linear and with a cosine head."""
        if self.tasks.frozen:
            return baselines.feature_pools(trial, None), [], 0.0
        cosine = algorithm == "baseline_plus_plus"

        def make() -> Trained:
            module = (lambda classes: meta.Cosine(classes, scale=10.0)) if cosine else None
            model, curve, seconds = self.train(baselines.pretrained(trial, module), "all classes")
            return baselines.feature_pools(trial, model), curve, seconds

        return self._once(("pretrained", cosine), make)

    def _once(self, key: tuple[Any, ...], make: Callable[[], Trained]) -> Trained:
        """What ``make`` gives; the second time without a curve, in no time."""
        if key in self.done:
            return self.done[key][0], [], 0.0
        self.done[key] = make()
        return self.done[key]

    def train(self, recipe: EpisodicRecipe, title: str) -> Trained:
        """The model after training, its learning curve and the seconds that it took."""
        if recipe.draw is None:
            return recipe.model, [], 0.0
        print(f"{title}:")
        began = time.monotonic()
        highest = recipe.outer_rate or self.config.learning_rate
        rate = schedule(highest, self.updates, warmup=0.0 if recipe.sgd else 0.05)
        optimizer = optax.sgd(rate) if recipe.sgd else optax.adam(rate)
        step = make_step(recipe.loss, optimizer, recipe.labels, gradient=recipe.gradient)
        model, curve = train(
            step, recipe.model, recipe.draw, recipe.source, jax.random.fold_in(jax.random.key(self.seed), 1),
            updates=self.updates, block=BLOCK, report=500,
        )  # fmt: skip
        kept = ("step", "loss", "accuracy")
        return model, [{name: point[name] for name in kept} for point in curve], time.monotonic() - began
