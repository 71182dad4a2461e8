import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl.data.batches.episodes import pool, pools, sample, sinusoids
from jtl.data.dataset import DataError, split_classes

# Class c has 4 + c rows (0 to 5), shuffled; a row's x tells its class and its number.
LABEL = np.random.default_rng(0).permutation(np.repeat(np.arange(6), 4 + np.arange(6)))
X = np.stack([LABEL, np.arange(len(LABEL))], 1).astype(np.float32)
SHAPE = {"tasks": 50, "ways": 3, "shots": 2, "queries": 3}


@pytest.fixture(scope="module")
def drawn():
    source = pool({"x": X, "label": LABEL}, LABEL, [1, 2, 4, 5])
    return source, jax.tree.map(np.asarray, sample(source, jax.random.key(0), **SHAPE))


def test_an_episode_has_its_ways_shots_and_queries(drawn):
    _, episodes = drawn
    support, query = episodes["support"], episodes["query"]
    assert support["x"].shape == (50, 6, 2) and query["x"].shape == (50, 9, 2)
    for part, rows in ((support, 2), (query, 3)):
        np.testing.assert_array_equal(part["label"], np.tile(np.repeat(np.arange(3), rows), (50, 1)))
    for task in range(50):
        classes = support["x"][task, ::2, 0]
        assert len(set(classes)) == 3 and set(classes) <= {1, 2, 4, 5}
        for part in (support, query):
            np.testing.assert_array_equal(part["x"][task, :, 0], classes[part["label"][task]])
        numbers = np.concatenate([support["x"][task, :, 1], query["x"][task, :, 1]])
        assert len(set(numbers)) == 15


def test_every_row_and_every_order_of_classes_comes(drawn):
    _, episodes = drawn
    numbers = {*episodes["support"]["x"][..., 1].ravel(), *episodes["query"]["x"][..., 1].ravel()}
    assert numbers == set(np.flatnonzero(np.isin(LABEL, [1, 2, 4, 5])))
    assert {1, 2, 4, 5} == set(episodes["support"]["x"][:, 0, 0])


def test_the_key_decides(drawn):
    source, episodes = drawn
    again, other = (sample(source, jax.random.key(seed), **SHAPE) for seed in (0, 1))
    jax.tree.map(np.testing.assert_array_equal, episodes, again)
    assert (episodes["support"]["x"] != other["support"]["x"]).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ways": 5}, "5 ways, but only 4 classes"),
        ({"shots": 3}, "3 shots and 3 queries a class, but the smallest class has 5 examples"),
        ({"queries": 0}, "must be at least 1"),
    ],
)
def test_episodes_that_cannot_be(drawn, options, message):
    with pytest.raises(DataError, match=message):
        sample(drawn[0], jax.random.key(0), **{**SHAPE, **options})


def test_splits_share_no_class():
    found = pools({"x": X}, LABEL, split_classes(range(6), {"train": 4, "test": 2}, seed=1))
    assert sorted(found["train"].classes + found["test"].classes) == list(range(6))
    with pytest.raises(DataError, match=r"'train' and 'test' share the classes \[2\]"):
        pools({"x": X}, LABEL, {"train": [0, 1, 2], "test": [2, 3]})
    with pytest.raises(DataError, match="cannot split 6 classes"):
        split_classes(range(6), {"train": 4, "test": 3}, seed=1)
    for classes, message in (
        ([0, 9], r"no example has label \[9\]"),
        ([1, 1], "different"),
        ([], "at least"),
    ):
        with pytest.raises(DataError, match=message):
            pool({"x": X}, LABEL, classes)
    with pytest.raises(DataError, match=r"array 'x' has shape \(3, 2\)"):
        pool({"x": X[:3]}, LABEL, [0])


def test_sinusoids():
    waves = sinusoids(jax.random.key(0), tasks=400, shots=10, queries=20)
    x, y = (jnp.concatenate([waves[part][name] for part in ("support", "query")], 1) for name in "xy")
    assert waves["support"]["x"].shape == (400, 10, 1) and x.shape == (400, 30, 1)
    # A sin(x - φ) = a sin x + b cos x: solve for A and φ, task by task.
    A = np.stack([np.sin(x[..., 0]), np.cos(x[..., 0])], -1)
    found = [np.linalg.lstsq(a, b[:, 0], rcond=None)[0] for a, b in zip(A, np.asarray(y), strict=True)]
    amplitude, phase = (
        np.hypot(*np.transpose(found)),
        np.arctan2(-np.array(found)[:, 1], np.array(found)[:, 0]),
    )
    np.testing.assert_allclose(y[..., 0], amplitude[:, None] * np.sin(x[..., 0] - phase[:, None]), atol=1e-4)
    assert -5 <= x.min() < -4.9 and 4.9 < x.max() <= 5
    assert 0.1 <= amplitude.min() < 0.3 and 4.8 < amplitude.max() <= 5 and abs(amplitude.mean() - 2.55) < 0.2
    assert (
        -1e-4 <= phase.min() < 0.1 and 3.0 < phase.max() <= np.pi + 1e-4 and abs(phase.mean() - 1.57) < 0.15
    )
