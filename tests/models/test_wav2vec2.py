"""Wav2Vec2 and HuBERT: against committed outputs of `transformers`, and what must hold by construction."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import read
from safetensors.numpy import load_file
from support import error, from_files, outputs, shapes

from experiments.models.random_models import batch, build, files, run, settings
from experiments.models.speech_models import CTC
from jtl import adapters, distill, finetune, heads
from jtl.model import cast
from jtl.models import ARCHITECTURES
from jtl.pretrained import load, save
from jtl.tasks import ctc
from jtl.tree import flatten


@pytest.fixture(scope="module", params=CTC)
def reference(request):
    config, weights, inputs, theirs = read(request.param)
    return from_files(request.param, config, weights), inputs, theirs


def at_real(model, value, inputs):
    """Zero at padded frames, where outputs mean nothing."""
    value = np.array(value)
    if "attention_mask" in inputs:
        lengths = model.config.frames(inputs["attention_mask"].sum(1))
        value[np.arange(value.shape[1]) >= lengths[:, None]] = 0
    return value


def compare(model, inputs, theirs):
    for output, value in outputs(model, inputs, theirs).items():
        found, expected = (at_real(model, v, inputs) for v in (value, theirs[output]))
        assert error(found, expected) < 1e-4, output


def test_committed_outputs(reference):
    model, inputs, theirs = reference
    assert model.config.do_stable_layer_norm == (model.config.model_type == "hubert")
    compare(*reference)
    mask = np.asarray(model(inputs)["sequence_mask"])
    lengths = [len(range(0, n - model.config.shortest + 1, 12)) for n in inputs["attention_mask"].sum(1)]
    np.testing.assert_array_equal(mask.sum(1), lengths)  # a frame of `shortest` samples every 3 * 2 * 2
    assert not mask.all()


@pytest.mark.parametrize("name", CTC)
def test_name_map_and_config(name):
    for seed in range(4):
        written = settings(name, np.random.default_rng(seed)) | {"model_type": name}
        config = ARCHITECTURES[name].config.from_hf(written | {"architectures": ["XForCTC"] * (seed % 2)})
        assert config.ctc == bool(seed % 2)
        tensors = ARCHITECTURES[name].tensors(config)
        assert set(tensors) == set(shapes(ARCHITECTURES[name], config))
        assert len({tensor.key for tensor in tensors.values()}) == len(tensors)
        assert ARCHITECTURES[name].config.from_hf(config.to_hf()) == config
        assert hash(config) == hash(dataclasses.replace(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 10, "num_attention_heads": 3}, "not a multiple"),
        ({"num_conv_pos_embedding_groups": 7}, "not a multiple of num_conv_pos_embedding_groups=7"),
        ({"feat_extract_norm": "batch"}, "feat_extract_norm='batch' is unknown"),
        ({"conv_dim": [4, 4]}, "name 2, 7 and 7 convolutions"),
        ({"feat_extract_activation": "gelo"}, "did you mean.*gelu"),
        ({"add_adapter": True}, "add_adapter=True is not supported"),
        ({"adapter_attn_dim": 16}, "adapter_attn_dim=16 is not supported"),
        ({"conv_pos_batch_norm": True}, "conv_pos_batch_norm=True is not supported"),
        ({"use_weighted_layer_sum": True}, "use_weighted_layer_sum=True is not supported"),
        ({"model_type": "wavlm"}, "'wavlm', expected"),
    ],
)
def test_unsupported_settings_are_refused(change, message):
    for name in CTC:
        with pytest.raises(ValueError, match=message):
            ARCHITECTURES[name].config.from_hf({"model_type": name} | change)


@pytest.mark.parametrize(
    ("key", "canonical"),
    [
        ("encoder.pos_conv_embed.conv.weight_g", "encoder.pos_conv_embed.conv.parametrizations.weight.original0"),
        ("encoder.pos_conv_embed.conv.weight_v", "encoder.pos_conv_embed.conv.parametrizations.weight.original1"),
        ("feature_projection.projection.bias", "feature_projection.projection.bias"),
    ],
)  # fmt: skip
def test_other_spellings(key, canonical):
    assert ARCHITECTURES["hubert"].canonical(key) == f"hubert.{canonical}"
    assert ARCHITECTURES["hubert"].canonical("lm_head.bias") == "lm_head.bias"


def test_what_pretraining_alone_needs_is_ignored():
    wav2vec2 = ARCHITECTURES["wav2vec2"]
    for key in ("masked_spec_embed", "quantizer.codevectors", "project_q.bias", "wav2vec2.masked_spec_embed"):
        assert wav2vec2.is_ignored(wav2vec2.canonical(key)), key
    assert not wav2vec2.is_ignored("wav2vec2.encoder.layer_norm.bias")


def test_padding_changes_nothing_in_layer_norm_encoders(reference):
    """A short sound, alone and behind a mask. Group norm sees the padding, so that its models go without a mask."""
    model, inputs, _ = reference
    short = int(inputs["attention_mask"].sum(1).min())
    row = int(inputs["attention_mask"].sum(1).argmin())
    alone = np.asarray(model({"audio": inputs["audio"][row : row + 1, :short]})["token_logits"][0])
    padded = np.asarray(model(inputs)["token_logits"][row][: len(alone)])
    same = np.abs(alone - padded).max() < 1e-4
    assert same == (model.config.feat_extract_norm == "layer")


def test_too_short(reference):
    model, _, _ = reference
    assert model({"audio": np.ones((1, model.config.shortest), np.float32)})["sequence"].shape[1] == 1
    with pytest.raises(ValueError, match=f"too short for a frame of {model.config.shortest} samples"):
        model({"audio": np.ones((1, model.config.shortest - 1), np.float32)})


def test_bfloat16_and_dropout(reference):
    model, inputs, theirs = reference
    low = cast(model, jnp.bfloat16)(inputs)
    found, expected = (at_real(model, v["token_logits"], inputs) for v in (low, theirs))
    assert error(found, expected) < 0.1
    forward = jax.jit(lambda key, train: model(inputs, train=train, key=key)["sequence"], static_argnums=1)
    first, second = jax.random.split(jax.random.key(0))
    np.testing.assert_array_equal(forward(first, False), forward(second, False))
    assert not np.array_equal(forward(first, True), forward(second, True))


def test_what_the_techniques_find(reference, key):
    model, inputs, _ = reference
    adapted = adapters.lora(model, rank=2, where=".*/attention/(query|value)", key=key)
    np.testing.assert_array_equal(adapted(inputs)["token_logits"], model(inputs)["token_logits"])
    moved = adapted.with_params(jax.tree.map(lambda x: x + 0.1, adapted.params))
    assert error(adapters.merge(moved)(inputs)["sequence"], np.asarray(moved(inputs)["sequence"])) < 1e-4
    student = distill.choose_layers(model, [1])
    assert student.config.num_hidden_layers == 1 and np.isfinite(student(inputs)["token_logits"]).all()
    depth = flatten(finetune.depths(model))
    assert {depth[path] for path in depth if path.startswith("embeddings")} == {0}
    assert depth["encoder/layer_1/mlp/output/kernel"] == depth["lm_head/kernel"] == 2
    classifier = heads.classifier(model, 3, key=key)
    assert classifier(inputs)["logits"].shape == (3, 3)


def test_a_new_head_and_a_saved_folder(reference, tmp_path, key):
    model, inputs, _ = reference
    other = ctc.head(model, 7, key=key)
    out = other(inputs)
    assert out["token_logits"].shape[-1] == 7
    np.testing.assert_array_equal(out["sequence"], model(inputs)["sequence"])
    back = load(save(other, tmp_path / "saved"))
    assert back.config == other.config
    np.testing.assert_array_equal(back(inputs)["token_logits"], out["token_logits"])


def test_a_classifier_is_saved(reference, tmp_path, key):
    """In the layout of `transformers`: a projection, and a layer on its mean over the real frames."""
    model, inputs, _ = reference
    assert model.config.ctc
    both = heads.classifier(model, 3, key=key)
    with pytest.raises(
        ValueError, match="has no layer for CTC beside its classifier: jtl.tasks.ctc.without_head"
    ):
        save(both, tmp_path / "both")
    bare = ctc.without_head(model)
    assert "token_logits" not in bare(inputs)
    classifier = heads.classifier(bare, 3, key=key)
    assert classifier.params["head"]["dense"]["kernel"].shape == (model.config.hidden_size, 256)
    back = load(save(classifier, tmp_path / "saved", id2label={0: "a", 1: "b", 2: "c"}))
    assert back.config == classifier.config
    np.testing.assert_array_equal(back(inputs)["logits"], classifier(inputs)["logits"])
    keys = set(load_file(tmp_path / "saved" / "model.safetensors"))
    assert {"projector.weight", "projector.bias", "classifier.weight", "classifier.bias"} < keys
    with pytest.raises(ValueError, match="only Wav2Vec2 and HuBERT of jtl.models have a head for CTC"):
        ctc.without_head(model.replace(config=None))


@pytest.mark.parity
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", CTC)
def test_classifiers_of_transformers(name, seed, tmp_path):
    """Loaded, the same logits; saved again, the same model."""
    import torch
    import transformers

    rng = np.random.default_rng(seed)
    config = transformers.AutoConfig.for_model(
        name, **settings(name, rng), num_labels=4, classifier_proj_size=int(rng.integers(3, 9))
    )
    kind = transformers.AutoModelForAudioClassification
    theirs = kind.from_config(config).eval()
    with torch.no_grad():
        for value in theirs.state_dict().values():
            value.add_(0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(seed)))
    theirs.save_pretrained(tmp_path / "theirs")
    inputs = batch(name, config.to_dict(), rng, padded=seed % 2 > 0)
    fields = {"input_values" if key == "audio" else key: torch.tensor(value) for key, value in inputs.items()}
    ours = load(tmp_path / "theirs")
    again, info = kind.from_pretrained(save(ours, tmp_path / "ours"), output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        expected, found = theirs(**fields).logits.numpy(), again.eval()(**fields).logits.numpy()
    np.testing.assert_array_equal(found, expected)
    assert error(jax.jit(lambda m, b: m(b)["logits"])(ours, inputs), expected) < 1e-4


@pytest.mark.parity
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", CTC)
def test_outputs_live(name, seed):
    rng = np.random.default_rng(seed)
    torch_model = build(name, settings(name, rng))
    written, weights = files(torch_model)
    inputs = batch(name, written, rng, padded=seed % 3 > 0)
    compare(from_files(name, written, weights), inputs, run(name, torch_model, inputs))


@pytest.mark.parity
@pytest.mark.parametrize("bare", [False, True])
def test_transformers_opens_what_is_saved(reference, bare, tmp_path):
    import torch
    import transformers

    model, inputs, theirs = reference
    model = ctc.without_head(model) if bare else model
    folder = save(model, tmp_path / "saved")
    kind = transformers.AutoModel if bare else transformers.AutoModelForCTC
    back, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        mask = torch.tensor(inputs["attention_mask"]).long()
        out = back.eval()(torch.tensor(inputs["audio"]), attention_mask=mask)
    name = "sequence" if bare else "token_logits"
    found = (out.last_hidden_state if bare else out.logits).numpy()
    assert error(at_real(model, found, inputs), at_real(model, theirs[name], inputs)) < 1e-5
