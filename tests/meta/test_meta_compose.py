"""The gradient slot beside the others: context, adapters, labels, meshes; one compilation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jtl import adapters, finetune, heads, meta, sharding, tree
from jtl.loss import Aux
from jtl.model import Mode, Model, linen
from jtl.models import ARCHITECTURES
from jtl.models.mlp import MLP
from jtl.tasks import Classify
from jtl.train import make_step
from jtl.wrap import function

KEY = jax.random.key(0)


def squared(model, batch, key):
    return jnp.mean((model({"x": batch["x"]})["prediction"] - batch["y"]) ** 2), Aux({}, {})


@pytest.fixture(scope="module")
def lines():
    """Tasks y = x + shift: what differs is what a context can say."""
    x = jax.random.normal(jax.random.key(1), (8, 6, 1))
    y = x + jnp.linspace(-1.0, 1.0, 8)[:, None, None]
    return {"support": {"x": x[:, :3], "y": y[:, :3]}, "query": {"x": x[:, 3:], "y": y[:, 3:]}}


def test_cavia_adapts_a_context_from_zero(lines):
    base = function(lambda params, x: {"prediction": x @ params["w"]}, {"w": jnp.array([[0.5], [2.0]])})
    model = meta.context(base, 1)
    # ŷ = w₀ x + w₁ c; c after one step from 0 is −α · 2 w₁ · mean(w₀ x − y).
    (x, y), (u, v) = (
        [np.asarray(lines[part][name])[..., 0] for name in "xy"] for part in ("support", "query")
    )
    c = -0.05 * 2 * 2.0 * np.mean(0.5 * x - y, 1)
    expected = np.mean((0.5 * u + 2.0 * c[:, None] - v) ** 2)

    step = make_step(squared, optax.adam(0.1), gradient=meta.cavia(steps=1, rate=0.05))
    state = step.init(model, KEY)
    state, metrics = step(state, lines)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    for _ in range(60):
        state, metrics = step(state, lines)
    assert float(metrics["loss"]) < 0.05 * expected
    assert float(state.model.params["context"][0]) == 0
    labels = finetune.train_only(state.model, "context")
    evaluate = meta.make_evaluate(squared, steps=1, rate=0.05, labels=labels)
    after = evaluate(state.model, lines, KEY)["loss"][:, 1].mean()
    _, metrics = step(state, lines)
    np.testing.assert_allclose(after, metrics["loss"], rtol=1e-5)

    with pytest.raises(ValueError, match="add it by jtl.meta.context"):
        step = make_step(squared, optax.sgd(0.1), gradient=meta.cavia(steps=1, rate=0.05))
        step(step.init(base, KEY), lines)
    with pytest.raises(KeyError, match=r"batch\['x'\]"):
        model({"z": jnp.ones((1, 1))})


def test_layers_that_do_not_adapt_precondition_those_that_do(lines):
    """T-Net ŷ = x w t: the inner step moves w alone, so the product by α t² and the loss as NumPy has it."""
    base = function(lambda params, x: {"prediction": params["warp_t"] * params["w"] * x},
                    {"w": jnp.array(0.5), "warp_t": jnp.array(3.0)})  # fmt: skip
    (x, y), (u, v) = (
        [np.asarray(lines[part][name], np.float64)[..., 0] for name in "xy"] for part in ("support", "query")
    )

    def loss(w, t):
        product = w * t - 0.05 * t**2 * 2 * np.mean(x * (w * t * x - y), 1)
        return np.mean((product[:, None] * u - v) ** 2)

    gradient = meta.maml(steps=1, rate=0.05, labels=finetune.freeze(base, "warp_.*"))
    on = lambda params, batch, key: squared(base.with_params(params), batch, key)  # noqa: E731
    (value, _), found = gradient(on, base.params, lines, KEY)
    np.testing.assert_allclose(value, loss(0.5, 3.0), rtol=1e-5)
    h = 1e-6
    slopes = {
        "w": (loss(0.5 + h, 3.0) - loss(0.5 - h, 3.0)) / (2 * h),
        "warp_t": (loss(0.5, 3.0 + h) - loss(0.5, 3.0 - h)) / (2 * h),
    }
    for name, slope in slopes.items():
        np.testing.assert_allclose(found[name], slope, rtol=1e-4)


@pytest.fixture(scope="module")
def net():
    module = MLP(hidden=(8,), outputs=1)
    return linen(module, module.init(KEY, jnp.ones((1, 1))))


def test_one_compilation_and_eight_devices_compute_what_one_does(net, lines):
    devices = sharding.make_mesh()
    assert devices.size == 8
    model = meta.learn(net, meta.MetaSGD(0.1))
    found, traces = [], []

    def traced(model, batch, key):
        traces.append(batch["x"].shape)
        return squared(model, batch, key)

    written_out = meta.maml(steps=2, rate=meta.MetaSGD(0.1), chunk=1, unroll=2)
    alone = meta.maml(steps=2, rate=meta.MetaSGD(0.1))
    for gradient, options in (
        (alone, {}),
        (alone, {"mesh": devices}),
        (meta.sharded(written_out, devices), {"mesh": devices, "sharding": sharding.FULLY_SHARDED}),
    ):
        step = make_step(traced, optax.adam(0.01), gradient=gradient, **options)
        state = step.init(model, KEY)
        for scale in (1.0, 2.0, 3.0):
            batch = sharding.global_batch(jax.tree.map(lambda x, s=scale: s * x, lines), options.get("mesh"))
            state, metrics = step(state, batch)
            before = len(traces) if scale == 1.0 else before
        assert len(traces) == before
        found.append((state.model.params, metrics["loss"]))
    for params, loss in found[1:]:
        for path, leaf in tree.flatten(found[0][0]).items():
            np.testing.assert_allclose(tree.flatten(params)[path], leaf, atol=1e-5, err_msg=path)
        np.testing.assert_allclose(loss, found[0][1], rtol=1e-5)
    assert (found[0][0]["inner"]["out"]["kernel"]["rate"] != 0.1).all()


def test_sharded_tasks_with_frozen_leaves_and_a_state(lines):
    """Frozen leaves reach the devices beside the trained ones; running statistics come back as their mean."""

    def forward(variables, batch, mode, key):
        seen = {"batch_stats": {"mean": batch["x"].mean(), "count": variables["batch_stats"]["count"] + 1}}
        params = variables["params"]
        return {"prediction": batch["x"] @ params["w"] + params["b"]}, seen

    variables = {
        "params": {"w": jnp.array([[0.5]]), "b": jnp.array(0.1)},
        "batch_stats": {"mean": jnp.array(0.0), "count": jnp.array(0)},
    }
    model, devices = Model(variables, forward, (), None), sharding.make_mesh()
    labels = finetune.train_only(model, "b")

    def loss(model, batch, key):
        outputs, state = model.run(batch, Mode(stats="batch"))
        return jnp.mean((outputs["prediction"] - batch["y"]) ** 2), Aux({}, state)

    found = []
    for gradient, options in (
        (meta.reptile(steps=2, rate=0.1), {}),
        (meta.sharded(meta.reptile(steps=2, rate=0.1, chunk=1), devices), {"mesh": devices}),
    ):
        step = make_step(loss, optax.sgd(1.0), labels, gradient=gradient, **options)
        state, _ = step(step.init(model, KEY), sharding.global_batch(lines, options.get("mesh")))
        found.append(tree.flatten(state.model.variables))
    assert found[0]["params/b"] != 0.1 and found[0]["batch_stats/count"] == 1
    for path, leaf in found[0].items():
        np.testing.assert_allclose(found[1][path], leaf, rtol=1e-5, err_msg=path)


def test_devices_divide_the_tasks(net, lines):
    devices = sharding.make_mesh(jax.devices()[:3])
    with pytest.raises(ValueError, match="3 devices of the mesh do not divide the 8 tasks"):
        meta.sharded(meta.maml(steps=1, rate=0.1), devices)(lambda *_: None, net.params, lines, KEY)


def test_what_the_step_freezes_cannot_adapt(net, lines):
    outer = finetune.train_only(net, "dense_0/.*")
    inner = finetune.train_only(net, "out/.*")
    step = make_step(squared, optax.sgd(0.1), outer, gradient=meta.maml(steps=1, rate=0.1, labels=inner))
    with pytest.raises(ValueError, match=r"adapt \['out/bias', 'out/kernel'\], which the step's own labels"):
        step(step.init(net, KEY), lines)


@pytest.mark.slow
def test_four_slots_maml_over_lora_leaves():
    """LoRA (leaves) at layer-wise rates (labels), cross-entropy with L2-SP (loss), MAML (gradient)."""
    architecture = ARCHITECTURES["bert"]
    config = architecture.config(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=8,
    )  # fmt: skip
    example = {name: jnp.asarray(value) for name, value in architecture.example(config).items()}
    module = architecture.module(config)
    bert = linen(module, jax.jit(lambda: module.init(KEY, **example))()).replace(config=config)
    model = adapters.lora(heads.classifier(bert, 2, key=KEY, dropout=0.0), rank=2, key=KEY)

    ids = jax.random.randint(jax.random.key(3), (2, 8, 5), 1, 20)
    label = (ids[..., 0] > 10).astype(jnp.int32)
    rows = {"input_ids": ids, "attention_mask": jnp.ones_like(ids), "label": label}
    batch = {
        "support": jax.tree.map(lambda x: x[:, :4], rows),
        "query": jax.tree.map(lambda x: x[:, 4:], rows),
    }

    trains = ".*/lora/.*|head/.*"
    labels = jax.tree.map(
        lambda chosen, rate: chosen * rate,
        finetune.train_only(model, trains),
        finetune.layerwise(model, 0.9),
    )
    loss = Classify() + finetune.L2SP({"head": model.params["head"]}, 0.01, 0.0)
    step = make_step(loss, optax.adam(0.02), labels, gradient=meta.maml(steps=2, rate=0.1))
    state, history = step.init(model, KEY), []
    for _ in range(15):
        state, metrics = step(state, batch)
        history.append(float(metrics["loss"]))
    assert history[-1] < history[0] - 0.05
    before, after = tree.flatten(model.params), tree.flatten(state.model.params)
    for path, chosen in tree.flatten(tree.matches(trains, model.params)).items():
        assert bool((before[path] != after[path]).any()) == chosen, path
