import dataclasses

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.errors import ModifyScopeVariableError

from jtl import adapters, distill, domain, ema, heads, tasks, wrap
from jtl import model as models


class Net(nn.Module):
    """Two layers, batch norm and dropout: every mode a forward can have."""

    @nn.compact
    def __call__(self, x, scale=None, *, train: bool = False, use_running_average: bool = True):
        x = nn.Dense(4, name="first")(x)
        x = nn.BatchNorm(use_running_average=use_running_average, name="norm")(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        x = x if scale is None else x * scale
        return {"features": nn.Dense(3, name="second")(x)}


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(1), (5, 2))


@pytest.fixture
def net(x):
    return models.linen(Net(), Net().init(jax.random.key(0), x))


def test_fields_reach_arguments_by_name(net, x):
    plain = net({"x": x, "label": jnp.zeros(5)})["features"]
    np.testing.assert_array_equal(plain, net(x)["features"])
    halved = net({"x": x, "scale": jnp.zeros((5, 4))})["features"]
    np.testing.assert_array_equal(halved, jnp.broadcast_to(net.params["second"]["bias"], (5, 3)))
    with pytest.raises(KeyError, match=r"Net needs the batch fields \['x'\]; the batch has \['image'\]"):
        net({"image": x})


def test_modes_are_explicit(net, x, key):
    assert (net(x)["features"] == net(x)["features"]).all()
    assert (net(x, train=True, key=key)["features"] != net(x)["features"]).any()
    outputs, state = net.run(x, models.Mode(stats="batch"))
    first = x @ net.params["first"]["kernel"] + net.params["first"]["bias"][None]
    normed = (first - first.mean(0)[None]) / jnp.sqrt(first.var(0)[None] + 1e-5)
    second = net.params["second"]
    np.testing.assert_allclose(
        outputs["features"], normed @ second["kernel"] + second["bias"][None], atol=1e-4
    )
    np.testing.assert_allclose(state["batch_stats"]["norm"]["mean"], 0.01 * first.mean(0), atol=1e-6)
    assert net.run(x, models.Mode())[1] == {}


class Tied(nn.Module):
    """Batch norm that follows ``train``, as in many a tutorial."""

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        return {"features": nn.BatchNorm(use_running_average=not train)(x)}


def test_a_module_that_normalises_otherwise_than_asked_raises(x):
    model = models.linen(Tied(), Tied().init(jax.random.key(0), x))
    assert model.run(x, models.Mode(train=True, stats="batch"))[1].keys() == {"batch_stats"}
    with pytest.raises(ValueError, match="Tied used its running statistics"):
        model(x, stats="batch")
    with pytest.raises(ModifyScopeVariableError) as raised:
        model(x, train=True)
    assert any("stats='running' was asked for" in note for note in raised.value.__notes__)


def test_taps_name_any_module(net, x):
    taps = net(x, taps=("first",))["taps"]
    np.testing.assert_array_equal(
        taps["first"], x @ net.params["first"]["kernel"] + net.params["first"]["bias"][None]
    )
    with pytest.raises(KeyError, match="no module at tap 'frist'; near misses: .*'first'"):
        net(x, taps=("frist",))


def test_equal_models_share_one_compilation(net, x):
    traces = []

    @jax.jit
    def forward(model, x):
        traces.append(1)
        return model(x)["logits"]

    def make(seed):
        fresh = models.linen(Net(), Net().init(jax.random.key(seed), x))
        return heads.classifier(fresh, 2, key=jax.random.key(seed), on="features", width=3)

    assert (forward(make(0), x) != forward(make(1), x)).any()
    assert len(traces) == 1
    assert hash(make(0).techniques) == hash(make(1).techniques)


def test_a_head_reads_writes_and_is_replaced(net, x, key):
    model = heads.classifier(net, 2, key=key, on="features", width=3)
    head = model.params["head"]["out"]
    outputs = model(x, taps=("head/out", "first"))
    np.testing.assert_allclose(
        outputs["logits"], outputs["features"] @ head["kernel"] + head["bias"][None], atol=1e-6
    )
    np.testing.assert_array_equal(outputs["taps"]["head/out"], outputs["logits"])
    np.testing.assert_array_equal(outputs["features"], net(x)["features"])
    other = heads.classifier(model, 7, key=key, on="features", width=3)
    assert other(x)["logits"].shape == (5, 7) and len(other.techniques) == 1
    assert set(models.modules(model, {"x": x})) >= {"", "first", "second", "head", "head/out"}


def test_head_errors(net, x, key):
    with pytest.raises(ValueError, match="no standard head"):
        heads.classifier(net, 2, key=key)
    with pytest.raises(ValueError, match="classes must be at least 1, got 0"):
        heads.classifier(net, 0, key=key)
    with pytest.raises(KeyError, match=r"reads output 'pooled'; the model gives \['features'\]"):
        heads.classifier(net, 2, key=key, on="pooled", width=3)(x)


def test_cast_computes_low_and_returns_float32(net, x):
    low = models.cast(net, jnp.bfloat16)
    assert low.params["first"]["kernel"].dtype == jnp.float32
    out = low(x)["features"]
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, net(x)["features"], atol=0.05)
    assert (out != net(x)["features"]).any()


def test_a_plain_function(x, key):
    model = wrap.function(lambda params, x: jnp.tanh(x @ params["w"]), {"w": jnp.ones((2, 3))})
    np.testing.assert_allclose(model({"x": x})["features"], jnp.tanh(x @ jnp.ones((2, 3))), rtol=1e-6)
    assert heads.classifier(model, 4, key=key, on="features", width=3)({"x": x})["logits"].shape == (5, 4)


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(2, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)])
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.layers[1](self.dropout(self.norm(self.layers[0](x))))


def test_an_nnx_module(x, key):
    module = NNXNet(nnx.Rngs(0))
    model = wrap.from_nnx(module)
    assert {"layers/0/kernel", "norm/scale"} <= set(wrap.tree.flatten(model.params))
    module.eval()
    np.testing.assert_allclose(model(x)["features"], module(x), rtol=1e-6)
    assert (model(x, train=True, key=key)["features"] != model(x)["features"]).any()
    _, state = model.run(x, models.Mode(stats="batch"))
    assert jax.tree.structure(state["state"]) == jax.tree.structure(model.variables["state"])
    assert (state["state"]["norm"]["mean"] != 0).all()
    assert model.base == wrap.from_nnx(NNXNet(nnx.Rngs(1))).base
    with pytest.raises(ValueError, match="Linen"):
        model(x, taps=("layers/0",))


def test_an_equinox_module(x, key):
    module = eqx.nn.Sequential([eqx.nn.MLP(2, 4, 8, 1, key=key), eqx.nn.Dropout(0.5)])
    model = wrap.from_equinox(module)
    expected = jax.vmap(eqx.nn.inference_mode(module))(x)
    np.testing.assert_allclose(model(x)["features"], expected, rtol=1e-6)
    assert (model(x, train=True, key=key)["features"] != expected).any()
    grads = jax.grad(lambda p: model.with_params(p)(x)["features"].sum())(model.params)
    assert jax.tree.structure(grads) == jax.tree.structure(model.params)
    again = wrap.from_equinox(
        eqx.nn.Sequential([eqx.nn.MLP(2, 4, 8, 1, key=jax.random.key(5)), eqx.nn.Dropout(0.5)])
    )
    assert again.base == model.base


class Chooses(eqx.Module):
    layer: eqx.nn.Linear
    index: jax.Array

    def __call__(self, image):
        return self.layer(image[self.index])


def test_an_equinox_module_with_an_integer_array(x, key):
    module = Chooses(eqx.nn.Linear(2, 3, key=key), jnp.array([1, 0]))
    model = wrap.from_equinox(module)
    np.testing.assert_allclose(model(x)["features"], jax.vmap(module)(x), rtol=1e-6)
    assert set(wrap.tree.flatten(model.variables)) == {
        "params/layer/weight", "params/layer/bias", "constants/index",
    }  # fmt: skip
    other = wrap.from_equinox(Chooses(module.layer, jnp.array([0, 1])))
    assert other.base == model.base and hash(other.base) == hash(model.base)


def test_models_are_immutable(net):
    with pytest.raises(dataclasses.FrozenInstanceError):
        net.variables = {}


def test_what_was_added_is_taken_off_again_by_its_name():
    """Every technique with a name: the model without it is the model before, leaf by leaf."""
    net = models.linen(nn.Dense(4, name="dense"), nn.Dense(4).init(jax.random.key(0), jnp.ones((1, 3))))
    x, key = {"inputs": jnp.ones((2, 3))}, jax.random.key(1)
    added = {
        "head": lambda m: heads.attach(m, nn.Dense(2), on="features", width=4, key=key),
        "ema": ema.with_average,
        "teacher": ema.with_teacher,
        "cast": lambda m: models.cast(m, jnp.bfloat16),
        "mixup": lambda m: domain.with_mixup(m, field="inputs"),
        "noised": tasks.flow_matching.noised,
        "hint": lambda m: distill.regressor(m, nn.Dense(5), on="features", batch=x, key=key),
        "lora": lambda m: adapters.lora(m, rank=1, where=".*", key=key, batch=x),
    }
    for name, add in added.items():
        changed = add(net)
        assert changed != net, name
        bare = models.remove(changed, name)
        assert (bare.base, bare.techniques) == (net.base, net.techniques), name
        chex.assert_trees_all_equal(bare.variables, net.variables)
    both = added["lora"](added["head"](net))
    assert [t.name for t in models.remove(both, "lora").techniques] == ["head"]
    with pytest.raises(KeyError, match=r"no technique called 'lore'; it has \['head', 'lora'\]"):
        models.remove(both, "lore")
    with pytest.raises(ValueError, match="'lora' changed the weights"):
        models.remove(adapters.lora(net, rank=1, where=".*", key=key, batch=x, start="pissa"), "lora")
