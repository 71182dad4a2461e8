"""Loading: every tensor and every leaf is accounted for, and the outputs are those of transformers."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jtl import heads, tree
from jtl.pretrained import (
    UnknownModelError,
    WeightsError,
    load,
    load_with_report,
    resolve,
    save,
    scratch,
    tokenizer,
)
from jtl.pretrained.formats import FormatError

REFERENCE = Path(__file__).parent / "data" / "minilm.npz"
TINY = {
    "model_type": "bert",
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 7,
}


@pytest.fixture
def tiny(tmp_path):
    """A folder with a tiny BERT."""
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return save(scratch(tmp_path, key=jax.random.key(0)), tmp_path / "tiny")


def edit(folder, change, name="model.safetensors"):
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)


def relative_error(found, expected):
    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())


# --- MiniLM ------------------------------------------------------------------------------------------


def test_minilm_report_is_exact():
    model, report = load_with_report("minilm")
    keys = set(load_file(resolve("minilm") / "model.safetensors"))
    assert report.ignored == ("embeddings.position_ids",) and report.new == ()
    assert sorted(report.used.values()) == sorted(keys - {"embeddings.position_ids"})
    assert set(report.used) == set(tree.flatten(model.variables))
    assert (
        report.used["params/encoder/layer_3/attention/query/kernel"]
        == "encoder.layer.3.attention.self.query.weight"
    )
    assert tree.size(model.params) == 22_713_216
    assert "103 used, 1 ignored, 0 new\n  - embeddings.position_ids" in str(report)


def test_minilm_outputs_are_those_of_transformers():
    reference = np.load(REFERENCE)
    model = load("minilm")
    batch = {
        name: reference[name].astype(np.int32) for name in ("input_ids", "attention_mask", "token_type_ids")
    }
    out = jax.jit(lambda model, batch: model(batch))(model, batch)
    assert relative_error(out["features"], reference["features"]) < 1e-4
    assert relative_error(out["pooled"], reference["pooled"]) < 1e-4
    assert relative_error(out["sequence"][:, :2], reference["sequence"]) < 1e-4


@pytest.mark.parity
def test_minilm_outputs_live():
    from make_reference import SENTENCES, minilm

    batch = {k: jnp.asarray(v, jnp.int32) for k, v in tokenizer("minilm")(SENTENCES, padding=True).items()}
    out, expected = load("minilm")(batch), minilm()
    for name in ("features", "pooled", "sequence"):
        assert relative_error(out[name], expected[name]) < 1e-4, name
    for name, committed in np.load(REFERENCE).items():
        live = expected[name][:, :2] if name == "sequence" else expected[name]
        np.testing.assert_allclose(committed, live, atol=1e-5)


def test_tokenizer_of_minilm():
    ids = tokenizer("minilm")("A cat, a hat!")["input_ids"]
    assert ids == [101, 1037, 4937, 1010, 1037, 6045, 999, 102]


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_python_in_a_folder_never_runs(file, tmp_path, monkeypatch):
    """Whoever answers yes to what transformers would ask."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    ran = tmp_path / "ran"
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n")
    (folder / "vocab.txt").write_text("a\nb\n")
    auto_map = {"AutoTokenizer": ["own.Own", None], "AutoConfig": "own.Own"}
    (folder / "config.json").write_text(json.dumps({"model_type": "own_kind"}))
    (folder / "tokenizer_config.json").write_text("{}")
    written = {"model_type": "own_kind", "tokenizer_class": "Own", "auto_map": auto_map}
    (folder / file).write_text(json.dumps(written))
    with pytest.raises(FormatError, match=r"Python code in the folder \(auto_map\), which jtl never runs"):
        tokenizer(folder)
    assert not ran.exists()


def test_a_broken_tokenizer_beside_the_code_of_a_model_is_not_blamed_on_the_code(tmp_path):
    """Many folders bring Python for the model alone; their tokenizer is an ordinary one."""
    written = {"model_type": "bert", "auto_map": {"AutoModel": "own.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(written))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(Exception) as raised:
        tokenizer(tmp_path)
    assert not isinstance(raised.value, FormatError)


def test_two_loads_share_one_compilation():
    traces = []

    @jax.jit
    def forward(model, batch):
        traces.append(1)
        return model(batch)["features"]

    batch = {"input_ids": jnp.ones((1, 4), jnp.int32)}
    assert (forward(load("minilm"), batch) == forward(load("minilm"), batch)).all() and len(traces) == 1


def test_efficientnet_lite0_comes_with_its_head_and_statistics():
    model, report = load_with_report("efficientnet-lite0")
    assert report.new == () and all(key.endswith("num_batches_tracked") for key in report.ignored)
    assert len(report.used) + len(report.ignored) == 296
    assert model.params["head"]["out"]["kernel"].shape == (1280, 1000) and "batch_stats" in model.variables


# --- what does not fit -------------------------------------------------------------------------------


def test_wrong_shape_names_path_expected_and_found(tiny):
    edit(
        tiny, lambda t: t.update({"encoder.layer.1.intermediate.dense.weight": np.zeros((12, 9), np.float32)})
    )
    with pytest.raises(
        WeightsError, match=r"params/encoder/layer_1/mlp/intermediate/kernel.*\(12, 8\), found \(12, 9\)"
    ):
        load(tiny)


def test_wrong_rank(tiny):
    edit(tiny, lambda t: t.update({"pooler.dense.weight": np.zeros(64, np.float32)}))
    with pytest.raises(WeightsError, match=r"params/pooler/kernel: expected .* \(8, 8\), found \(64,\)"):
        load(tiny)


def test_surplus_tensor_is_named(tiny):
    edit(tiny, lambda t: t.update({"encoder.layer.2.output.dense.bias": np.zeros(8, np.float32)}))
    with pytest.raises(
        WeightsError, match=r"1 tensors that the model does not use: encoder\.layer\.2\.output"
    ):
        load(tiny, key=jax.random.key(0))


def test_missing_tensor_needs_a_key_and_is_reported_as_new(tiny):
    whole = load(tiny)
    edit(tiny, lambda t: t.pop("pooler.dense.weight"))
    with pytest.raises(
        WeightsError, match=r"1 leaves without a tensor: params/pooler/kernel .*pooler\.dense\.weight"
    ):
        load(tiny)
    model, report = load_with_report(tiny, key=jax.random.key(3))
    assert report.new == ("params/pooler/kernel",)
    assert model.params["pooler"]["kernel"].std() > 0
    old, new = tree.flatten(whole.params), tree.flatten(model.params)
    changed = [path for path in old if not jnp.array_equal(old[path], new[path])]
    assert list(old) == list(new) and changed == ["pooler/kernel"]


def test_truncated_weights(tiny):
    file = tiny / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        load(tiny)


def test_two_spellings_of_one_variable(tiny):
    edit(tiny, lambda t: t.update({"bert.pooler.dense.bias": t["pooler.dense.bias"].copy()}))
    with pytest.raises(WeightsError, match="one variable under two names"):
        load(tiny)


def test_unknown_architecture_lists_near_misses(tiny):
    (tiny / "config.json").write_text(json.dumps({**TINY, "model_type": "berth"}))
    with pytest.raises(UnknownModelError, match="unknown model_type 'berth'.*Near misses: .*bert"):
        load(tiny)


# --- spellings, heads, types -------------------------------------------------------------------------


def test_files_of_task_models_and_of_old_spellings(tiny):
    expected = load(tiny)

    def rename(tensors):
        for key in list(tensors):
            old = key.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            )
            tensors["bert." + old] = tensors.pop(key)
        tensors["cls.predictions.bias"] = np.zeros(11, np.float32)

    edit(tiny, rename)
    model, report = load_with_report(tiny)
    assert report.ignored == ("cls.predictions.bias",)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, expected.params, model.params))


def with_head(tensors):
    tensors["classifier.weight"] = np.arange(24, dtype=np.float32).reshape(3, 8)
    tensors["classifier.bias"] = np.arange(3, dtype=np.float32)


def test_a_head_in_the_files_is_attached(tiny):
    edit(tiny, with_head)
    (tiny / "config.json").write_text(
        json.dumps({**TINY, "architectures": ["BertForSequenceClassification"]})
    )
    model, report = load_with_report(tiny)
    out = model({"input_ids": jnp.ones((2, 5), jnp.int32)})
    kernel, bias = np.arange(24, dtype=np.float32).reshape(3, 8).T, np.arange(3, dtype=np.float32)
    np.testing.assert_allclose(out["logits"], np.asarray(out["pooled"]) @ kernel + bias, rtol=1e-5)
    assert report.used["params/head/out/kernel"] == "classifier.weight"
    assert heads.find(model).module.dropout == 0.1  # hidden_dropout_prob of the configuration


def test_a_head_without_its_bias_raises(tiny):
    edit(tiny, with_head)
    edit(tiny, lambda t: t.pop("classifier.bias"))
    with pytest.raises(WeightsError, match="params/head/out/bias"):
        load(tiny, key=jax.random.key(0))


def test_the_head_of_another_task_is_ignored(tiny):
    edit(tiny, with_head)
    (tiny / "config.json").write_text(json.dumps({**TINY, "architectures": ["BertForTokenClassification"]}))
    model, report = load_with_report(tiny)
    assert "head" not in model.params and sorted(report.ignored) == ["classifier.bias", "classifier.weight"]


def test_types(tiny):
    edit(tiny, lambda t: t.update({k: v.astype(ml_dtypes.bfloat16) for k, v in t.items()}))
    assert {x.dtype for x in jax.tree.leaves(load(tiny).variables)} == {jnp.float32.dtype}
    assert {x.dtype for x in jax.tree.leaves(load(tiny, dtype=None).variables)} == {jnp.bfloat16.dtype}
    assert {x.dtype for x in jax.tree.leaves(load(tiny, dtype=jnp.float16).variables)} == {jnp.float16.dtype}


def test_scratch_has_the_shapes_of_the_pretrained_and_other_values(tiny):
    pretrained, random = load(tiny), scratch(tiny, key=jax.random.key(7))
    assert jax.tree.map(jnp.shape, pretrained) == jax.tree.map(jnp.shape, random)
    assert not jnp.array_equal(pretrained.params["pooler"]["kernel"], random.params["pooler"]["kernel"])
