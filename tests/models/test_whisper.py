"""Whisper: against committed outputs of `transformers`, and what must hold by construction."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import read
from support import error, from_files, outputs, shapes

from experiments.models.random_models import batch, build, files, run, settings
from jtl import adapters, distill, finetune, heads
from jtl.model import Mode, cast
from jtl.models import ARCHITECTURES
from jtl.pretrained import WeightsError, load, save, tokenizer
from jtl.tree import flatten

WHISPER = ARCHITECTURES["whisper"]


@pytest.fixture(scope="module")
def reference():
    config, weights, inputs, theirs = read("whisper")
    return from_files("whisper", config, weights), inputs, theirs


def at_real(output, value, inputs):
    """Zero at padded tokens, where outputs of the decoder mean nothing."""
    if output.startswith("enc") or "decoder_attention_mask" not in inputs:
        return np.asarray(value)
    return np.asarray(value) * inputs["decoder_attention_mask"][..., None]


def compare(model, inputs, theirs):
    for output, value in outputs(model, inputs, theirs).items():
        assert error(at_real(output, value, inputs), at_real(output, theirs[output], inputs)) < 1e-4, output


def test_committed_outputs(reference):
    assert {"encoder/layer_0", "decoder/layer_0", "encoded", "sequence", "token_logits"} < set(reference[2])
    compare(*reference)


def test_name_map_and_config():
    for seed in range(4):
        written = settings("whisper", np.random.default_rng(seed)) | {"model_type": "whisper"}
        config = WHISPER.config.from_hf(written | {"suppress_tokens": [1, 2]})
        tensors = WHISPER.tensors(config)
        assert set(tensors) == set(shapes(WHISPER, config))
        assert len({tensor.key for tensor in tensors.values()}) == len(tensors)
        assert WHISPER.config.from_hf(config.to_hf()) == config and config.suppress_tokens == (1, 2)
        assert hash(config) == hash(dataclasses.replace(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": 10, "encoder_attention_heads": 3}, "not a multiple"),
        ({"decoder_attention_heads": 7}, "not a multiple"),
        ({"activation_function": "gelo"}, "did you mean.*gelu"),
        ({"scale_embedding": True}, "scale_embedding=True is not supported"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False is not supported"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1 is not supported"),
        ({"decoder_layerdrop": 0.1}, "decoder_layerdrop=0.1 is not supported"),
        ({"apply_spec_augment": True}, "apply_spec_augment=True is not supported"),
        ({"model_type": "speech_to_text"}, "'speech_to_text', expected 'whisper'"),
    ],
)
def test_unsupported_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        WHISPER.config.from_hf({"model_type": "whisper"} | change)


def test_settings_of_generation(tmp_path):
    """The tokens are those of the real vocabulary, and of the two others by their published numbers."""
    base = dict(decoder_start_token_id=50258, eos_token_id=50257)
    found = WHISPER.config(vocab_size=51865, **base).generation()
    words = tokenizer("whisper-base").get_vocab()
    tokens = found["lang_to_id"] | {f"<|{name}|>": token for name, token in found["task_to_id"].items()}
    tokens |= {
        "<|notimestamps|>": found["no_timestamps_token_id"],
        "<|startofprev|>": found["prev_sot_token_id"],
    }
    assert len(tokens) == 103 and all(words[name] == token for name, token in tokens.items())
    third = WHISPER.config(vocab_size=51866, **base).generation()
    assert (third["no_timestamps_token_id"], third["task_to_id"]["transcribe"]) == (50364, 50360)
    assert third["lang_to_id"]["<|yue|>"] == 50358
    english = WHISPER.config(vocab_size=51864, decoder_start_token_id=50257, eos_token_id=50256).generation()
    assert english["no_timestamps_token_id"] == 50362 and not english["is_multilingual"]
    assert "lang_to_id" not in english and "lang_to_id" not in WHISPER.config(vocab_size=23).generation()


def test_a_cache_changes_nothing(reference):
    """A text read in three parts, the sound with the first alone, gives what it gives at once."""
    model, inputs, _ = reference
    mask = inputs["decoder_attention_mask"]
    whole, ids = model(inputs)["token_logits"], inputs["decoder_input_ids"]
    (B, L), parts = ids.shape, []
    cache = model.config.cache(B, L + 2, jnp.float32)
    forward = jax.jit(lambda model, batch: model.run(batch, Mode()))
    for start, end in ((0, 2), (2, 3), (3, L)):
        part = {"decoder_input_ids": ids[:, start:end], "decoder_attention_mask": mask[:, start:end]}
        part |= {"log_mel": inputs["log_mel"]} if start == 0 else {}
        out, state = forward(model.replace(variables={**model.variables, "cache": cache}), part)
        assert ("encoded" in out) == (start == 0)
        cache = state["cache"]
        parts.append(out["token_logits"])
    found = at_real("", jnp.concatenate(parts, 1), inputs)
    np.testing.assert_allclose(found, at_real("", whole, inputs), atol=1e-4)
    assert int(cache["filled"]) == L


def test_what_a_token_sees(reference):
    """Itself and the tokens before it, and all that is heard; by the gradient of one logit of each token."""
    model, inputs, _ = reference
    inputs = {name: value[:1] for name, value in inputs.items() if name != "decoder_attention_mask"}
    L = inputs["decoder_input_ids"].shape[1]
    ids = np.arange(3, 3 + L)[None]  # each its own row of the table
    at = model.params["decoder"]["embeddings"]["word"]["embedding"]

    def logits(table, log_mel):
        params = model.params | {
            "decoder": model.params["decoder"]
            | {"embeddings": model.params["decoder"]["embeddings"] | {"word": {"embedding": table}}}
        }
        out = model.with_params(params)({"log_mel": log_mel, "decoder_input_ids": ids})
        return jnp.square(out["sequence"][0]).sum(-1)

    words, sound = jax.jit(jax.jacrev(logits, (0, 1)))(at, jnp.asarray(inputs["log_mel"]))
    sees = np.abs(np.asarray(words)[:, 3 : 3 + L]).max(-1) > 0
    np.testing.assert_array_equal(sees, np.tri(L, dtype=bool))
    assert (np.abs(np.asarray(sound)[:, 0]).max(-1) > 0).all()


def test_shapes_that_do_not_fit(reference):
    model, inputs, _ = reference
    mels = inputs["log_mel"]
    assert model({"log_mel": mels[:, :4]})["encoded"].shape[1] == 2
    for wrong in (mels[..., :3], np.concatenate([mels, mels], 1), mels[:, :0]):
        with pytest.raises(ValueError, match="log_mel: shape"):
            model({"log_mel": wrong})
    with pytest.raises(ValueError, match="length 12 exceeds max_target_positions=11"):
        model({"log_mel": mels, "decoder_input_ids": np.ones((3, 12), np.int32)})
    with pytest.raises(ValueError, match="needs log_mel, or a cache"):
        model({"decoder_input_ids": np.ones((3, 2), np.int32)})


def test_bfloat16_and_dropout(reference):
    model, inputs, theirs = reference
    low = cast(model, jnp.bfloat16)(inputs)
    assert error(at_real("", low["token_logits"], inputs), at_real("", theirs["token_logits"], inputs)) < 0.1
    config = dataclasses.replace(model.config, dropout=0.5)
    model = model.replace(base=dataclasses.replace(model.base, module=WHISPER.module(config)))
    forward = jax.jit(lambda key, train: model(inputs, train=train, key=key)["sequence"], static_argnums=1)
    first, second = jax.random.split(jax.random.key(0))
    np.testing.assert_array_equal(forward(first, False), forward(second, False))
    assert not np.array_equal(forward(first, True), forward(second, True))


def test_what_the_techniques_find(reference, key):
    model, inputs, _ = reference
    where = ".*/(attention|cross_attention)/(query|value)"
    adapted = adapters.lora(model, rank=2, where=where, key=key)
    np.testing.assert_array_equal(adapted(inputs)["token_logits"], model(inputs)["token_logits"])
    moved = adapted.with_params(jax.tree.map(lambda x: x + 0.1, adapted.params))
    merged = adapters.merge(moved)
    assert error(merged(inputs)["token_logits"], np.asarray(moved(inputs)["token_logits"])) < 1e-4
    classifier = heads.classifier(model, 3, key=key)
    sound = {"log_mel": inputs["log_mel"]}  # a class needs no words
    assert classifier(sound)["logits"].shape == (3, 3)
    assert set(flatten(classifier.params)) - set(flatten(model.params)) == {
        "head/out/kernel",
        "head/out/bias",
    }


def test_layers_have_depths_and_can_be_chosen(reference):
    model, inputs, _ = reference
    assert (model.config.encoder_layers, model.config.decoder_layers) == (2, 2)
    depth = flatten(finetune.depths(model))
    for path, expected in {
        "encoder/embeddings/conv_2/kernel": 0,
        "decoder/embeddings/word/embedding": 0,
        "encoder/layer_0/mlp/output/kernel": 1,
        "encoder/layer_1/attention/key/kernel": 2,
        "encoder/norm/scale": 2,
        "decoder/layer_0/cross_attention/query/bias": 3,
        "decoder/layer_1/mlp_norm/scale": 4,
        "decoder/norm/scale": 4,
    }.items():
        assert depth[path] == expected, path
    student = distill.choose_layers(model, [1], stack="decoder/layer_")
    assert (student.config.encoder_layers, student.config.decoder_layers) == (2, 1)
    np.testing.assert_array_equal(student(inputs)["encoded"], model(inputs)["encoded"])
    kept = student.params["decoder"]["layer_0"]["cross_attention"]["query"]["kernel"]
    np.testing.assert_array_equal(
        kept, model.params["decoder"]["layer_1"]["cross_attention"]["query"]["kernel"]
    )
    assert distill.choose_layers(model, [0]).config.encoder_layers == 1


def test_saved_folders(reference, tmp_path, key):
    model, inputs, _ = reference
    model = model.replace(config=dataclasses.replace(model.config, suppress_tokens=(1, 5)))
    back = load(save(model, tmp_path / "saved"))
    assert back.config == model.config
    written = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert written == model.config.generation() and written["suppress_tokens"] == [1, 5]
    np.testing.assert_array_equal(back(inputs)["token_logits"], model(inputs)["token_logits"])
    with pytest.raises(WeightsError, match="cannot save: leaves without a tensor .*head/out"):
        save(heads.classifier(model, 3, key=key), tmp_path / "other")


@pytest.mark.parity
def test_transformers_opens_what_is_saved(reference, tmp_path):
    from transformers import AutoModelForSpeechSeq2Seq

    model, inputs, theirs = reference
    folder = save(model, tmp_path / "saved")
    back, info = AutoModelForSpeechSeq2Seq.from_pretrained(folder, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    found = run("whisper", back.eval(), inputs)
    for name in ("token_logits", "encoded"):
        assert error(at_real(name, found[name], inputs), at_real(name, theirs[name], inputs)) < 1e-5


@pytest.mark.parity
@pytest.mark.parametrize("seed", range(4))
def test_outputs_live(seed):
    rng = np.random.default_rng(seed)
    torch_model = build("whisper", settings("whisper", rng))
    written, weights = files(torch_model)
    inputs = batch("whisper", written, rng, padded=seed % 2 > 0)
    compare(from_files("whisper", written, weights), inputs, run("whisper", torch_model, inputs))
