"""Transductive, by the support, running: three results, each against a plain batch normalisation in NumPy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jtl import heads, meta
from jtl.meta.normalise import run_episode
from jtl.meta.patch_convolution import PatchConv4
from jtl.model import linen
from jtl.models.conv4 import Conv4
from jtl.models.mlp import MLP
from jtl.tasks import Classify
from jtl.train import make_step


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, *, use_running_average: bool = True):
        return nn.BatchNorm(use_running_average=use_running_average, momentum=0.9, name="norm")(x)


@pytest.fixture(scope="module")
def model():
    net = linen(Net(), Net().init(jax.random.key(0), jnp.ones((1, 3))))
    stats = {"norm": {"mean": jnp.array([1.0, 0.0, -1.0]), "var": jnp.array([4.0, 1.0, 0.5])}}
    return net.replace(variables={**net.variables, "batch_stats": stats})


@pytest.fixture(scope="module")
def parts():
    keys = jax.random.split(jax.random.key(1))
    support = 2.0 + jax.random.normal(keys[0], (5, 3))
    query = -1.0 + 3.0 * jax.random.normal(keys[1], (7, 3))
    return {"x": support, "label": jnp.arange(5) % 2}, {"x": query, "label": jnp.arange(7) % 2}


def normalised(x, mean, var):
    return (np.asarray(x) - np.asarray(mean)) / np.sqrt(np.asarray(var) + 1e-5)


def test_whose_statistics(model, parts):
    support, query = parts
    own = [(np.mean(p["x"], 0), np.var(p["x"], 0)) for p in parts]
    running = tuple(np.asarray(model.variables["batch_stats"]["norm"][name]) for name in ("mean", "var"))
    statistics = {"transductive": own, "support": [own[0]] * 2, "running": [running] * 2}
    for normalise, (first, second) in statistics.items():
        known, asked, state = run_episode(model, support, query, normalise, None)
        np.testing.assert_allclose(known["features"], normalised(support["x"], *first), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(asked["features"], normalised(query["x"], *second), rtol=1e-4, atol=1e-4)
        assert bool(state) == (normalise != "running")
    _, _, state = run_episode(model, support, query, "support", None)
    mean = 0.9 * running[0] + 0.1 * own[0][0]
    np.testing.assert_allclose(state["batch_stats"]["norm"]["mean"], mean, rtol=1e-5)


def test_support_statistics_need_batch_normalisation(parts):
    net = linen(MLP((4,)), MLP((4,)).init(jax.random.key(0), jnp.ones((1, 3))))
    with pytest.raises(ValueError, match="nn.BatchNorm, and this one has none"):
        run_episode(net, *parts, "support", None)
    with pytest.raises(ValueError, match="give it stats='batch'"):
        meta.SupportStats(Classify())(net, parts[0], None)


def test_maml_in_each_mode(model, parts):
    classifier = heads.classifier(model, 2, key=jax.random.key(1), on="features", width=3)
    episodes = jax.tree.map(
        lambda x: jnp.stack([x, x[::-1]]), dict(zip(("support", "query"), parts, strict=True))
    )
    values = {}
    for name, loss in {
        "running": Classify(),
        "transductive": Classify(stats="batch"),
        "support": meta.SupportStats(Classify(stats="batch")),
    }.items():
        step = make_step(loss, optax.sgd(0.1), gradient=meta.maml(steps=1, rate=0.1))
        state, metrics = step(step.init(classifier, jax.random.key(0)), episodes)
        values[name] = float(metrics["loss"])
        before, after = (
            x["norm"]["mean"] for x in (model.variables["batch_stats"], state.collections["batch_stats"])
        )
        assert bool((before != after).any()) == (name != "running")
    assert len(set(values.values())) == 3


def test_by_the_support_a_query_row_does_not_depend_on_the_others(model, parts):
    classifier = heads.classifier(model, 2, key=jax.random.key(1), on="features", width=3)
    support, query = parts

    def mean_of_each(loss):
        row = lambda i: {name: x[i : i + 1] for name, x in query.items()}  # noqa: E731
        return np.mean([loss(classifier, {**row(i), "support": support}, None)[0] for i in range(7)])

    for loss, same in ((meta.SupportStats(Classify(stats="batch")), True), (Classify(stats="batch"), False)):
        whole, _ = loss(classifier, {**query, "support": support}, None)
        assert (abs(float(whole) - mean_of_each(loss)) < 1e-5) == same


@pytest.fixture(scope="module")
def conv():
    net = Conv4(width=4)
    return linen(net, jax.jit(net.init)(jax.random.key(0), jnp.ones((1, 16, 16, 1))))


def test_prototypes_on_conv4_thread_the_statistics(conv):
    image = jax.random.normal(jax.random.key(2), (2, 4, 16, 16, 1))
    part = {"image": image, "label": jnp.tile(jnp.arange(4)[None] % 2, (2, 1))}
    step = make_step(meta.Prototypes(ways=2, normalise="transductive"), optax.sgd(0.1))
    state, metrics = step(step.init(conv, jax.random.key(0)), {"support": part, "query": part})
    assert np.isfinite(metrics["loss"])
    assert (state.collections["batch_stats"]["norm_0"]["var"] != 1).all()


@pytest.mark.slow
@pytest.mark.parametrize("strided", [False, True])
def test_patches_are_the_same_convolution(conv, strided):
    image = jax.random.normal(jax.random.key(1), (3, 29, 28, 1))
    one, other = (
        kind(width=4, strided=strided).apply(conv.variables, image)["features"]
        for kind in (Conv4, PatchConv4)
    )
    assert one.shape == (3, 16 if strided else 4)
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_sizes_of_conv4(conv):
    found = jax.eval_shape(lambda image: conv(image), jnp.ones((2, 31, 45, 1)))
    assert {name: x.shape for name, x in found.items()} == {"map": (2, 1, 2, 4), "features": (2, 8)}
    with pytest.raises(ValueError, match="16 x 16 or more"):
        conv(jnp.ones((2, 15, 20, 1)))


@pytest.mark.parity
@pytest.mark.parametrize("strided", [False, True])
def test_conv4_is_torchs(conv, strided):
    torch = pytest.importorskip("torch")
    image = jax.random.normal(jax.random.key(3), (3, 34, 34, 1))
    x = torch.tensor(np.asarray(image)).permute(0, 3, 1, 2)
    for i in range(4):
        kernel = torch.tensor(np.asarray(conv.params[f"conv_{i}"]["kernel"])).permute(3, 2, 0, 1)
        # TensorFlow's padding of a stride of 2 is one row below an even height, one on either side of an odd one.
        low, high = (1, 1) if x.shape[-1] % 2 or not strided else (0, 1)
        x = torch.nn.functional.pad(x, (low, high, low, high))
        x = torch.nn.functional.conv2d(x, kernel, stride=2 if strided else 1)
        x = torch.relu(torch.nn.functional.batch_norm(x, None, None, training=True))
        x = x if strided else torch.nn.functional.max_pool2d(x, 2)
    net = Conv4(width=4, strided=strided)
    found, _ = net.apply(conv.variables, image, use_running_average=False, mutable=["batch_stats"])
    np.testing.assert_allclose(found["map"], x.permute(0, 2, 3, 1), atol=1e-4)
