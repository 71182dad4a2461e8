"""The U-Net: against NumPy, nothing at first, its classes, adapters in it, and a step on a TPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl import adapters, finetune, tree
from jtl.models.unet import CLASSES, UNetConfig, example, to_depth, to_space, unet, with_classes
from jtl.sharding import FULLY_SHARDED, REPLICATED
from jtl.tasks import FlowMatching
from jtl.tasks.flow_matching import noised
from jtl.train import adamw, make_step

SMALL = UNetConfig(3, (8, 12), 2, 2, (4, 8), 2, 2, 8, 2)  # two blocks a level
LAYERS = "(?!label|.*norm).*"


def grown(config):
    """A U-Net none of whose leaves is zero, as training leaves it."""
    rng = np.random.default_rng(0)
    fresh = unet(config, key=jax.random.key(0))
    more = lambda leaf: jnp.asarray(leaf + 0.3 * rng.normal(size=leaf.shape), jnp.float32)  # noqa: E731
    return fresh.with_params(jax.tree.map(more, fresh.params))


@pytest.fixture(scope="module")
def model():
    return grown(SMALL)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    image = rng.normal(size=(5, 8, 12, 2)).astype(np.float32)
    return {
        "image": image,
        "time": np.float32([0.1, 0.9, 0.5, 0.99, 0.3]),
        "label": np.array([0, 1, 2, 3, 1]),
    }


run = jax.jit(lambda model, batch: model(batch))


def silu(x):
    return x / (1 + np.exp(-x))


def layer(p, x):
    return x @ p["kernel"] + p["bias"]


def conv(p, x, stride=1):
    """3 x 3; where the map is halved the padding lies behind, as in TensorFlow."""
    before = 1 if stride == 1 else 0
    padded = np.pad(x, ((0, 0), (before, 1), (before, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))[:, ::stride, ::stride]
    return np.einsum("bhwcij,ijcd->bhwd", windows, p["kernel"]) + p["bias"]


def normal(x, p=None, groups=2):
    y = x.reshape(len(x), -1, groups, x.shape[-1] // groups)
    y = (y - y.mean((1, 3), keepdims=True)) / np.sqrt(y.var((1, 3), keepdims=True) + 1e-6)
    y = y.reshape(x.shape)
    return y if p is None else y * p["scale"] + p["bias"]


def residual(p, x, c):
    y = normal(conv(p["conv_0"], silu(normal(x, p["norm"]))))
    scale, shift = np.split(layer(p["modulation"], c)[:, None, None], 2, -1)
    y = conv(p["conv_1"], silu(y * (1 + scale) + shift))
    return y + (layer(p["skip"], x) if "skip" in p else x)


def attention(p, x, heads=2):
    B, L, D = x.shape
    q, k, v = (layer(p[name], x).reshape(B, L, heads, -1) for name in ("query", "key", "value"))
    weights = np.exp(np.einsum("bqhe,bkhe->bhqk", q, k) / (D / heads) ** 0.5)
    weights /= weights.sum(-1, keepdims=True)
    return layer(p["output"], np.einsum("bhqk,bkhe->bqhe", weights, v).reshape(B, L, D))


def reference(p, image, time, label):
    angles = 1000 * time[:, None] / 10_000 ** (np.arange(4) / 4)[None]
    c = layer(p["time_hidden"], np.concatenate([np.cos(angles), np.sin(angles)], -1))
    c = silu(layer(p["time_output"], silu(c)) + p["label"]["embedding"][label])
    patches = np.stack([image[:, i::2, j::2] for i in range(2) for j in range(2)], -2)
    x = conv(p["stem"], patches.reshape(5, 4, 6, 8))
    first = residual(p["layer_0"], x, c)
    second = residual(p["layer_1"], first, c)
    x = conv(p["halve_1"], second, 2)
    x = residual(p["layer_3"], residual(p["layer_2"], x, c), c)
    x = x + attention(p["attention"], normal(x, p["attention_norm"]).reshape(5, 6, 8)).reshape(x.shape)
    x = residual(p["layer_5"], residual(p["layer_4"], x, c), c)
    x = layer(p["double_0"], x).reshape(5, 2, 3, 2, 2, 4).transpose(0, 1, 3, 2, 4, 5).reshape(5, 4, 6, 4)
    x = residual(p["layer_6"], np.concatenate([x, second], -1), c)
    x = residual(p["layer_7"], np.concatenate([x, first], -1), c)
    x = conv(p["output"], silu(normal(x, p["norm"])))
    clean = np.zeros(image.shape)
    for i in range(2):
        for j in range(2):
            clean[:, i::2, j::2] = x[..., 4 * i + 2 * j : 4 * i + 2 * j + 2]
    return clean, (clean - image) / np.maximum(1 - time, 0.05)[:, None, None, None]


def test_it_is_numpys(model, batch):
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), model.params)
    clean, velocity = reference(params, batch["image"], batch["time"].astype(np.float64), batch["label"])
    found = run(model, batch)
    np.testing.assert_allclose(found["clean"], clean, rtol=2e-3, atol=2e-4)
    np.testing.assert_allclose(found["velocity"], velocity, rtol=2e-3, atol=4e-3)


def test_a_new_one_says_nothing(batch):
    fresh = unet(SMALL, key=jax.random.key(0))
    outputs = fresh(batch, taps=("layer_2", "layer_3"))
    assert not np.asarray(outputs["clean"]).any()
    np.testing.assert_array_equal(outputs["taps"]["layer_2"], outputs["taps"]["layer_3"])


def test_depth_and_space_undo_each_other():
    x = jnp.arange(144.0).reshape(2, 4, 6, 3)
    assert to_depth(x, 2).shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(to_depth(x, 2)[0, 0, 0].reshape(2, 2, 3), x[0, :2, :2])
    np.testing.assert_array_equal(to_space(to_depth(x, 2), 2), x)


def test_new_classes_begin_as_old_ones(model, batch, key):
    more = with_classes(model, (2, None), key=key, apart=0.0)
    assert more.config.num_classes == 5 and more.params["label"]["embedding"].shape == (6, 8)
    of = lambda model, label: np.asarray(run(model, {**batch, "label": np.full(5, label)})["clean"])  # noqa: E731
    for before, after in ((0, 0), (2, 2), (2, 3), (3, 5)):  # 3 was no class, and 5 is
        np.testing.assert_array_equal(of(model, before), of(more, after))
    assert all((of(more, 4) != of(more, other)).any() for other in (0, 1, 2, 5))
    with pytest.raises(ValueError, match="no class 3: the model has 0 to 2"):
        with_classes(model, (3,), key=key)
    adapted = adapters.lora(model, rank=1, where="stem", key=key, batch=example(SMALL))
    with pytest.raises(ValueError, match="add classes first, or merge adapters"):
        with_classes(adapted, (0,), key=key)


def test_new_classes_share_a_mark(model, key):
    old = model.params["label"]["embedding"]
    table = with_classes(model, (2, 0), key=key, apart=0.5).params["label"]["embedding"]
    marks = np.asarray(table[3:5] - old[jnp.array([2, 0])])
    np.testing.assert_allclose(marks[0], marks[1], atol=1e-6)
    assert 0.1 < marks[0].std() < 1.0
    np.testing.assert_array_equal(table[jnp.array([0, 1, 2, 5])], old)


def test_sizes_that_do_not_fit(model, batch):
    with pytest.raises(ValueError, match="must be multiples of 4"):
        dataclasses.replace(SMALL, image_size=(8, 10))
    with pytest.raises(ValueError, match="width 5 is not a multiple of the number of groups, 2"):
        dataclasses.replace(SMALL, widths=(4, 5))
    with pytest.raises(ValueError, match=r"expected \(B, 8, 12, 2\), found \(5, 12, 8, 2\)"):
        model({**batch, "image": batch["image"].transpose(0, 2, 1, 3)})


@pytest.mark.slow
def test_lora_is_the_identity_then_learns_beside_the_classes(batch, key):
    start = with_classes(grown(dataclasses.replace(SMALL, widths=(4,), blocks=1)), (1,), key=key)
    adapted = adapters.lora(start, rank=2, where=LAYERS, key=key, batch=example(SMALL))
    np.testing.assert_allclose(run(adapted, batch)["clean"], run(start, batch)["clean"], atol=1e-5)
    step = make_step(FlowMatching(), adamw(1e-2), finetune.train_only(adapted, ".*/lora/.*|label/.*"))
    state = step.init(noised(adapted), key)
    for _ in range(2):
        state, _ = step(state, {"image": batch["image"], "label": batch["label"]})
    same = jax.tree.map(lambda a, b: bool((a == b).all()), state.model.params, adapted.params)
    still = {path for path, equal in tree.flatten(same).items() if equal}
    assert still == {path for path in tree.flatten(same) if path.endswith(("kernel", "bias", "scale"))}
    assert CLASSES not in still
    merged = adapters.merge(state.model)
    np.testing.assert_allclose(run(state.model, batch)["clean"], run(merged, batch)["clean"], atol=1e-4)


@pytest.mark.slow
@pytest.mark.tpu
@pytest.mark.parametrize("layout", ["replicated", "sharded"])
def test_a_step_compiles_for_a_tpu(slice_2x2, layout):
    """With LoRA, and the classes in full."""
    config = UNetConfig()
    key = jax.random.key(0)
    model = jax.eval_shape(
        lambda key: noised(
            adapters.lora(unet(config, key=key), where=LAYERS, key=key, batch=example(config))
        ),
        key,
    )
    batch = {
        "image": jax.ShapeDtypeStruct((16, 28, 28, 3), jnp.float32),
        "label": jax.ShapeDtypeStruct((16,), jnp.int32),
    }
    sharding = {"replicated": REPLICATED, "sharded": FULLY_SHARDED}[layout]
    labels = finetune.train_only(model, ".*/lora/.*|label/.*")
    step = make_step(FlowMatching(), adamw(1e-3), labels, mesh=slice_2x2, sharding=sharding)
    text = step.lower(model, batch).compile().as_text()
    assert "all-reduce" in text or "reduce-scatter" in text
