"""Adapters in bfloat16: merged = adapted within the bound that ``merge`` states, and starts that need float32."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl import adapters, tree
from jtl import model as models
from jtl.adapters.insert import place

METHODS = {
    "lora": {"rank": 4},
    "dora": {"rank": 4},
    "loha": {"rank": 4},
    "lokr": {"rank": 4},
    "ia3": {"feedforward": "inputs"},
    "vera": {"rank": 32},
    "adalora": {"rank": 4},
}
X = jax.random.normal(jax.random.key(2), (64, 5, 24))
LAYERS = {
    "dense": (partial(nn.Dense, 16), X),
    "inputs": (partial(nn.Dense, 16), X),  # IA3 scales these
    "conv": (partial(nn.Conv, 16, (3,)), X),
    "embed": (partial(nn.Embed, 24, 16), jnp.arange(24).reshape(6, 4)),
}


class Net(nn.Module):
    kind: str

    @nn.compact
    def __call__(self, x):
        return LAYERS[self.kind][0](name=self.kind)(x)


def adapted(kind, method):
    """One layer with an adapter whose leaves are no longer those of its start."""
    x = LAYERS[kind][1]
    plain = models.linen(Net(kind), jax.jit(Net(kind).init)(jax.random.key(0), x))
    model = getattr(adapters, method)(plain, where=kind, key=jax.random.key(1), batch=x, **METHODS[method])

    def noise(path, leaf):
        own = tree.fold_path(jax.random.key(7), path)
        return leaf + 0.3 * jax.random.normal(own, leaf.shape) if f"/{method}/" in path else leaf

    return model.with_params(tree.map_with_path(noise, model.params)), x


def low(model, params=None):
    """The model computing in bfloat16."""
    return models.cast(model if params is None else model.with_params(params), jnp.bfloat16)


def largest(model, x):
    """What the layer gives if every term in it is replaced by its absolute value."""
    (adapter,), absolute = model.techniques, lambda leaf: jax.tree.map(jnp.abs, leaf)
    (site,), method = adapter.sites, adapter.method
    leaves = {
        path.split("/")[-1]: leaf for path, leaf in tree.flatten(model.params).items() if adapter.name in path
    }
    leaves |= model.variables.get(adapter.name, {})
    weight = site.matrix(tree.flatten(model.params)[place(site)])
    if isinstance(method, adapters.DoRA):
        a, b = absolute(method.factors(site, leaves))
        terms = (abs(weight) + a @ b) * abs(method.columns(site, weight, leaves))[None]
    else:
        terms = method.weight(site, abs(weight), absolute(leaves))
    plain = {path: leaf for path, leaf in tree.flatten(model.params).items() if adapter.name not in path}
    params = absolute({**plain, place(site): terms.reshape(plain[place(site)].shape)})
    if adapter.bias(site) in params:
        params[adapter.bias(site)] = method.bias(site, params[adapter.bias(site)], absolute(leaves))
    bare = models.linen(model.base.module, {"params": tree.nest(params)})
    return np.asarray(bare(abs(x))["features"])


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stored", [jnp.float32, jnp.bfloat16])
def test_merged_equals_adapted_within_the_stated_bound(kind, method, stored):
    model, x = adapted(kind, method)
    model = model.with_params(jax.tree.map(lambda leaf: leaf.astype(stored), model.params))
    merged = adapters.merge(model)
    assert all(leaf.dtype == stored for leaf in jax.tree.leaves(merged.params))
    gap = np.abs(np.asarray(low(merged)(x)["features"]) - np.asarray(low(model)(x)["features"]))
    bound = largest(model.with_params(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model.params)), x)
    assert (gap <= 2**-6 * bound + 1e-6).all()


def stored_low(kind):
    """A plain layer whose parameters are bfloat16 themselves."""
    x = LAYERS[kind][1]
    plain = models.linen(Net(kind), jax.jit(Net(kind).init)(jax.random.key(0), x))
    return plain.with_params(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), plain.params)), x


@pytest.mark.parametrize("start", ["kaiming", "pissa", "olora"])
def test_starts_of_lora(start):
    """Decompositions are taken in float32, and the leaves keep the weight's dtype."""
    plain, x = stored_low("dense")
    model = adapters.lora(plain, rank=4, where="dense", start=start, key=jax.random.key(1), batch=x)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(low(model)(x)["features"], low(plain)(x)["features"], atol=0.1)


def test_doras_norm_is_taken_in_float32():
    """A sum of many squares in bfloat16 would stop growing."""
    plain, x = stored_low("dense")
    model = adapters.dora(plain, rank=4, where="dense", key=jax.random.key(1), batch=x)
    (site,), method = model.techniques[0].sites, model.techniques[0].method
    own = {**model.params["dense"]["dora"], "b": jnp.full((4, 16), 0.1, jnp.bfloat16)}
    found = method.columns(site, plain.params["dense"]["kernel"], own)
    exact = {name: np.asarray(leaf, np.float64) for name, leaf in own.items()}
    whole = np.asarray(plain.params["dense"]["kernel"], np.float64) + 2 * exact["a"] @ exact["b"]
    np.testing.assert_allclose(found, exact["magnitude"] / np.linalg.norm(whole, axis=0), rtol=1e-5)


@pytest.mark.parametrize("insert", [adapters.bottleneck, adapters.loreft])
def test_adapters_of_activations(insert):
    plain, x = stored_low("dense")
    model = insert(plain, where="dense", key=jax.random.key(1), batch=x)
    np.testing.assert_allclose(low(model)(x)["features"], low(plain)(x)["features"], atol=0.1)
    loss = lambda params: (low(model, params)(x)["features"] ** 2).sum()  # noqa: E731
    assert all(
        np.isfinite(np.asarray(leaf, np.float32)).all()
        for leaf in jax.tree.leaves(jax.grad(loss)(model.params))
    )


def test_extract():
    plain, x = stored_low("dense")
    tuned = plain.with_params(jax.tree.map(lambda leaf: 2 * leaf, plain.params))
    model = adapters.extract(plain, tuned, rank=16, where="dense", batch=x)
    np.testing.assert_allclose(low(model)(x)["features"], low(tuned)(x)["features"], atol=0.1)
