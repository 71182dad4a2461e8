"""Saving: bit-equal when read back, and opened by transformers without a missing or unexpected key."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_load import TINY

from jtl import heads, tree
from jtl.model import cast
from jtl.models import ARCHITECTURES
from jtl.pretrained import WeightsError, load, load_with_report, save, scratch


@pytest.fixture
def model(tmp_path, key):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return scratch(tmp_path, key=key)


def assert_bit_equal(first, second):
    first, second = tree.flatten(first.variables), tree.flatten(second.variables)
    assert list(first) == list(second)
    for path, leaf in first.items():
        assert (
            leaf.dtype == second[path].dtype
            and np.asarray(leaf).tobytes() == np.asarray(second[path]).tobytes()
        ), path


def test_round_trip_is_bit_equal(model, tmp_path, key):
    assert_bit_equal(load(save(model, tmp_path / "bare")), model)
    classifier = heads.classifier(model, 3, key=key)
    back = load(save(classifier, tmp_path / "task", id2label={0: "no", 1: "yes", 2: "maybe"}))
    assert_bit_equal(back, classifier)
    batch = {"input_ids": jnp.ones((2, 5), jnp.int32)}
    np.testing.assert_array_equal(back(batch)["logits"], classifier(batch)["logits"])
    settings = json.loads((tmp_path / "task" / "config.json").read_text())
    assert settings["architectures"] == ["BertForSequenceClassification"]
    assert (
        settings["id2label"] == {"0": "no", "1": "yes", "2": "maybe"} and settings["label2id"]["maybe"] == 2
    )


@pytest.mark.parametrize("name", ["minilm", "efficientnet-lite0"])
def test_round_trip_of_real_weights(name, tmp_path):
    model = load(name)
    assert_bit_equal(load(save(model, tmp_path / "x")), model)


def test_bfloat16_survives(model, tmp_path):
    half = model.with_params(jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params))
    assert_bit_equal(load(save(half, tmp_path / "x"), dtype=None), half)


def test_tokenizer_files_come_along(model, tmp_path):
    folder = save(model, tmp_path / "x", tokenizer="minilm")
    assert {"tokenizer.json", "vocab.txt", "tokenizer_config.json"} <= {
        file.name for file in folder.iterdir()
    }


def test_full_folders_are_kept_unless_asked(model, tmp_path):
    folder = tmp_path / "x"
    folder.mkdir()
    save(model, folder)  # empty is fine
    before = (folder / "model.safetensors").read_bytes()
    other = model.with_params(jax.tree.map(lambda x: x + 1, model.params))
    with pytest.raises(FileExistsError, match="not empty.*overwrite=True"):
        save(other, folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert_bit_equal(load(save(other, folder, overwrite=True)), other)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "x",
    ]  # nothing temporary is left


def test_overwrite_deletes_no_folder_that_holds_no_model(model, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="holds no model"):
        save(model, tmp_path / "x", overwrite=True)
    assert (tmp_path / "x" / "thesis.tex").exists()


def test_a_failed_save_leaves_nothing(model, tmp_path):
    with pytest.raises(ValueError, match="classes of a head, and this model has no classifier"):
        save(model, tmp_path / "x", id2label={0: "a"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json"]


def test_what_files_cannot_express_is_named(model, tmp_path, key):
    with pytest.raises(ValueError, match="(?s)technique Head.*name='probe'.*merge or remove it"):
        save(
            heads.attach(model, heads.Classifier(2), on="features", width=8, key=key, name="probe"),
            tmp_path / "x",
        )
    with pytest.raises(ValueError, match="head reads 'features'.*expects 'pooled'"):
        save(heads.classifier(model, 2, key=key, on="features", width=8), tmp_path / "x")
    with pytest.raises(WeightsError, match="leaves without a tensor.*params/extra"):
        save(model.with_params({**model.params, "extra": jnp.zeros(1)}), tmp_path / "x")
    with pytest.raises(ValueError, match=r"expected the classes 0 to 1, found \[0\]"):
        save(heads.classifier(model, 2, key=key), tmp_path / "x", id2label={0: "a"})
    save(cast(model, jnp.bfloat16), tmp_path / "x")  # mixed precision keeps float32 parameters


TEXT = dict(vocab_size=31, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20)
IMAGE = dict(
    hidden_size=12,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=20,
    image_size=16,
    patch_size=8,
)
CONFIGS = {
    "bert": TEXT,
    "roberta": TEXT | dict(max_position_embeddings=40, pad_token_id=1),
    "distilbert": dict(vocab_size=31, dim=12, n_layers=2, n_heads=3, hidden_dim=20),
    "vit": IMAGE,
    "deit": IMAGE,
    "dinov2": IMAGE | dict(mlp_ratio=2),
    "convnext": dict(num_stages=2, hidden_sizes=[8, 12], depths=[1, 2]),
    "convnextv2": dict(num_stages=2, hidden_sizes=[8, 12], depths=[1, 2]),
    "resnet": dict(embedding_size=4, hidden_sizes=[8, 12], depths=[2, 1], layer_type="bottleneck"),
} | {
    name: TEXT | dict(num_key_value_heads=1, pad_token_id=1, head_dim=4, tie_word_embeddings=True)
    for name in ("llama", "mistral", "qwen2", "qwen3")
}  # fmt: skip


def batches(name):
    rng = np.random.default_rng(0)
    if name in ("vit", "deit", "dinov2", "resnet", "convnext", "convnextv2"):
        image = rng.normal(size=(2, 16, 16, 3)).astype(np.float32)
        return {"image": jnp.asarray(image)}, {"pixel_values": image.transpose(0, 3, 1, 2)}
    ids = rng.integers(3, 31, (2, 9))
    mask = np.array([[1] * 9, [1] * 6 + [0] * 3])
    fields = {"input_ids": np.where(mask, ids, 1), "attention_mask": mask}
    return {k: jnp.asarray(v, jnp.int32) for k, v in fields.items()}, fields


@pytest.mark.parity
@pytest.mark.parametrize("name", [name for name in CONFIGS if name in ARCHITECTURES])
def test_transformers_to_jtl_and_back(name, tmp_path):
    import torch
    import transformers

    torch.manual_seed(0)
    task = ARCHITECTURES[name].head.task_class
    config = transformers.AutoConfig.for_model(name, **CONFIGS[name], num_labels=3)
    theirs = getattr(transformers, task)(config).eval()
    for parameter in theirs.parameters():  # zero biases and unit scales would hide a swapped tensor
        torch.nn.init.normal_(parameter, std=0.3)
    for place, buffer in theirs.named_buffers():
        if "running" in place:
            buffer.copy_(torch.rand(buffer.shape) + 0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, report = load_with_report(tmp_path / "theirs")
    batch, fields = batches(name)
    with torch.no_grad():
        expected = theirs(**{k: torch.tensor(v) for k, v in fields.items()}).logits.numpy()
    logits = np.asarray(ours(batch)["logits"])
    assert np.abs(logits - expected).max() / np.abs(expected).max() < 1e-4

    folder = save(ours, tmp_path / "ours", id2label={0: "a", 1: "b", 2: "c"})
    kind = task.removeprefix(type(theirs).__name__.split("For")[0])
    auto = getattr(transformers, f"AutoModel{kind}")
    back, info = auto.from_pretrained(folder, output_loading_info=True)
    problems = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    assert not any(info[problem] for problem in problems), info
    assert back.config.id2label == {0: "a", 1: "b", 2: "c"} and type(back).__name__ == task
    before, after = theirs.state_dict(), back.state_dict()
    assert set(before) == set(after) | set(report.ignored)  # DINOv2 ignores the mask token of its pretraining
    for key, tensor in after.items():
        assert torch.equal(before[key], tensor), key


@pytest.mark.parity
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_language_models_to_jtl_and_back(name, tied, tmp_path):
    """With a scaling of positions and, where there can be one, a window."""
    import torch
    import transformers

    torch.manual_seed(0)
    scaling = {"rope_type": "linear", "factor": 2.0}
    window = dict(use_sliding_window=True, max_window_layers=1) if name.startswith("qwen") else {}
    window |= {} if name == "llama" else dict(sliding_window=4)
    settings = (
        CONFIGS[name]
        | window
        | dict(tie_word_embeddings=tied, rope_parameters=scaling | {"rope_theta": 30.0})
    )
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(name, **settings)
    ).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, report = load_with_report(tmp_path / "theirs")
    assert report.ignored == report.new == ()
    auto = transformers.AutoModelForCausalLM
    back, info = auto.from_pretrained(save(ours, tmp_path / "ours"), output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert type(back) is type(theirs)
    batch, fields = batches(name)
    with torch.no_grad():
        first, second = (
            m(**{k: torch.tensor(v) for k, v in fields.items()}).logits.numpy() for m in (theirs, back.eval())
        )
    np.testing.assert_array_equal(first, second)
    found, real = np.asarray(ours(batch)["token_logits"]), fields["attention_mask"] == 1
    assert np.abs(found - first)[real].max() / np.abs(first).max() < 1e-4


@pytest.mark.parity
def test_minilm_back_to_transformers(tmp_path):
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = save(load("minilm"), tmp_path / "x", tokenizer="minilm")
    back, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(back).__name__ == "BertModel" and not info["missing_keys"] and not info["unexpected_keys"]
    batch = AutoTokenizer.from_pretrained(folder)(["A cat."], return_tensors="pt")
    with torch.no_grad():
        expected = back.eval()(**batch).pooler_output.numpy()
    found = load("minilm")({k: jnp.asarray(v.numpy(), jnp.int32) for k, v in batch.items()})["pooled"]
    np.testing.assert_allclose(found, expected, atol=1e-5)
