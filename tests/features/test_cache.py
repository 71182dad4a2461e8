import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl import heads
from jtl.data import Arrays
from jtl.features import DataKey, cached, digest
from jtl.model import Linen, Model, linen, with_base
from jtl.models.bert import Bert, BertConfig
from jtl.outputs import outputs

CONFIG = BertConfig(
    vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
    max_position_embeddings=8,
)  # fmt: skip
ROOT = Path(__file__).parents[2]
DATA = DataKey("toy", "train", "abc", {"length": 8})


def make_batches(lengths=(4, 6), seed=0):
    rng = np.random.default_rng(seed)
    for number, length in enumerate(lengths):
        mask = np.ones((3, length), np.int32)
        mask[1, 2:] = 0
        yield {
            "input_ids": rng.integers(0, 30, (3, length)).astype(np.int32),
            "attention_mask": mask,
            "label": np.arange(3, dtype=np.int32) + 10 * number,
        }


@pytest.fixture(scope="module")
def model():
    variables = jax.jit(Bert(CONFIG).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    return heads.classifier(
        Model(dict(variables), Linen(Bert(CONFIG)), config=CONFIG), 2, key=jax.random.key(1)
    )


def test_outputs_and_taps_over_all_batches(model):
    found = outputs(model, make_batches(), ("pooled", "encoder/layer_0", "label", "attention_mask"))
    assert {name: value.shape for name, value in found.items()} == {
        "pooled": (6, 16), "encoder/layer_0": (6, 6, 16), "label": (6,), "attention_mask": (6, 6),
    }  # fmt: skip
    first, second = make_batches()
    own = model(second, taps=("encoder/layer_0",))
    np.testing.assert_allclose(found["pooled"][3:], own["pooled"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        found["encoder/layer_0"][3:], own["taps"]["encoder/layer_0"], rtol=1e-5, atol=1e-6
    )
    assert (found["encoder/layer_0"][:3, 4:] == 0).all() and (found["attention_mask"][:3, 4:] == 0).all()
    np.testing.assert_array_equal(found["label"], [0, 1, 2, 10, 11, 12])


def test_padding_rows_are_left_out_and_rows_come_in_the_order_of_the_split(model):
    (batch,) = make_batches((4,))
    padded = batch | {"weight": np.float32([1, 0, 1]), "index": np.int32([7, -1, 3])}
    np.testing.assert_array_equal(outputs(model, [padded], ("label",))["label"], [2, 0])


def test_unknown_names_and_empty_data(model):
    with pytest.raises(KeyError, match="encoder/layer_1"):
        outputs(model, make_batches(), ("encoder/layer_7",))
    with pytest.raises(ValueError, match="no batches"):
        outputs(model, [])
    with pytest.raises(ValueError, match="fingerprint"):
        DataKey("toy", "train", "")
    with pytest.raises(ValueError, match=r"write \('features',\)"):
        outputs(model, make_batches(), "features")


class Net(nn.Module):
    """Two layers whose code can change while name, fields and parameters do not."""

    act: str = "relu"

    @nn.compact
    def __call__(self, x):
        x = getattr(nn, self.act)(nn.Dense(4, name="first")(x))
        return {"features": FACTOR * nn.Dense(3, name="second")(x)}


FACTOR = 1.0
ROWS = [{"x": np.ones((2, 5), np.float32) * i, "label": np.array([i, i])} for i in (1, 2)]


@pytest.fixture(scope="module")
def net():
    model = linen(Net(), jax.jit(Net().init)(jax.random.key(0), ROWS[0]["x"]))
    return heads.classifier(model, 2, key=jax.random.key(1), on="features", width=3)


def hits(model, folder, data=DATA, at=("features",), keep=("label",)) -> bool:
    """Whether the file was there: then only the first batch is read. The arrays must be right either way."""
    read = []
    batches = (read.append(i) or batch for i, batch in enumerate(ROWS))
    found = cached(model, batches, data, at, keep=keep, folder=folder)
    fresh = outputs(model, ROWS, (*at, *keep))
    assert found.keys() == fresh.keys()
    for name in fresh:
        np.testing.assert_array_equal(found[name], fresh[name])
    return read == [0]


def test_the_second_call_reads_the_file(net, tmp_path):
    assert not hits(net, tmp_path)
    assert hits(net, tmp_path)
    assert [file.name[:10] + file.suffix for file in tmp_path.iterdir()] == ["toy-train-.npz"]


def changed_leaf(model):
    second = model.params["second"]
    kernel = second["kernel"].at[3, 2].add(1e-6)
    return model.with_params({**model.params, "second": {**second, "kernel": kernel}})


def changed_static(model):
    return with_base(model, module=Net("gelu"))


@pytest.mark.parametrize("change", [changed_leaf, changed_static])
def test_a_changed_model_never_hits(net, tmp_path, change):
    hits(net, tmp_path)
    assert not hits(change(net), tmp_path)
    assert hits(net, tmp_path)


@pytest.mark.slow
def test_changed_code_never_hits(net, tmp_path, monkeypatch):
    before = cached(net, ROWS, DATA, folder=tmp_path)["features"]
    monkeypatch.setattr(sys.modules[__name__], "FACTOR", 2.0)
    jax.clear_caches()
    np.testing.assert_array_equal(cached(net, ROWS, DATA, folder=tmp_path)["features"], 2 * before)


@pytest.mark.parametrize(
    "data",
    [
        DataKey("other", "train", "abc", {"length": 8}),
        DataKey("toy", "test", "abc", {"length": 8}),
        DataKey("toy", "train", "abd", {"length": 8}),
        DataKey("toy", "train", "abc", {"length": 16}),
    ],
)
def test_changed_data_or_preprocessing_never_hits(net, tmp_path, data):
    hits(net, tmp_path)
    assert not hits(net, tmp_path, data)


def test_other_outputs_never_hit(net, tmp_path):
    hits(net, tmp_path)
    assert not hits(net, tmp_path, at=("first",))
    assert not hits(net, tmp_path, keep=())


def test_what_lies_above_the_features_does_not_matter(net, tmp_path):
    hits(net, tmp_path)
    other_head = heads.classifier(net, 5, key=jax.random.key(9), on="features", width=3)
    assert hits(other_head, tmp_path)
    assert not hits(net, tmp_path, at=("first",))
    assert hits(changed_leaf(net), tmp_path, at=("first",))


def test_a_damaged_file_is_computed_anew(net, tmp_path):
    hits(net, tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    assert not hits(net, tmp_path)
    assert hits(net, tmp_path)


def test_an_interrupted_run_leaves_nothing(net, tmp_path):
    def broken():
        yield ROWS[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(net, broken(), DATA, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


PROGRAM = """
import sys, flax.linen as nn, jax, numpy as np
from jtl import model
from jtl.features import DataKey, cached
x = {"inputs": np.ones((2, 4), np.float32)}
net = model.linen(nn.Dense(3), nn.Dense(3).init(jax.random.key(0), x["inputs"]))
cached(net, [x], DataKey("toy", "train", "abc", {"b": 1, "a": [2]}), folder=sys.argv[1])
"""


@pytest.mark.slow
def test_another_process_finds_the_same_file(tmp_path):
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
        subprocess.run(command, check=True, env=environment, cwd=ROOT)
    assert len(list(tmp_path.iterdir())) == 1


def test_digest_tells_paths_types_and_shapes_apart():
    trees = [
        {"a": np.zeros(4, np.float32)}, {"b": np.zeros(4, np.float32)}, {"a": np.zeros(4, np.int32)},
        {"a": np.zeros((2, 2), np.float32)}, {"a": jnp.zeros(4, jnp.bfloat16)}, {"a": np.float32(0)},
    ]  # fmt: skip
    assert len({digest(one) for one in trees}) == len(trees)


def test_rows_feed_the_loader():
    from jtl.data.batches.loader import Batches

    rows = Arrays({"features": np.arange(10.0)[:, None], "label": np.arange(10)})
    batches = Batches(rows, 4, train=False)
    assert len(batches) == 3
    last = batches[2]
    np.testing.assert_array_equal(last["label"][last["weight"] > 0], last["features"][last["weight"] > 0, 0])
    with pytest.raises(ValueError, match="one number of rows"):
        Arrays({"features": np.zeros((3, 2)), "label": np.zeros(2)})
