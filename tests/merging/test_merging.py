"""Every merge against its formula in NumPy, on small trees."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl import adapters, merging, tree
from jtl import model as models


def params(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    leaf = lambda *shape: jnp.asarray(scale * rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {"a": {"kernel": leaf(5, 4), "bias": leaf(4)}, "b": leaf(3)}


def vector(tree_):
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree_)])


START, ONE, TWO, THREE = (params(seed) for seed in range(4))


def test_uniform_soup():
    expected = np.mean([vector(own) for own in (ONE, TWO, THREE)], 0)
    np.testing.assert_allclose(vector(merging.uniform_soup([ONE, TWO, THREE])), expected, rtol=1e-5)


def test_greedy_soup_takes_what_helps():
    best = vector(ONE) + vector(TWO)  # the score peaks at the mean of one and two, so three has to stay out
    score = lambda t: -float(np.abs(vector(t) - best / 2).sum())  # noqa: E731
    soup, taken, value = merging.greedy_soup([THREE, ONE, TWO], score)
    assert sorted(taken) == [1, 2] and value == pytest.approx(0, abs=1e-4)
    np.testing.assert_allclose(vector(soup), best / 2, rtol=1e-5)


def test_task_arithmetic():
    merged = merging.task_arithmetic(START, [ONE, TWO], [0.5, -0.3])
    expected = vector(START) + 0.5 * (vector(ONE) - vector(START)) - 0.3 * (vector(TWO) - vector(START))
    np.testing.assert_allclose(vector(merged), expected, atol=1e-5)
    with pytest.raises(ValueError, match="2 models need as many weights, got 1"):
        merging.task_arithmetic(START, [ONE, TWO], [1.0])


@pytest.mark.parametrize("keep", [0.2, 0.6, 1.0])
def test_ties(keep):
    tasks = np.stack([vector(t) - vector(START) for t in (ONE, TWO, THREE)])
    for task in tasks:
        small = np.argsort(np.abs(task))[: task.size - max(1, round(keep * task.size))]
        task[small] = 0
    expected = np.zeros(tasks.shape[1])
    for i in range(tasks.shape[1]):
        sign = np.sign(tasks[:, i].sum())
        agree = [v for v in tasks[:, i] if v != 0 and np.sign(v) == sign]
        expected[i] = np.mean(agree) if agree else 0
    merged = merging.ties(START, [ONE, TWO, THREE], keep=keep, weight=0.7)
    np.testing.assert_allclose(vector(merged), vector(START) + 0.7 * expected, atol=1e-5)


def test_dare_drops_and_rescales():
    big, tuned = {"w": jnp.zeros((200, 200))}, {"w": jnp.ones((200, 200))}
    found = np.asarray(merging.dare(big, tuned, drop=0.9, key=jax.random.key(0))["w"])
    np.testing.assert_allclose(np.unique(found), [0, 10], rtol=1e-5)
    assert np.mean(found) == pytest.approx(1, abs=0.05)
    np.testing.assert_array_equal(merging.dare(big, tuned, drop=0.0, key=jax.random.key(0))["w"], tuned["w"])


def test_slerp_keeps_to_the_arc():
    one, two = {"w": jnp.array([2.0, 0.0])}, {"w": jnp.array([0.0, 2.0])}
    for t in (0.0, 0.25, 1.0):
        expected = 2 * np.array([np.cos(t * np.pi / 2), np.sin(t * np.pi / 2)])
        np.testing.assert_allclose(merging.slerp(one, two, t)["w"], expected, atol=1e-5)
    np.testing.assert_allclose(merging.slerp(one, {"w": 3 * one["w"]}, 0.5)["w"], [4.0, 0.0], atol=1e-5)
    np.testing.assert_allclose(merging.slerp(one, {"w": 0 * one["w"]}, 0.5)["w"], [1.0, 0.0], atol=1e-5)


def test_fisher_average():
    fishers = [jax.tree.map(jnp.square, params(seed)) for seed in (5, 6)]
    f = np.stack([vector(own) for own in fishers])
    merged = merging.fisher_average([ONE, TWO], fishers, [1.0, 2.0])
    weights = np.maximum(f, 1e-6) * np.array([[1.0], [2.0]])
    expected = (weights * np.stack([vector(ONE), vector(TWO)])).sum(0) / weights.sum(0)
    np.testing.assert_allclose(vector(merged), expected, rtol=1e-4, atol=1e-5)


def dense(seed):
    return models.linen(Net(), {"params": {"a": params(seed)["a"]}})


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="a")(x)


def test_regmean_solves_its_least_squares():
    one, two = dense(1), dense(2)
    x = [jax.random.normal(jax.random.key(i), (50, 5)) for i in (1, 2)]
    grams = [
        merging.input_grams(model, [own[:30], own[30:]]) for model, own in zip((one, two), x, strict=True)
    ]
    np.testing.assert_allclose(grams[0]["a/kernel"], x[0].T @ x[0], rtol=1e-4, atol=1e-4)
    merged = merging.regmean([one.params, two.params], grams, shrink=1.0)
    rows = np.concatenate([np.asarray(own) for own in x])
    wanted = np.concatenate(
        [np.asarray(own @ model.params["a"]["kernel"]) for model, own in zip((one, two), x, strict=True)]
    )
    expected = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    np.testing.assert_allclose(merged["a"]["kernel"], expected, atol=1e-4)
    np.testing.assert_allclose(
        merged["a"]["bias"], (one.params["a"]["bias"] + two.params["a"]["bias"]) / 2, atol=1e-6
    )
    # One model merged with itself is itself, whatever the shrinkage and however few the inputs.
    few = merging.input_grams(one, [x[0][:2]])
    again = merging.regmean([one.params, one.params], [few, few])
    np.testing.assert_allclose(again["a"]["kernel"], one.params["a"]["kernel"], atol=1e-3)


class Stack(nn.Module):
    kind: str

    @nn.compact
    def __call__(self, x):
        if self.kind == "twice":
            both = nn.Dense(5, name="a")
            return both(both(x))
        if self.kind == "scan":
            layers = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return layers(name="layers")(x, None)[0]
        return nn.remat(Layer)(name="layers")(x)[0]


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return nn.Dense(5, name="a")(x), None


def test_grams_of_layers_that_run_more_than_once(key):
    x = jax.random.normal(key, (6, 5))
    make = lambda kind: models.linen(Stack(kind), jax.jit(Stack(kind).init)(key, x))  # noqa: E731
    twice = make("twice")
    kernel, bias = (np.asarray(twice.params["a"][name]) for name in ("kernel", "bias"))
    inputs = np.concatenate([x, np.asarray(x) @ kernel + bias])
    found = merging.input_grams(twice, [x[:2], x[2:]])
    np.testing.assert_allclose(found["a/kernel"], inputs.T @ inputs, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"layers/a/kernel \(3, 5, 5\) is a stack of scanned layers"):
        merging.input_grams(make("scan"), [x])
    with pytest.raises(ValueError, match="runs inside a transformation"):
        merging.input_grams(make("remat"), [x])
    adapted = adapters.lora(twice, where="a", rank=2, key=key, batch=x)
    alone = models.linen(nn.Dense(5), nn.Dense(5).init(key, x))
    for model, path in (
        (adapted, "a/kernel"),
        (adapters.lora(alone, where="", key=key, batch=x, rank=2), "kernel"),
    ):
        with pytest.raises(ValueError, match=rf"{path} runs .* adapter: give jtl.adapters.merge\(model\)"):
            merging.input_grams(model, [x])
    plain = merging.input_grams(adapters.merge(adapted), [x])
    np.testing.assert_allclose(plain["a/kernel"], found["a/kernel"], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="there are no batches"):
        merging.input_grams(twice, [])


class Two(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(6, name="b")(nn.gelu(nn.Dense(8, name="a")(x)))


def test_adapters_merge_as_the_weights_that_they_make(key):
    """The mean of two LoRAs' weights is one LoRA of both ranks; the mean of their factors is something else."""
    x = jax.random.normal(key, (7, 6))
    start = models.linen(Two(), jax.jit(Two().init)(key, x))

    def lora(rank, seed):
        own = jax.random.key(seed)
        model = adapters.lora(start, rank=rank, where="a|b", key=own, batch=x)
        noise = lambda path, p: (  # noqa: E731
            p + 0.5 * jax.random.normal(tree.fold_path(own, path), p.shape) if "lora" in path else p
        )
        return model.with_params(tree.map_with_path(noise, model.params))

    one, two, three = lora(1, 1), lora(2, 2), lora(2, 3)
    soup = start.with_params(merging.uniform_soup([adapters.merge(model).params for model in (one, two)]))
    out = adapters.extract(start, soup, rank=3, where="a|b", batch=x)
    np.testing.assert_allclose(out(x)["features"], soup(x)["features"], atol=1e-4)
    assert np.abs(soup(x)["features"] - start(x)["features"]).max() > 0.1

    factors = two.with_params(merging.uniform_soup([two.params, three.params]))
    weights = merging.uniform_soup([adapters.merge(model).params for model in (two, three)])
    assert np.abs(factors(x)["features"] - start.with_params(weights)(x)["features"]).max() > 0.1
    with pytest.raises(
        ValueError, match=r"in 4: ~ a/lora/a: float32\[6,1\] -> float32\[6,2\]; ~ a/lora/b: .*; ~ b/lora/b"
    ):
        merging.uniform_soup([one.params, two.params])
    with pytest.raises(ValueError, match=r"\+ a/lora/a: float32\[6,2\]"):
        merging.uniform_soup([start.params, two.params])


def test_wise_ft_is_a_line_in_one_program():
    one, two = dense(1), dense(2)
    x = jax.random.normal(jax.random.key(1), (7, 5))
    weights = jnp.linspace(0, 1, 5)
    found = merging.wise_ft(one, two, weights, lambda model: model(x)["features"])
    for i, weight in enumerate(weights):
        between = one.with_params(tree.interpolate(one.params, two.params, weight))
        np.testing.assert_allclose(found[i], between(x)["features"], atol=1e-5)


def test_only_the_same_leaves_merge():
    other = {**ONE, "b": jnp.zeros(4)}
    with pytest.raises(
        ValueError, match=r"number 1 differs from number 0 in 1: ~ b: float32\[3\] -> float32\[4\]"
    ):
        merging.uniform_soup([ONE, other])
    with pytest.raises(ValueError, match="nothing to merge"):
        merging.uniform_soup([])
    with pytest.raises(ValueError, match="keep is a share"):
        merging.ties(START, [ONE], keep=0.0)
    with pytest.raises(ValueError, match="drop is a probability below 1"):
        merging.dare(START, ONE, drop=1.0, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"the models lack: \['c'\]"):
        merging.regmean([ONE, TWO], [{"c": jnp.eye(3)}] * 2)
