"""T5: against committed outputs of `transformers`, NumPy, and what must hold by construction."""

import dataclasses
import math

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
from jtl.models.t5 import buckets
from jtl.pretrained import WeightsError, load, load_with_report, save
from jtl.tasks import beam_search, generate
from jtl.tree import flatten

T5 = ARCHITECTURES["t5"]


@pytest.fixture(scope="module")
def reference():
    config, weights, inputs, theirs = read("t5")
    return from_files("t5", config, weights), inputs, theirs


def at_real(output, value, inputs):
    """Zero at padding, where outputs mean nothing."""
    side = "" if output.startswith("enc") else "decoder_"
    mask = inputs.get(f"{side}attention_mask", np.ones(inputs[f"{side}input_ids"].shape))
    return np.asarray(value) * mask[..., None]


def compare(model, inputs, theirs):
    for output, value in outputs(model, inputs, theirs).items():
        assert error(at_real(output, value, inputs), at_real(output, theirs[output], inputs)) < 1e-4, output


def test_committed_outputs(reference):
    model, _, theirs = reference
    assert {"encoder/layer_0", "decoder/layer_0", "encoded", "sequence", "token_logits"} == set(theirs)
    assert model.config.gated and not model.config.tie_word_embeddings
    compare(*reference)


def test_name_map_and_config():
    for seed in range(6):
        written = settings("t5", np.random.default_rng(seed)) | {"model_type": "t5"}
        config = T5.config.from_hf(written)
        tensors = T5.tensors(config)
        assert set(tensors) == set(shapes(T5, config))
        assert len({tensor.key for tensor in tensors.values()}) == len(tensors)
        assert T5.config.from_hf(config.to_hf()) == config
        assert hash(config) == hash(dataclasses.replace(config))
    assert T5.config.from_hf({"num_layers": 3}).num_decoder_layers == 3


def test_a_last_layer_of_its_own():
    """Files of transformers v4 say it in config.json; those of v5 have it, or not."""
    old = T5.config.from_hf({"tie_word_embeddings": False})
    new = T5.config.from_hf({"tie_word_embeddings": True, "scale_decoder_outputs": False})
    tied = T5.config.from_hf({"tie_word_embeddings": True})
    assert (old.tie_word_embeddings, old.scale_decoder_outputs) == (False, False)
    for config in (old, new):
        assert T5.settle(config, {"lm_head.weight"}) == old
        assert T5.settle(config, {"shared.weight"}) == new
    assert tied.scale_decoder_outputs and T5.settle(tied, {"lm_head.weight"}).tie_word_embeddings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feed_forward_proj": "gated-gelo"}, "did you mean.*gelu"),
        ({"feed_forward_proj": "split-gelu"}, "'split-gelu' is unknown: expected an activation, or gated-"),
        ({"relative_attention_num_buckets": 2}, "relative_attention_num_buckets=2 must be at least 4"),
        ({"relative_attention_max_distance": 16}, "relative_attention_max_distance=16 more than half"),
        ({"is_decoder": True}, "is_decoder=True is not supported for t5"),
        ({"model_type": "mt5"}, "'mt5', expected 't5'"),
    ],
)
def test_unsupported_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        T5.config.from_hf({"model_type": "t5"} | change)


@pytest.mark.parametrize(("count", "furthest"), [(16, 128), (32, 128), (8, 20), (4, 5), (6, 50)])
def test_buckets(count, furthest):
    """By the definition, in exact arithmetic: the first distance of each bucket above the half of single ones."""
    found = buckets(count, furthest)
    half = count // 2
    assert (
        found[:half].tolist() == list(range(half)) and (np.diff(found) >= 0).all() and found[-1] == count - 1
    )
    for bucket in range(half + 1, count):
        first = half * (furthest / half) ** ((bucket - half) / (count - half))
        if abs(first - round(first)) > 1e-6:
            inside = [d for d in range(half, furthest + 1) if d >= first]
            assert found[math.ceil(first)] >= bucket and (found[inside] >= bucket).all()
            assert found[math.ceil(first) - 1] < bucket


def test_attention_against_numpy(reference):
    """The decoder's first attention of a padded text: no scale, a number for each head and distance, no future."""
    model, inputs, _ = reference
    c, at = model.config, "decoder/layer_0/attention"
    taps = model(inputs, taps=(f"{at}_norm", at))["taps"]
    mask = inputs["decoder_attention_mask"][1]
    x = np.asarray(taps[f"{at}_norm"][1], np.float64)
    leaves = {
        k: np.asarray(v, np.float64) for k, v in flatten(model.params).items() if k.startswith("decoder")
    }
    q, k, v = (
        (x @ leaves[f"{at}/{name}/kernel"]).reshape(len(x), c.num_heads, -1)
        for name in ("query", "key", "value")
    )
    table = leaves["decoder/position/distance/embedding"]
    bucket = buckets(c.relative_attention_num_buckets, c.relative_attention_max_distance)
    out = np.zeros(q.shape)
    for head in range(c.num_heads):
        for t in np.flatnonzero(mask):
            seen = [s for s in range(t + 1) if mask[s]]
            logits = np.array([q[t, head] @ k[s, head] + table[bucket[t - s], head] for s in seen])
            weights = np.exp(logits - logits.max())
            out[t, head] = weights / weights.sum() @ v[seen, head]
    expected = out.reshape(len(x), -1) @ leaves[f"{at}/output/kernel"]
    np.testing.assert_allclose(taps[at][1][mask == 1], expected[mask == 1], atol=1e-4)


def test_sides_of_the_encoder(reference):
    """Swapping the buckets of what lies ahead and what lies behind reads a text backwards."""
    model, inputs, _ = reference
    ids = inputs["input_ids"]
    table = model.params["encoder"]["position"]["distance"]["embedding"]
    half = len(table) // 2
    turned = {**model.params, "encoder": {**model.params["encoder"], "position": {"distance": {"embedding":
              jnp.concatenate([table[:1], table[half + 1 :], table[half:][:1], table[1:half]])}}}}  # fmt: skip
    backwards = model.with_params(turned)({"input_ids": ids[:, ::-1]})["encoded"][:, ::-1]
    np.testing.assert_allclose(model({"input_ids": ids})["encoded"], backwards, atol=1e-4)
    assert error(model({"input_ids": ids[:, ::-1]})["encoded"][:, ::-1], np.asarray(backwards)) > 1e-2


def test_padding_influences_nothing(reference):
    """A text gives the same wherever its padding stands, on both sides."""
    model, inputs, _ = reference
    text, words = inputs["input_ids"][2:, :3], inputs["decoder_input_ids"][2:, :2]
    forward = jax.jit(lambda model, batch: model(batch))
    alone = forward(model, {"input_ids": text, "decoder_input_ids": words})
    for left in range(3):
        wide = [(0, 0), (left, 2 - left)]
        padded = {
            "input_ids": np.pad(text, wide, constant_values=5),
            "attention_mask": np.pad(np.ones_like(text), wide),
            "decoder_input_ids": np.pad(words, wide, constant_values=5),
            "decoder_attention_mask": np.pad(np.ones_like(words), wide),
        }
        out = forward(model, padded)
        np.testing.assert_allclose(out["token_logits"][:, left : left + 2], alone["token_logits"], atol=1e-4)
        np.testing.assert_allclose(out["features"], alone["features"], atol=1e-4)


def test_a_cache_changes_nothing(reference):
    """A text read in three parts, what it answers with the first alone, gives what it gives at once."""
    model, inputs, _ = reference
    whole, ids = model(inputs)["token_logits"], inputs["decoder_input_ids"]
    (B, L), parts = ids.shape, []
    cache = model.config.cache(B, L + 2, jnp.float32)
    forward = jax.jit(lambda model, batch: model.run(batch, Mode()))
    for start, end in ((0, 0), (0, 2), (2, L)):
        part = {name: inputs[name][:, start:end] for name in ("decoder_input_ids", "decoder_attention_mask")}
        part |= {name: inputs[name] for name in ("input_ids", "attention_mask")} if end == 0 else {}
        out, state = forward(model.replace(variables={**model.variables, "cache": cache}), part)
        assert ("encoded" in out) == (end == 0)
        cache = state["cache"]
        parts.append(out["token_logits"])
    found = at_real("", jnp.concatenate(parts, 1), inputs)
    np.testing.assert_allclose(found, at_real("", whole, inputs), atol=1e-4)
    assert int(cache["filled"]) == L
    with pytest.raises(ValueError, match="needs input_ids, or a cache of what it has read"):
        model({"decoder_input_ids": ids})
    with pytest.raises(ValueError, match="needs input_ids, or a cache of what it has read"):
        generate(model, ids, max_new_tokens=2, encoder={})


def test_greedy_is_what_whole_forwards_give(reference):
    model, inputs, _ = reference
    read_once = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    forward = jax.jit(lambda model, words: model({**read_once, "decoder_input_ids": words})["token_logits"])
    words = np.zeros((3, 1), np.int32)
    for _ in range(6):
        padded = np.pad(words, ((0, 0), (0, 7 - words.shape[1])))
        new = np.asarray(forward(model, padded)[:, words.shape[1] - 1].argmax(-1))
        words = np.concatenate([words, new[:, None].astype(np.int32)], 1)
    found = generate(model, None, max_new_tokens=6, encoder=read_once)
    np.testing.assert_array_equal(found, words[:, 1:])
    one = beam_search(model, None, beams=1, max_new_tokens=6, encoder=read_once)
    np.testing.assert_array_equal(one.tokens[:, 0], found)


def test_bfloat16_and_dropout(reference):
    model, inputs, theirs = reference
    low = cast(model, jnp.bfloat16)(inputs)
    assert error(at_real("", low["token_logits"], inputs), at_real("", theirs["token_logits"], inputs)) < 0.1
    config = dataclasses.replace(model.config, dropout_rate=0.5)
    own = model.replace(base=dataclasses.replace(model.base, module=T5.module(config)))
    forward = jax.jit(lambda key, train: own(inputs, train=train, key=key)["sequence"], static_argnums=1)
    first, second = jax.random.split(jax.random.key(0))
    np.testing.assert_array_equal(forward(first, False), forward(second, False))
    assert not np.array_equal(forward(first, True), forward(second, True))


def test_what_the_techniques_find(reference, key):
    model, inputs, _ = reference
    adapted = adapters.lora(model, rank=2, where=".*/(query|value|gate)|lm_head", key=key)
    np.testing.assert_array_equal(adapted(inputs)["token_logits"], model(inputs)["token_logits"])
    moved = adapted.with_params(jax.tree.map(lambda x: x + 0.1, adapted.params))
    assert (
        error(adapters.merge(moved)(inputs)["token_logits"], np.asarray(moved(inputs)["token_logits"])) < 1e-4
    )
    depth = flatten(finetune.depths(model))
    for path, expected in {
        "embeddings/word/embedding": 0,
        "encoder/position/distance/embedding": 0,
        "encoder/layer_1/attention/key/kernel": 2,
        "encoder/norm/scale": 2,
        "decoder/layer_0/cross_attention/query/kernel": 3,
        "decoder/norm/scale": 4,
        "lm_head/kernel": 4,
    }.items():
        assert depth[path] == expected, path
    student = distill.choose_layers(model, [1], stack="decoder/layer_")
    assert (student.config.num_layers, student.config.num_decoder_layers) == (2, 1)
    np.testing.assert_array_equal(student(inputs)["encoded"], model(inputs)["encoded"])
    assert distill.choose_layers(model, [0]).config.num_layers == 1
    classifier = heads.classifier(model, 3, key=key)
    assert classifier({"input_ids": inputs["input_ids"]})["logits"].shape == (3, 3)


def test_saved_folders(reference, tmp_path, key):
    model, inputs, _ = reference
    back = load(save(model, tmp_path / "saved"))
    assert back.config == model.config
    np.testing.assert_array_equal(back(inputs)["token_logits"], model(inputs)["token_logits"])
    with pytest.raises(WeightsError, match="cannot save: leaves without a tensor .*head/out"):
        save(heads.classifier(model, 3, key=key), tmp_path / "other")


@pytest.mark.parity
@pytest.mark.parametrize("seed", range(8))
def test_outputs_live(seed):
    rng = np.random.default_rng(seed)
    torch_model = build("t5", settings("t5", rng))
    written, weights = files(torch_model)
    inputs = batch("t5", written, rng, padded=seed % 3 > 0)
    compare(from_files("t5", written, weights), inputs, run("t5", torch_model, inputs))


@pytest.mark.parity
@pytest.mark.parametrize("both", [True, False])
def test_buckets_live(both):
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    for count, furthest in ((32, 128), (32, 20), (16, 64), (8, 100), (12, 33), (64, 1000)):
        theirs = T5Attention._relative_position_bucket(torch.arange(-1200, 1), both, count, furthest).numpy()
        own = buckets(count // 2 if both else count, furthest)
        np.testing.assert_array_equal(own[np.minimum(np.arange(1200, -1, -1), furthest)], theirs)


@pytest.mark.parity
@pytest.mark.parametrize("seed", range(4))
def test_transformers_opens_what_is_saved(seed, tmp_path):
    """The same outputs, and the same texts, greedy and of beams."""
    import torch
    import transformers

    rng = np.random.default_rng(seed)
    drawn = settings("t5", rng)
    drawn["num_decoder_layers"] = min(
        drawn["num_decoder_layers"], drawn["num_layers"]
    )  # or its cache is too short
    written, weights = files(build("t5", drawn))
    model = from_files("t5", written, weights)
    folder = save(model, tmp_path / "saved")
    back, info = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    inputs = batch("t5", written, rng)
    compare(model, inputs, run("t5", back.eval(), inputs))
    again, report = load_with_report(back.save_pretrained(tmp_path / "theirs") or tmp_path / "theirs")
    assert again.config == model.config and not report.ignored
    heard = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    fields = {name: torch.tensor(value).long() for name, value in heard.items()}
    for beams, penalty in ((1, 1.0), (3, 1.0), (4, 0.3)):
        more = {"length_penalty": penalty, "early_stopping": False} if beams > 1 else {}
        expected = back.generate(**fields, max_new_tokens=8, num_beams=beams, do_sample=False, **more)[
            :, 1:
        ].numpy()
        expected = np.pad(expected, ((0, 0), (0, 8 - expected.shape[1])))
        found = generate(
            again, None, max_new_tokens=8, beams=beams, length_penalty=penalty, eos_id=1, encoder=heard
        )
        upto = np.cumsum(expected == 1, 1) - (expected == 1) == 0  # and its end
        np.testing.assert_array_equal(np.where(upto, found, 1), np.where(upto, expected, 1))
