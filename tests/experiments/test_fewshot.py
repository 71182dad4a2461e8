"""Few-shot learning: bad flags, what each algorithm trains and sees, and a real run."""

from dataclasses import replace
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.fewshot import baselines
from experiments.fewshot.config import FewShot
from experiments.fewshot.episodes import Tasks, pooled, turned
from experiments.fewshot.methods import ON_FEATURES, Algorithm, Trial
from experiments.fewshot.study import run
from experiments.fewshot.training import METHODS
from jtl import tree
from jtl.meta.patch_convolution import PatchConv4
from jtl.model import linen
from jtl.models.mlp import MLP
from jtl.train import make_step


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"ways": (5, 20), "shots": (1,)}, "go in pairs"),
        ({"updates": 10}, "--updates must be a multiple of 50, got 10"),
        ({"inner_steps": 0}, "--inner-steps must be at least 1"),
        ({"test_episodes": 1}, "--test-episodes must be at least 2"),
        ({"adapt": "lora"}, "--adapt lora keeps pretrained weights, and conv4 has none"),
        ({"data": "newsgroups20"}, "conv4 reads images, but --data newsgroups20 holds texts: try minilm"),
        ({"ways": (700,), "shots": (1,), "algorithm": ("maml",)}, "700 ways, but only 606 classes"),
        ({"ways": (5,), "shots": (18,), "algorithm": ("maml",)}, "18 shots and 5 queries a class"),
    ],
)
def test_bad_flags_are_named(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(FewShot(out=tmp_path, quick=True, **flags))


def test_every_name_of_the_command_line_is_an_algorithm():
    assert {*METHODS, *ON_FEATURES} == set(get_args(Algorithm))


def test_turned_by_quarters():
    image = jax.random.randint(jax.random.key(0), (5, 4, 4, 1), 0, 255).astype(jnp.uint8)
    turns = jnp.array([0, 1, 2, 3, 1])
    expected = np.stack([np.rot90(one, k) for one, k in zip(np.asarray(image), turns, strict=True)])
    np.testing.assert_array_equal(turned(image, turns), expected)


@pytest.fixture(scope="module")
def trial():
    """Ten classes of 16 x 16 pictures, each a grey level and noise, in all splits."""
    rng = np.random.default_rng(0)
    label = np.repeat(np.arange(10), 6).astype(np.int32)
    noise = rng.integers(0, 20, (60, 16, 16, 1))
    pixels = (20 * label[:, None, None, None] + noise).astype(np.uint8)
    module = PatchConv4(4, strided=True)
    blank = jnp.zeros((2, 16, 16, 1))
    tasks = Tasks(
        name="greys",
        pools={split: pooled({"image": pixels}, label) for split in ("train", "validation", "test")},
        start=lambda key: linen(module, module.init(key, blank)),
        width=4,
        trained=".*",
        frozen=False,
        batch_norm=True,
        labels=dict.fromkeys(("train", "validation", "test"), label),
    )
    return Trial(
        tasks=tasks, ways=3, shots=2, train_ways=4, queries=1, batch=2, inner_steps=2, test_steps=2,
        inner_rate=None, normalise="transductive", chunk=1, turns=True, seed=0,
    )  # fmt: skip


def test_every_class_of_an_episode_is_turned_as_one(trial):
    batch = trial.episodes()(trial.tasks.pools["train"], jax.random.key(1))
    assert batch["support"]["image"].shape == (2, 6, 16, 16, 1)
    assert float(batch["support"]["image"].min()) >= -1 and batch["query"]["image"].dtype == jnp.float32
    plain = replace(trial, turns=False).episodes()(trial.tasks.pools["train"], jax.random.key(1))
    for t in range(2):
        quarters = {label: set() for label in range(3)}
        for part in ("support", "query"):
            for i, label in enumerate(np.asarray(plain[part]["label"][t])):
                a, b = (np.asarray(one[part]["image"][t, i]) for one in (plain, batch))
                quarters[int(label)].add(next(k for k in range(4) if (np.rot90(a, k) == b).all()))
        assert all(len(found) == 1 for found in quarters.values())


@pytest.fixture(scope="module")
def on_vectors(trial):
    """The same on vectors, through a network that compiles fast; a real run has the convolutions."""
    tasks = trial.tasks
    x = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    x[np.arange(60), tasks.labels["train"] % 8] += 2
    module = MLP((4,))
    tasks = replace(
        tasks,
        pools=dict.fromkeys(tasks.pools, pooled({"x": x}, tasks.labels["train"])),
        start=lambda key: linen(module, module.init(key, jnp.zeros((1, 8)))),
        batch_norm=False,
    )
    return replace(trial, tasks=tasks, normalise="running", turns=False)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", [a for a in METHODS if a != "scratch"])
def test_a_step_of_every_algorithm_learns_and_its_test_is_an_accuracy(on_vectors, algorithm):
    trial = on_vectors
    recipe = METHODS[algorithm](trial)
    step = make_step(recipe.loss, optax.sgd(1e-2), recipe.labels, gradient=recipe.gradient)
    batch = recipe.draw(recipe.source, jax.random.key(0))
    state, metrics = step(step.init(recipe.model, trial.key), batch)
    assert np.isfinite(metrics["loss"]) and float(metrics["gradient_norm"]) > 0
    before, after = tree.flatten(recipe.model.params), tree.flatten(state.model.params)
    assert all((before[path] != after[path]).any() for path in before if "bias" not in path)
    found = recipe.test(state.model)(trial.episodes()(trial.tasks.pools["test"], trial.key), trial.key)
    assert found.shape[0] == 2 and ((found >= 0) & (found <= 1)).all()


def test_baselines_on_features(trial):
    """Grey levels as features: nearest centroids know ten classes; so do heads on them."""
    label = trial.tasks.labels["test"]
    x = np.eye(10, dtype=np.float32)[label] + np.random.default_rng(0).normal(size=(60, 10)).astype("f4") / 50
    pools = {split: pooled({"x": x}, label) for split in ("validation", "test")}
    plain = replace(trial, turns=False)
    batch = plain.episodes()(pools["test"], trial.key)
    for algorithm in ("nearest_centroid", "head", "baseline_plus_plus"):
        found = baselines.on_features(plain, pools, algorithm)(batch, trial.key)
        assert found[:, -1].min() == 1.0, algorithm


@pytest.mark.slow
def test_fewshot(tmp_path):
    config = FewShot(out=tmp_path, quick=True)
    result = run(config)
    found = result.summary["accuracy_5w1s"]
    assert list(found) == ["maml", "prototypes", "head", "nearest_centroid"]
    assert all(own["mean"] > 0.3 for own in found.values())  # chance is 0.2
    assert {row["normalise"] for row in result.rows} == {"transductive", "running"}
    assert all(0 < row["ci95"] < 0.1 for row in result.rows)
    again = run(FewShot(out=tmp_path, quick=True, resume=True))
    assert again.summary == result.summary


@pytest.mark.slow
def test_fewshot_of_texts(tmp_path, short_minilm):
    config = FewShot(
        out=tmp_path, quick=True, data="newsgroups20", backbone=short_minilm, ways=(5,), shots=(5,),
        algorithm=("prototypes", "nearest_centroid"),
    )  # fmt: skip
    found = run(config).summary["accuracy_5w5s"]
    assert found["nearest_centroid"]["mean"] > 0.4
