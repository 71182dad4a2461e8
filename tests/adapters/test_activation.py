"""Bottlenecks and LoReFT: identity at insertion, their equations, and what they cannot do."""

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

from jtl import adapters, distill, finetune, heads, pretrained, tree
from jtl import model as models
from jtl.adapters import SiteError
from jtl.tasks import Classify
from jtl.train import make_step

X = jax.random.normal(jax.random.key(2), (5, 6))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return {"features": nn.Dense(4, name="dense")(x)}


@pytest.fixture(scope="module")
def net():
    return models.linen(Net(), Net().init(jax.random.key(0), X))


def stirred(model, name):
    def noise(path, leaf):
        if f"{name}/" not in path:
            return leaf
        return leaf + 0.3 * jax.random.normal(tree.fold_path(jax.random.key(7), path), leaf.shape)

    return model.with_params(tree.map_with_path(noise, model.params))


@pytest.mark.parametrize("parallel", [False, True])
def test_bottleneck_is_its_equation(net, parallel):
    adapted = adapters.bottleneck(
        net, width=3, where="dense", parallel=parallel, scale=2.0, key=jax.random.key(1), batch=X
    )
    np.testing.assert_array_equal(adapted(X)["features"], net(X)["features"])
    adapted = stirred(adapted, "bottleneck")
    p = jax.tree.map(np.asarray, adapted.params["dense"])
    y = np.asarray(X) @ p["kernel"] + p["bias"]
    own = p["bottleneck"]
    hidden = np.maximum((np.asarray(X) if parallel else y) @ own["down"] + own["down_bias"], 0)
    expected = y + 2 * (hidden @ own["up"] + own["up_bias"])
    np.testing.assert_allclose(adapted(X)["features"], expected, atol=1e-5)


def test_loreft_is_its_equation(net):
    adapted = adapters.loreft(net, rank=2, where="dense", key=jax.random.key(1), batch=X)
    np.testing.assert_allclose(adapted(X)["features"], net(X)["features"], atol=1e-6)
    adapted = stirred(adapted, "loreft")
    p = jax.tree.map(np.asarray, adapted.params["dense"])
    y = np.asarray(X) @ p["kernel"] + p["bias"]
    own, r = p["loreft"], gram_schmidt(p["loreft"]["r"])
    expected = y + (y @ own["w"] + own["b"] - y @ r) @ r.T
    np.testing.assert_allclose(adapted(X)["features"], expected, atol=1e-5)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = x + Mlp(name="mlp")(x)
        return Gelu(name="gelu")(x), None


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(6, name="output")(nn.Dense(8, name="intermediate")(x))


class Gelu(nn.Module):
    """A module without parameters."""

    def __call__(self, x):
        return nn.gelu(x)


class Stack(nn.Module):
    stacked: bool = True

    @nn.compact
    def __call__(self, x):
        if not self.stacked:
            for i in range(3):
                x, _ = Layer(name=f"layer_{i}")(x)
            return {"features": x}
        stack = nn.scan(nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return {"features": stack(name="layers")(x, None)[0]}


@pytest.mark.parametrize("insert", [adapters.bottleneck, adapters.loreft])
@pytest.mark.parametrize("where", ["mlp", "mlp/output", "gelu"])
def test_a_stack_equals_its_layers_unrolled(insert, where, key):
    """At a module of modules, at a layer, and at a module without parameters."""
    stack = models.linen(Stack(), jax.jit(Stack().init)(key, X))
    adapted = insert(stack, where=f"layers/{where}", key=key, batch=X)
    np.testing.assert_allclose(adapted(X)["features"], stack(X)["features"], atol=1e-6)
    name = adapted.techniques[-1].name
    adapted = stirred(adapted, name)
    layers = {
        f"layer_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], adapted.params["layers"]) for i in range(3)
    }
    plain = {path: leaf for path, leaf in tree.flatten(layers).items() if f"/{name}/" not in path}
    unrolled = models.linen(Stack(stacked=False), {"params": tree.nest(plain)})
    unrolled = insert(unrolled, where=f"layer_./{where}", key=key, batch=X)
    assert tree.diff(unrolled.params, layers) == []
    unrolled = unrolled.with_params(layers)
    np.testing.assert_allclose(adapted(X)["features"], unrolled(X)["features"], atol=1e-5)
    # Each layer starts with leaves of its own.
    first = "down" if name == "bottleneck" else "r"
    leaf = tree.flatten(insert(stack, where=f"layers/{where}", key=key, batch=X).params)[
        f"layers/{where}/{name}/{first}"
    ]
    assert np.abs(leaf[0] - leaf[1]).max() > 1e-3


def gram_schmidt(matrix):
    columns = []
    for column in matrix.T:
        for other in columns:
            column = column - (column @ other) * other
        columns.append(column / np.linalg.norm(column))
    return np.stack(columns, 1)


@pytest.mark.parametrize("insert", [adapters.bottleneck, adapters.loreft])
def test_on_a_real_model(insert, key):
    two_layers = distill.choose_layers(pretrained.load("minilm"), (0, 5))  # six compile three times as long
    model = heads.classifier(two_layers, 2, key=key)
    adapted = insert(model, key=key)
    ids = np.arange(12, dtype=np.int32).reshape(2, 6) + 1000
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "label": np.array([0, 1], np.int32)}
    np.testing.assert_allclose(adapted(batch)["logits"], model(batch)["logits"], atol=1e-5)
    name = adapted.techniques[-1].name
    step = make_step(Classify(), optax.adam(1e-2), finetune.train_only(adapted, f".*/{name}/.*|head/.*"))
    state = step.init(adapted, key)
    state, metrics = step(state, batch)
    after = tree.flatten(state.model.params)
    for path, leaf in tree.flatten(model.params).items():
        if not path.startswith("head"):
            np.testing.assert_array_equal(after[path], leaf)
    assert np.isfinite(metrics["loss"])
    with pytest.raises(ValueError, match="the model has no adapter"):
        adapters.merge(adapted)


def test_bad_places(net):
    with pytest.raises(tree.RuleError, match="where='dens' meets no module; .*'dense'"):
        adapters.bottleneck(net, where="dens", key=jax.random.key(0), batch=X)
    with pytest.raises(SiteError, match="does not give one array"):
        adapters.loreft(net, where=".*", key=jax.random.key(0), batch=X)
