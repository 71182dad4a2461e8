"""Meta-training and testing the algorithms of one seed; what settings can share is trained once."""

from __future__ import annotations

import time
from typing import Any

import jax
import optax

from experiments.common.device_loop import train
from experiments.fewshot import baselines
from experiments.fewshot import methods as methods
from experiments.fewshot.config import BLOCK, FewShot
from experiments.fewshot.episodes import Tasks, episode
from jtl.data import episodes
from jtl.model import Model
from jtl.report.report import (
    estimate,
)
from jtl.train import make_step, schedule


class Trainer:
    """Trains and tests the algorithms of one seed; what settings can share is trained once."""

    def __init__(self, tasks: Tasks, config: FewShot, seed: int) -> None:
        self.tasks, self.config, self.seed = tasks, config, seed
        self.updates = 100 if config.quick else config.updates
        self.done: dict[tuple[Any, ...], tuple[Any, list[dict[str, Any]], float]] = {}

    def __call__(self, algorithm: str, ways: int, shots: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The row of an algorithm in a setting, and its learning curve if it was trained for it."""
        config = self.config
        setting = self.setting(algorithm, ways, shots)
        frozen_features = algorithm in methods.BASELINES and algorithm != "scratch"
        if frozen_features:
            pools, curve, seconds = self.features(setting, algorithm)
            pool = pools["test"]
        else:
            model, curve, seconds = self.trained(setting, algorithm)
            pool = self.tasks.pools["test"]
        began = time.monotonic()
        if frozen_features:
            test = baselines.on_features(setting, pools, algorithm)
        else:
            test = getattr(methods, algorithm)(setting).test(model)
        count = 100 if config.quick else config.test_episodes
        key = jax.random.fold_in(jax.random.key(self.seed), 2)
        drawn = episodes.sample(pool, key, tasks=count, ways=ways, shots=shots, queries=config.test_queries)
        curves = test(episode(drawn), key)
        found = estimate(curves[:, -1].tolist())
        batch_norm = self.tasks.batch_norm
        row = {
            "accuracy": found["mean"],
            "ci95": found["ci95"],
            "episodes": count,
            "accuracy_by_task": curves[:, -1],
            "accuracy_by_step": curves.mean(0),
            "normalise": "running" if frozen_features or not batch_norm else config.normalise,
            "training_seconds": seconds,
            "seconds": seconds + time.monotonic() - began,
        }
        return row, curve

    def setting(self, algorithm: str, ways: int, shots: int) -> methods.Trial:
        """What the algorithm starts with."""
        config = self.config
        metric = algorithm in methods.METRIC
        return methods.Trial(
            tasks=self.tasks,
            ways=ways,
            shots=shots,
            train_ways=min(config.metric_ways, len(self.tasks.pools["train"].classes)),
            queries=config.queries,
            batch=config.metric_tasks if metric else config.tasks,
            inner_steps=config.inner_steps,
            test_steps=config.test_steps,
            inner_rate=config.inner_rate,
            normalise=config.normalise if self.tasks.batch_norm else "running",
            # One task after another is a fifth faster on a CPU, and needs the memory of one.
            chunk=1 if jax.default_backend() == "cpu" else None,
            turns=config.turns and "image" in self.tasks.pools["train"].arrays,
            seed=self.seed,
        )

    def trained(self, setting: methods.Trial, algorithm: str) -> tuple[Model, list[dict[str, Any]], float]:
        """The model of an algorithm. Metric learners serve any number of ways, baselines any setting."""
        shape = (setting.ways, setting.shots)
        shared = shape[1:] if algorithm in methods.METRIC else shape
        key = (algorithm, *shared)
        if key in self.done:
            model, _, _ = self.done[key]
            return model, [], 0.0
        recipe = getattr(methods, algorithm)(setting)
        self.done[key] = self.train(recipe, f"{algorithm} {setting.ways}-way {setting.shots}-shot")
        return self.done[key]

    def features(self, setting: methods.Trial, algorithm: str) -> tuple[Any, list[dict[str, Any]], float]:
        """Pools of features for the baselines on them: two networks, with a linear and with a cosine head."""
        if self.tasks.frozen:
            return baselines.feature_pools(setting, None), [], 0.0
        cosine = algorithm == "baseline_plus_plus"
        key = ("pretrained", cosine)
        if key in self.done:
            pools, _, _ = self.done[key]
            return pools, [], 0.0
        module = (lambda classes: methods.meta.Cosine(classes, scale=10.0)) if cosine else None
        model, curve, seconds = self.train(baselines.pretrained(setting, module), "all classes")
        self.done[key] = baselines.feature_pools(setting, model), curve, seconds
        return self.done[key]

    def train(self, recipe: methods.Recipe, title: str) -> tuple[Model, list[dict[str, Any]], float]:
        """The model after training, its learning curve and the seconds that it took."""
        if recipe.draw is None:
            return recipe.model, [], 0.0
        print(f"{title}:")
        began = time.monotonic()
        config = self.config
        rate = schedule(
            recipe.outer_rate or config.learning_rate, self.updates, warmup=0.0 if recipe.sgd else 0.05
        )
        optimizer = optax.sgd(rate) if recipe.sgd else optax.adam(rate)
        step = make_step(recipe.loss, optimizer, recipe.labels, gradient=recipe.gradient)
        key = jax.random.fold_in(jax.random.key(self.seed), 1)
        model, curve = train(
            step, recipe.model, recipe.draw, recipe.source, key,
            updates=self.updates, block=BLOCK, report=500,
        )  # fmt: skip
        kept = ("step", "loss", "accuracy")
        return model, [{name: point[name] for name in kept} for point in curve], time.monotonic() - began
