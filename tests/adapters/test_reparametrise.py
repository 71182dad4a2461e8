"""Adapters outside Linen: identity at first, merged = adapted = NumPy, and only the adapter trains."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jtl import adapters, finetune, heads, tree, wrap
from jtl import model as models
from jtl.adapters import IA3, DoRA, LoHa, LoKr, LoRA, SiteError, VeRA
from jtl.loss import Loss
from jtl.train import make_step

X = jax.random.normal(jax.random.key(2), (5, 4))
KEY = jax.random.key(1)


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.first, self.second = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.second(self.dropout(nnx.relu(self.norm(self.first(x)))))


class EquinoxNet(eqx.Module):
    first: eqx.nn.Linear
    norm: eqx.nn.LayerNorm
    second: eqx.nn.Linear

    def __init__(self, key):
        one, two = jax.random.split(key)
        self.first, self.second = eqx.nn.Linear(4, 6, key=one), eqx.nn.Linear(6, 3, key=two)
        self.norm = eqx.nn.LayerNorm(6)

    def __call__(self, x, *, key=None):
        return self.second(jax.nn.relu(self.norm(self.first(x))))


def plain(params, x):
    assert set(params) == {"w1", "b1", "w2"}  # no leaf of an adapter
    return jax.nn.relu(x @ params["w1"] + params["b1"][None]) @ params["w2"]


@pytest.fixture(scope="module")
def bases():
    """Models of each kind, and the rule of their weights."""
    one, two = jax.random.split(KEY)
    params = {"w1": jax.random.normal(one, (4, 6)), "b1": jnp.ones(6), "w2": jax.random.normal(two, (6, 3))}
    return {
        "nnx": (wrap.from_nnx(NNXNet(nnx.Rngs(0))), ".*/kernel", None),
        "equinox": (wrap.from_equinox(EquinoxNet(KEY)), "(first|second)/weight", None),
        "function": (wrap.function(plain, params), "w[0-9]", 0),
    }


METHODS = {
    "lora": LoRA(rank=2, alpha=3.0),
    "rslora": LoRA(rank=2, alpha=3.0, stabilised=True),
    "pissa": LoRA(rank=2, alpha=3.0, start="pissa"),
    "dora": DoRA(rank=2, alpha=3.0),
    "vera": VeRA(rank=4),
    "loha": LoHa(rank=2, alpha=3.0),
    "lokr": LoKr(rank=2, alpha=3.0),
    "ia3": IA3(feedforward="second/.*|w2"),
}


def put(base, method):
    model, where, inputs = base
    return adapters.reparametrise(model, method, where=where, key=KEY, inputs=inputs)


def stirred(model, seed=0):
    draw = np.random.default_rng(seed)

    def noise(path, leaf):
        new = leaf + jnp.asarray(0.3 * draw.normal(size=leaf.shape), leaf.dtype)
        return new if path.startswith("lora/") else leaf

    return model.with_params(tree.map_with_path(noise, model.params))


@jax.jit
def features(model, x):
    return model(x)["features"]


@pytest.mark.parametrize("kind", ["nnx", "equinox", "function"])
@pytest.mark.parametrize("method", METHODS)
def test_identity_at_first_and_merged_equals_adapted(bases, kind, method):
    model = bases[kind][0]
    fresh = put(bases[kind], METHODS[method])
    np.testing.assert_allclose(features(fresh, X), features(model, X), atol=1e-5)
    adapted = stirred(fresh)
    found = features(adapted, X)
    assert np.abs(found - features(model, X)).max() > 1e-2
    merged = adapters.merge(adapted)
    assert merged.techniques == () and tree.diff(merged.variables, model.variables) == []
    np.testing.assert_allclose(features(merged, X), found, atol=1e-5)


def relu_net(x, w1, b1, w2, b2, norm):
    return np.maximum(norm(x @ w1 + b1), 0) @ w2 + b2


def normalised(h):
    return (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5)


def numpy_features(kind, p, weight):
    """The networks above with ``weight(path, W)`` in place of each W (in, out)."""
    x = np.asarray(X)
    if kind == "function":
        return relu_net(x, weight("w1", p["w1"]), p["b1"], weight("w2", p["w2"]), 0, lambda h: h)
    if kind == "nnx":
        w1, w2 = (weight(f"{name}/kernel", p[name]["kernel"]) for name in ("first", "second"))
        norm = lambda h: h / np.sqrt(1 + 1e-5)  # noqa: E731  running statistics 0 and 1
    else:
        w1, w2 = (weight(f"{name}/weight", p[name]["weight"].T) for name in ("first", "second"))
        norm = normalised
    return relu_net(x, w1, p["first"]["bias"], w2, p["second"]["bias"], norm)


@pytest.mark.parametrize("kind", ["nnx", "equinox", "function"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_it_is_its_equation(bases, kind, method):
    """W + (alpha / r) A·B with A (in, r), and its columns, one for each output, at DoRA's magnitudes."""
    adapted = stirred(put(bases[kind], METHODS[method]))
    p = jax.tree.map(np.asarray, adapted.params)

    def weight(path, w):
        own = tree.flatten(p["lora"])
        whole = w + 1.5 * own[f"{path}/a"] @ own[f"{path}/b"]
        if method == "dora":
            whole = whole / np.linalg.norm(whole, axis=0) * own[f"{path}/magnitude"]
        return whole

    np.testing.assert_allclose(features(adapted, X), numpy_features(kind, p, weight), atol=1e-5)


def test_ia3_scales_outputs_with_their_bias_and_inputs_without(bases):
    adapted = stirred(put(bases["equinox"], METHODS["ia3"]))
    p = jax.tree.map(np.asarray, adapted.params)
    first, second = (p["lora"][name]["weight"]["scale"] for name in ("first", "second"))
    h = normalised(first * (np.asarray(X) @ p["first"]["weight"].T + p["first"]["bias"]))
    expected = (second * np.maximum(h, 0)) @ p["second"]["weight"].T + p["second"]["bias"]
    np.testing.assert_allclose(features(adapted, X), expected, atol=1e-5)


def test_inputs_say_which_axis(bases):
    """A square weight (out, in) of a plain function: the same leaves, another product."""
    w = jax.random.normal(KEY, (4, 4))
    model = wrap.function(lambda params, x: x @ params["w"].T, {"w": w})
    adapted = stirred(adapters.reparametrise(model, METHODS["dora"], where="w", key=KEY, inputs=1))
    own = jax.tree.map(np.asarray, adapted.params["lora"]["w"])
    whole = np.asarray(w).T + 1.5 * own["a"] @ own["b"]
    expected = np.asarray(X) @ (whole / np.linalg.norm(whole, axis=0) * own["magnitude"])
    np.testing.assert_allclose(features(adapted, X), expected, atol=1e-5)


class Square(Loss):
    def value(self, model, outputs, batch, key):
        return ((outputs["logits"] - 1) ** 2).mean(), {}


@pytest.mark.parametrize("kind", ["nnx", "equinox"])
def test_adapter_and_head_train_and_the_rest_stays_bit_equal(bases, kind):
    base = heads.classifier(bases[kind][0], 2, key=KEY, on="features", width=3)
    # The head's own kernel is none of the base's, whose layout it may not share.
    model = adapters.reparametrise(
        base, METHODS["lora"], where=".*/(kernel|weight)" if kind == "nnx" else bases[kind][1], key=KEY
    )
    assert {path for path in tree.flatten(model.params) if path.startswith("lora")} == {
        f"lora/{layer}/{'kernel' if kind == 'nnx' else 'weight'}/{leaf}"
        for layer in ("first", "second")
        for leaf in "ab"
    }
    step = make_step(Square(), optax.adam(1e-2), finetune.train_only(model, "lora/.*|head/.*"))
    state = step.init(model, KEY)
    for _ in range(3):
        state, metrics = step(state, {"x": X})
    after = tree.flatten(state.model.params)
    for path, leaf in tree.flatten(model.params).items():
        same = (np.asarray(after[path]) == np.asarray(leaf)).all()
        assert same != path.startswith(("lora", "head")), path
    assert np.isfinite(metrics["loss"])


def test_on_a_linen_layer_that_cannot_be_met_otherwise(bases):
    class Mix(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x @ self.param("mix", nn.initializers.lecun_normal(), (4, 3))

    model = models.linen(Mix(), Mix().init(KEY, X))
    with pytest.raises(SiteError, match="cannot be adapted"):
        adapters.lora(model, rank=1, where="", key=KEY, batch=X)
    adapted = stirred(adapters.reparametrise(model, LoRA(rank=1, alpha=1.0), where="mix", key=KEY))
    own = adapted.params["lora"]["mix"]
    expected = np.asarray(X) @ np.asarray(model.params["mix"] + own["a"] @ own["b"])
    np.testing.assert_allclose(features(adapted, X), expected, atol=1e-5)


def test_it_can_be_served(bases):
    models = [stirred(put(bases["nnx"], METHODS["lora"]), seed) for seed in range(2)]
    which = np.array([0, 1, 1, 0, 1], np.int32)
    found = features(adapters.serve(models, own="lora/.*"), {"x": X, "adapter": which})
    alone = [features(model, X) for model in models]
    np.testing.assert_allclose(found, np.where(which[:, None] == 0, *alone), atol=1e-5)


def test_ranks_by_parameter_path(bases):
    model, where, _ = bases["nnx"]
    method = LoRA(rank=(("first/kernel", 1), (".*", 3)), alpha=1.0)
    adapted = adapters.reparametrise(model, method, where=where, key=KEY)
    shapes = {path: leaf.shape for path, leaf in tree.flatten(adapted.params["lora"]).items()}
    assert shapes == {
        "first/kernel/a": (4, 1), "first/kernel/b": (1, 6), "second/kernel/a": (6, 3), "second/kernel/b": (3, 3),
    }  # fmt: skip


def test_bad_input(bases):
    model, where, _ = bases["equinox"]
    method = METHODS["lora"]

    def reparametrise(model, method=method, where=where, **options):
        return adapters.reparametrise(model, method, where=where, key=KEY, **options)

    with pytest.raises(tree.RuleError, match="rule 'third/weight' meets no leaf"):
        reparametrise(model, where="third/weight")
    with pytest.raises(SiteError, match=r"no matrices: norm/weight \(6,\); choose those with two axes"):
        reparametrise(model, where=".*/weight")
    with pytest.raises(SiteError, match="rank 5 at first/weight: its weight is 4 x 6, .* between 1 and 4"):
        reparametrise(model, LoRA(rank=5), "first/weight")
    with pytest.raises(ValueError, match="not known for Function: pass inputs=0 for weights"):
        reparametrise(bases["function"][0], where="w1")
    with pytest.raises(ValueError, match="LoRA has dropout 0.1 of the layer's input"):
        reparametrise(model, LoRA(rank=1, dropout=0.1))
    adapted = reparametrise(model)
    with pytest.raises(ValueError, match="first/weight has the adapter 'lora' already: merge it first"):
        reparametrise(adapted, name="other")
    listed = wrap.function(lambda params, x: x @ params["w"][0], {"w": [jnp.ones((4, 3))]})
    with pytest.raises(ValueError, match="must be nested dicts with names as keys"):
        reparametrise(listed, where="w/0", inputs=0)


def test_ia3_needs_to_know_whose_a_bias_is(bases):
    cell = {"w": jnp.ones((4, 4)), "u": jnp.ones((4, 4)), "bias": jnp.ones(4)}
    model = wrap.function(lambda params, x: x @ params["w"] + x @ params["u"] + params["bias"][None], cell)
    with pytest.raises(SiteError, match=r"the bias of w, but bias \(4,\) is that of u: adapt one of them"):
        adapters.reparametrise(model, IA3(), where="w|u", key=KEY, inputs=0)
    wide = model.with_params({"w": jnp.ones((4, 3)), "bias": jnp.ones(4)})
    with pytest.raises(SiteError, match=r"the bias of w, but bias \(4,\) is not its 3 outputs"):
        adapters.reparametrise(wide, IA3(), where="w", key=KEY, inputs=0)
    # LoRA leaves biases alone.
    adapters.reparametrise(model, LoRA(rank=1), where="w|u", key=KEY, inputs=0)
