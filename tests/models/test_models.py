"""Architectures against committed outputs of `transformers`, and what must hold by construction."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import read
from support import error, from_files, outputs, shapes

from experiments.models.random_models import IMAGE, TEXT, settings
from jtl.model import cast
from jtl.models import ARCHITECTURES
from jtl.models.architecture import CONV, DEPTHWISE, LINEAR, PLAIN
from jtl.models.dinov2 import Dinov2Config
from jtl.models.parts.dropout import Dropout
from jtl.models.parts.layers import ACTIVATIONS, activation, mean_over
from jtl.models.roberta import positions
from jtl.tree import flatten

TRANSFORMERS = (*TEXT, *IMAGE)


def reference(name):
    config, weights, inputs, theirs = read(name)
    return from_files(name, config, weights), inputs, theirs


def random_config(name, seed):
    config = settings(name, np.random.default_rng(seed))
    return ARCHITECTURES[name].config.from_hf(config | {"model_type": name})


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_committed_outputs(name):
    model, inputs, theirs = reference(name)
    for output, value in outputs(model, inputs, theirs).items():
        assert error(value, theirs[output]) < 1e-4, output


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("seed", range(4))
def test_name_map_covers_the_module(name, seed):
    config = random_config(name, seed)
    tensors = ARCHITECTURES[name].tensors(config)
    assert set(tensors) == set(shapes(ARCHITECTURES[name], config))
    assert len({tensor.key for tensor in tensors.values()}) == len(tensors)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_config_round_trip(name):
    config = random_config(name, 1)
    assert ARCHITECTURES[name].config.from_hf(config.to_hf()) == config
    assert config.to_hf()["model_type"] == name
    assert hash(config) == hash(random_config(name, 1))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("bert", {"hidden_size": 10, "num_attention_heads": 3}, "not a multiple"),
        ("bert", {"hidden_act": "gelo"}, "did you mean.*gelu"),
        ("bert", {"is_decoder": True}, "is_decoder=True is not supported"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ("roberta", {"model_type": "bert"}, "'bert', expected 'roberta'"),
        ("distilbert", {"sinusoidal_pos_embds": True}, "sinusoidal_pos_embds=True is not supported"),
        ("vit", {"num_attention_heads": 7}, "not a multiple"),
        ("dinov2", {"hidden_act": "xielu"}, "'xielu' is unknown"),
    ],
)
def test_unsupported_settings_are_refused(name, change, message):
    with pytest.raises(ValueError, match=message):
        ARCHITECTURES[name].config.from_hf({"model_type": name} | change)


@pytest.mark.parametrize("name", TEXT)
def test_padding_influences_nothing(name):
    model, inputs, _ = reference(name)
    mask = inputs["attention_mask"]
    table = "params/embeddings/word/embedding"

    def gradient(read_out):
        return np.asarray(
            flatten(jax.jit(jax.grad(lambda model: read_out(model(inputs)).sum()))(model).variables)[table]
        )

    assert (mask == 0).any()
    pad = inputs["input_ids"][mask == 0][0]
    of_real = gradient(lambda out: jnp.square(out["sequence"]) * mask[..., None])
    of_all = gradient(lambda out: jnp.square(out["sequence"]))
    of_features = gradient(lambda out: jnp.square(out["features"]))
    assert not of_real[pad].any() and not of_features[pad].any()
    assert of_all[pad].any() and of_real[inputs["input_ids"][mask == 1]].any(1).all()


@pytest.mark.parametrize("name", TEXT)
def test_text_of_padding_only_stays_finite(name):
    model, inputs, _ = reference(name)
    empty = inputs | {"attention_mask": np.zeros_like(inputs["attention_mask"])}
    out, gradient = jax.value_and_grad(lambda model: jnp.square(model(empty)["sequence"]).sum())(model)
    assert np.isfinite(out) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_features_are_the_mean_over_real_tokens():
    sequence = jnp.arange(12.0).reshape(2, 3, 2)
    mask = np.array([[1, 1, 0], [0, 0, 0]])
    np.testing.assert_allclose(mean_over(sequence, mask), [[1, 2], [0, 0]])
    np.testing.assert_allclose(mean_over(sequence, None), [[2, 3], [8, 9]])


def test_roberta_positions():
    ids = np.array([[0, 7, 1, 8, 1, 1], [0, 2, 3, 4, 5, 6]])
    assert positions(ids, 1).tolist() == [[2, 3, 1, 4, 1, 1], [2, 3, 4, 5, 6, 7]]


@pytest.mark.parametrize(("name", "longest"), [("bert", 17), ("roberta", 15), ("distilbert", 17)])
def test_longest_text(name, longest):
    model, _, _ = reference(name)
    assert np.isfinite(model({"input_ids": np.full((1, longest), 5)})["sequence"]).all()
    with pytest.raises(ValueError, match=f"length {longest + 1} exceeds"):
        model({"input_ids": np.full((1, longest + 1), 5)})


@pytest.mark.parametrize("shape", [(1, 12, 12, 2), (1, 1, 12, 3)])
def test_images_that_do_not_fit(shape):
    model, inputs, _ = reference("vit")
    shape = (
        (*shape[:3], inputs["image"].shape[3] + 1)
        if shape[3] == 2
        else (*shape[:3], inputs["image"].shape[3])
    )
    with pytest.raises(ValueError, match="image: shape"):
        model({"image": np.zeros(shape, np.float32)})


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_dropout_only_in_training(name):
    model, inputs, _ = reference(name)
    fields = [
        f.name
        for f in dataclasses.fields(model.config)
        if "dropout" in f.name and f.name != "classifier_dropout"
    ]
    config = dataclasses.replace(model.config, **dict.fromkeys(fields, 0.5))
    model = model.replace(base=dataclasses.replace(model.base, module=ARCHITECTURES[name].module(config)))
    off, on = (
        jax.jit(lambda key, train=train: model(inputs, train=train, key=key)["sequence"])
        for train in (False, True)
    )
    keys = jax.random.split(jax.random.key(0))
    assert np.array_equal(off(keys[0]), off(keys[1]))
    assert np.array_equal(on(keys[0]), on(keys[0]))
    assert not np.array_equal(on(keys[0]), on(keys[1]))


def test_drop_path_drops_whole_branches():
    config = Dinov2Config(hidden_size=6, num_hidden_layers=1, num_attention_heads=2, image_size=6, patch_size=3,
                          drop_path_rate=0.5)  # fmt: skip
    module = ARCHITECTURES["dinov2"].module(config)
    image = jax.random.normal(jax.random.key(0), (32, 6, 6, 3))
    variables = jax.jit(module.init)(jax.random.key(1), image)
    rngs = {"dropout": jax.random.key(2)}
    _, state = jax.jit(lambda v: module.apply(v, image, train=True, rngs=rngs, capture_intermediates=True))(
        variables
    )
    layer = state["intermediates"]["encoder"]["layer_0"]["__call__"][0]
    same = np.asarray(layer == state["intermediates"]["embeddings"]["__call__"][0])
    kept = same.all((1, 2))  # both branches dropped: one example in four
    assert 1 <= kept.sum() <= 20 and not same[~kept].all((1, 2)).any()


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_bfloat16(name):
    """Products run in bfloat16, exponentials (softmax) and reciprocal roots (layer norm) in float32."""
    model, inputs, theirs = reference(name)
    low = cast(model, jnp.bfloat16)
    assert error(low(inputs)["sequence"], theirs["sequence"]) < 0.1
    kinds = {}

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            kinds.setdefault(equation.primitive.name, set()).update(
                str(v.aval.dtype) for v in equation.invars[:1]
            )
            for inner in equation.params.values():
                walk(inner.jaxpr) if hasattr(inner, "jaxpr") else None

    walk(jax.make_jaxpr(lambda model: low(inputs)["sequence"])(model).jaxpr)
    assert kinds["exp"] == {"float32"} and kinds["rsqrt"] == {"float32"}
    assert "bfloat16" in kinds["dot_general"]


@pytest.mark.parametrize("layout", [PLAIN, LINEAR, CONV, DEPTHWISE])
def test_layouts_invert(layout):
    shape = {"PLAIN": (2, 3, 4), "LINEAR": (2, 3), "CONV": (2, 3, 4, 5), "DEPTHWISE": (6, 1, 4, 5)}[
        layout.name
    ]
    array = np.random.default_rng(0).normal(size=shape)
    assert np.array_equal(layout.to_file(layout.to_jax(array)), array)
    expected = {"PLAIN": (2, 3, 4), "LINEAR": (3, 2), "CONV": (4, 5, 3, 2), "DEPTHWISE": (4, 5, 1, 6)}
    assert layout.to_jax(array).shape == expected[layout.name]


@pytest.mark.parametrize("layout", [LINEAR, CONV, DEPTHWISE])
def test_layouts_refuse_another_rank(layout):
    with pytest.raises(ValueError, match=f"{layout.name} layout needs"):
        layout.to_jax(np.zeros((2, 2, 2)))


@pytest.mark.parametrize(
    ("name", "key", "canonical"),
    [
        ("bert", "bert.embeddings.LayerNorm.gamma", "embeddings.LayerNorm.weight"),
        ("bert", "encoder.layer.3.output.LayerNorm.beta", "encoder.layer.3.output.LayerNorm.bias"),
        ("vit", "vit.layers.11.attention.q_proj.bias", "encoder.layer.11.attention.attention.query.bias"),
        ("vit", "vit.layers.0.mlp.fc1.weight", "encoder.layer.0.intermediate.dense.weight"),
        ("deit", "layers.0.attention.o_proj.weight", "encoder.layer.0.attention.output.dense.weight"),
        (
            "dinov2",
            "dinov2.encoder.layer.0.attention.v_proj.weight",
            "encoder.layer.0.attention.attention.value.weight",
        ),
        ("dinov2", "encoder.layer.0.mlp.fc1.weight", "encoder.layer.0.mlp.fc1.weight"),
        ("vit", "classifier.weight", "classifier.weight"),
    ],
)
def test_other_spellings(name, key, canonical):
    assert ARCHITECTURES[name].canonical(key) == canonical


def test_ignored_on_purpose():
    bert = ARCHITECTURES["bert"]
    assert bert.is_ignored("cls.predictions.bias") and bert.is_ignored("embeddings.position_ids")
    assert not bert.is_ignored("encoder.layer.0.cls.weight") and not bert.is_ignored("classifier.weight")


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.999])
def test_dropout_meets_its_rate_and_keeps_the_mean(rate):
    x = jnp.ones((300, 333))  # not four quarters
    y = Dropout(rate).apply({}, x, train=True, rngs={"dropout": jax.random.key(0)})
    share = float((y == 0).mean())
    assert abs(share - rate) < 4 * (rate * (1 - rate) / x.size) ** 0.5 + 1e-5
    np.testing.assert_allclose(y[y != 0], 1 / (1 - round(rate * 2**16) / 2**16), rtol=1e-6)
    # Entries that share a word, in two quarters of a row, and neighbours are independent.
    kept = np.asarray(y != 0, float) - (1 - rate)
    for one, other in (
        (kept[:, :84], kept[:, 84:168]),
        (kept[:, 84:168], kept[:, 168:252]),
        (kept[1:], kept[:-1]),
    ):
        assert abs((one * other).mean()) < 4 * rate * (1 - rate) / one.size**0.5
    assert Dropout(rate).apply({}, x, train=False) is x
    again = Dropout(rate).apply({}, x, train=True, rngs={"dropout": jax.random.key(1)})
    assert (again != y).any() and not Dropout(1.0).apply(
        {}, x, train=True, rngs={"dropout": jax.random.key(0)}
    ).any()


def test_dropout_is_the_same_over_a_mesh_and_under_any_kind_of_key():
    x = jnp.ones((8, 3, 10))
    drop = jax.jit(lambda x, key: Dropout(0.5).apply({}, x, train=True, rngs={"dropout": key}))
    mesh = jax.make_mesh((8,), ("data",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    np.testing.assert_array_equal(
        drop(jax.device_put(x, rows), jax.random.key(3)), drop(x, jax.random.key(3))
    )
    assert 0.3 < float((drop(x, jax.random.key(0, impl="rbg")) == 0).mean()) < 0.7
    each = jax.vmap(drop, (None, 0))(x, jax.random.split(jax.random.key(3)))
    assert (each[0] != each[1]).any()


def test_slope_of_gelu():
    x = jnp.linspace(-6.0, 6.0, 101)
    for order in (jax.grad, lambda f: jax.grad(jax.grad(f))):
        own, usual = (
            jax.vmap(order(f))(x) for f in (activation("gelu"), lambda x: jax.nn.gelu(x, approximate=False))
        )
        np.testing.assert_allclose(own, usual, atol=2e-6)


@pytest.mark.parametrize("name", ["gelu", "gelu_new", "quick_gelu", "relu2"])
def test_activations(name):
    from math import erf, exp, pi, sqrt, tanh

    formula = {
        "gelu": lambda x: x * 0.5 * (1 + erf(x / sqrt(2))),
        "gelu_new": lambda x: 0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3))),
        "quick_gelu": lambda x: x / (1 + exp(-1.702 * x)),
        "relu2": lambda x: max(x, 0) ** 2,
    }[name]
    x = np.linspace(-6, 6, 49, dtype=np.float32)
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(x)), [formula(float(v)) for v in x], atol=2e-6)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_adapters_find_query_and_value(name):
    """Dense sub-layers have 2-D kernels under the names that adapters target."""
    paths = shapes(ARCHITECTURES[name], random_config(name, 2))
    for part in ("query", "key", "value", "output"):
        assert len(paths[f"params/encoder/layer_0/attention/{part}/kernel"]) == 2
