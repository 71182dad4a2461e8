"""Bottlenecks and LoReFT: identity at insertion, their equations, and what they cannot do."""

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

from jtl import adapters, finetune, heads, pretrained, tree
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


def gram_schmidt(matrix):
    columns = []
    for column in matrix.T:
        for other in columns:
            column = column - (column @ other) * other
        columns.append(column / np.linalg.norm(column))
    return np.stack(columns, 1)


@pytest.mark.parametrize("insert", [adapters.bottleneck, adapters.loreft])
def test_on_a_real_model(insert, key):
    model = heads.classifier(pretrained.load("minilm"), 2, key=key)
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
