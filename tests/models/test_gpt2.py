"""GPT-2: against committed outputs of `transformers`, NumPy, PEFT, and what must hold by construction."""

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
from jtl.adapters import peft
from jtl.model import Mode, cast
from jtl.models import ARCHITECTURES
from jtl.pretrained import load, save
from jtl.tasks import CausalLM, generate
from jtl.tree import flatten, fold_path, map_with_path

GPT2 = ARCHITECTURES["gpt2"]


@pytest.fixture(scope="module")
def reference():
    config, weights, inputs, theirs = read("gpt2")
    return from_files("gpt2", config, weights), inputs, theirs


def at_real(value, inputs):
    """Zero at padding, where outputs mean nothing."""
    return np.asarray(value) * inputs.get("attention_mask", np.ones(inputs["input_ids"].shape))[..., None]


def compare(model, inputs, theirs):
    for output, value in outputs(model, inputs, theirs).items():
        assert error(at_real(value, inputs), at_real(theirs[output], inputs)) < 1e-4, output


def test_committed_outputs(reference):
    assert {"embeddings", "decoder/layer_0", "sequence", "token_logits"} <= set(reference[2])
    compare(*reference)


def test_name_map_and_config():
    for seed in range(4):
        config = GPT2.config.from_hf(settings("gpt2", np.random.default_rng(seed)) | {"model_type": "gpt2"})
        tensors = GPT2.tensors(config)
        assert set(tensors) == set(shapes(GPT2, config))
        assert len({tensor.key for tensor in tensors.values()}) == len(tensors)
        assert GPT2.config.from_hf(config.to_hf()) == config
        assert hash(config) == hash(dataclasses.replace(config))
    # The hub's files are those of a bare GPT2Model, with its masks among them.
    assert GPT2.canonical("h.0.attn.c_attn.weight") == "transformer.h.0.attn.c_attn.weight"
    assert GPT2.is_ignored("transformer.h.11.attn.bias") and not GPT2.is_ignored("transformer.h.0.ln_1.bias")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_embd": 10, "n_head": 3}, "not a multiple"),
        ({"activation_function": "gelo"}, "did you mean.*gelu"),
        ({"add_cross_attention": True}, "add_cross_attention=True is not supported for gpt2"),
        ({"model_type": "gpt_neo"}, "'gpt_neo', expected 'gpt2'"),
    ],
)
def test_unsupported_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        GPT2.config.from_hf({"model_type": "gpt2"} | change)


def test_attention_against_numpy(reference):
    """One layer's attention of a text padded on the left, its logits divided by the number of the layer."""
    model, inputs, _ = reference
    config = dataclasses.replace(model.config, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=True)
    model = model.replace(base=dataclasses.replace(model.base, module=GPT2.module(config)))
    mask, at, H = inputs["attention_mask"][1], "decoder/layer_1/attention", config.n_head
    taps = model(inputs, taps=("decoder/layer_1/attention_norm", at))["taps"]
    x = np.asarray(taps["decoder/layer_1/attention_norm"][1], np.float64)
    leaves = {k: np.asarray(v, np.float64) for k, v in flatten(model.params).items() if k.startswith(at)}
    fused = x @ leaves[f"{at}/query_key_value/kernel"] + leaves[f"{at}/query_key_value/bias"]
    q, k, v = (part.reshape(len(x), H, -1) for part in np.split(fused, 3, -1))
    out = np.zeros(q.shape)
    for head in range(H):
        for t in np.flatnonzero(mask):
            seen = [s for s in range(t + 1) if mask[s]]
            logits = np.array([q[t, head] @ k[s, head] for s in seen]) / np.sqrt(q.shape[-1]) / 2
            weights = np.exp(logits - logits.max())
            out[t, head] = weights / weights.sum() @ v[seen, head]
    expected = out.reshape(len(x), -1) @ leaves[f"{at}/output/kernel"] + leaves[f"{at}/output/bias"]
    np.testing.assert_allclose(taps[at][1][mask == 1], expected[mask == 1], atol=1e-4)


def test_positions_count_real_tokens(reference):
    """A text gives the same wherever its padding stands, and the last of its states are its features."""
    model, inputs, _ = reference
    text = inputs["input_ids"][2:, :4]
    forward = jax.jit(lambda model, batch: model(batch))
    alone = forward(model, {"input_ids": text})
    for left in range(3):
        wide = [(0, 0), (left, 2 - left)]
        padded = {"input_ids": np.pad(text, wide), "attention_mask": np.pad(np.ones_like(text), wide)}
        out = forward(model, padded)
        np.testing.assert_allclose(out["token_logits"][:, left : left + 4], alone["token_logits"], atol=1e-4)
        np.testing.assert_allclose(out["features"], alone["sequence"][:, -1], atol=1e-4)


def test_longest_text(reference):
    model, _, _ = reference
    longest = model.config.n_positions
    assert np.isfinite(model({"input_ids": np.full((1, longest), 5)})["sequence"]).all()
    with pytest.raises(ValueError, match="length 20 exceeds n_positions=19"):
        model({"input_ids": np.full((1, longest + 1), 5)})
    with pytest.raises(ValueError, match="21 tokens: this model has n_positions=19"):
        generate(model, np.full((1, 3), 5), max_new_tokens=19)


def test_a_cache_changes_nothing(reference):
    """A padded text read in three parts gives what it gives at once."""
    model, inputs, _ = reference
    whole = model(inputs)["token_logits"]
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    (B, L), parts = ids.shape, []
    cache = model.config.cache(B, L + 2, jnp.float32)
    forward = jax.jit(lambda model, batch: model.run(batch, Mode()))
    for start, end in ((0, 2), (2, 3), (3, L)):
        part = {"input_ids": ids[:, start:end], "attention_mask": mask[:, start:end]}
        out, state = forward(model.replace(variables={**model.variables, "cache": cache}), part)
        cache = state["cache"]
        parts.append(out["token_logits"])
    np.testing.assert_allclose(at_real(jnp.concatenate(parts, 1), inputs), at_real(whole, inputs), atol=1e-4)
    assert int(cache["filled"]) == L


def test_greedy_is_what_whole_forwards_give(reference):
    model, inputs, _ = reference
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    texts = [list(row[real == 1]) for row, real in zip(ids, mask, strict=True)]
    forward = jax.jit(lambda model, ids: model({"input_ids": ids})["token_logits"][0])
    for text in texts:
        for _ in range(6):
            padded = np.array([text + [0] * (19 - len(text))], np.int32)
            text.append(int(forward(model, padded)[len(text) - 1].argmax()))
    expected = [text[-6:] for text in texts]
    np.testing.assert_array_equal(generate(model, ids, mask, max_new_tokens=6), expected)


def test_bfloat16_and_dropout(reference):
    model, inputs, theirs = reference
    low = cast(model, jnp.bfloat16)(inputs)
    assert error(at_real(low["token_logits"], inputs), at_real(theirs["token_logits"], inputs)) < 0.1
    forward = jax.jit(
        lambda model, key, train: model(inputs, train=train, key=key)["sequence"], static_argnums=2
    )
    first, second = jax.random.split(jax.random.key(0))
    for rate in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        config = dataclasses.replace(model.config, **none | {rate: 0.5})
        own = model.replace(base=dataclasses.replace(model.base, module=GPT2.module(config)))
        np.testing.assert_array_equal(forward(own, first, False), forward(own, second, False))
        assert not np.array_equal(forward(own, first, True), forward(own, second, True)), rate


def test_what_the_techniques_find(reference, key):
    """Adapters, also by default, the student, layer-wise rates and the head; only the head's leaves are new."""
    model, inputs, _ = reference
    adapted = adapters.lora(model, rank=2, key=key)
    assert {path.rsplit("/lora/")[0] for path in flatten(adapted.params) if "/lora/" in path} == {
        f"decoder/layer_{i}/attention/query_key_value" for i in (0, 1)
    }
    np.testing.assert_array_equal(adapted(inputs)["token_logits"], model(inputs)["token_logits"])
    adapted = adapters.lora(model, rank=2, where=".*/(output|intermediate)|embeddings/word", key=key)
    moved = adapted.with_params(jax.tree.map(lambda x: x + 0.1, adapted.params))
    assert (
        error(adapters.merge(moved)(inputs)["token_logits"], np.asarray(moved(inputs)["token_logits"])) < 1e-4
    )
    student = distill.choose_layers(model, [1], stack="decoder/layer_")
    assert student.config.n_layer == 1
    kept = student.params["decoder"]["layer_0"]["mlp"]["output"]["kernel"]
    np.testing.assert_array_equal(kept, model.params["decoder"]["layer_1"]["mlp"]["output"]["kernel"])
    assert np.isfinite(student(inputs)["token_logits"]).all()
    depth = flatten(finetune.depths(model))
    assert depth["embeddings/word/embedding"] == depth["embeddings/position/embedding"] == 0
    assert depth["decoder/layer_0/mlp/output/kernel"] == 1 and depth["decoder/norm/scale"] == 2
    classifier = heads.classifier(model, 3, key=key)
    assert set(flatten(classifier.params)) - set(flatten(model.params)) == {"head/out/kernel"}
    assert classifier(inputs)["logits"].shape == (3, 3)


def test_the_loss_falls_where_it_is_followed(reference):
    model, inputs, _ = reference
    loss = jax.jit(lambda model: CausalLM()(model, inputs, jax.random.key(0))[0])  # with dropout
    value, slope = jax.value_and_grad(loss)(model)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(slope.params))
    assert float(loss(jax.tree.map(lambda x, g: x - 1e-2 * g, model, slope))) < float(value)


def test_saved_folders(reference, tmp_path, key):
    model, inputs, _ = reference
    for name, own in (("bare", model), ("task", heads.classifier(model, 3, key=key))):
        back = load(save(own, tmp_path / name))
        assert back.config == model.config
        assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (back, own)), strict=True))


@pytest.mark.parity
@pytest.mark.parametrize("seed", range(8))
def test_outputs_live(seed):
    rng = np.random.default_rng(seed)
    torch_model = build("gpt2", settings("gpt2", rng))
    written, weights = files(torch_model)
    inputs = batch("gpt2", written, rng, padded=seed % 3 > 0)
    compare(from_files("gpt2", written, weights), inputs, run("gpt2", torch_model, inputs))


@pytest.mark.parity
def test_gradients_live():
    import torch

    rng = np.random.default_rng(3)
    torch_model = build("gpt2", settings("gpt2", rng))
    written, weights = files(torch_model)
    model, inputs = from_files("gpt2", written, weights), batch("gpt2", written, rng, padded=False)
    weight = rng.normal(size=(*inputs["input_ids"].shape, 23)).astype(np.float32)
    logits = torch_model(input_ids=torch.tensor(inputs["input_ids"]).long()).logits
    (logits * torch.tensor(weight)).sum().backward()
    theirs = {name: value.grad for name, value in torch_model.named_parameters()}
    ours = flatten(jax.grad(lambda model: (model(inputs)["token_logits"] * weight).sum())(model).variables)
    for path, tensor in GPT2.tensors(model.config).items():
        found = tensor.layout.to_file(np.asarray(ours[path]))
        assert error(found, theirs[tensor.key].numpy()) < 1e-4, path


@pytest.mark.parity
@pytest.mark.parametrize("seed", range(3))
def test_transformers_opens_what_is_saved(seed, tmp_path):
    """The same outputs and the same greedy texts, padded on the left."""
    import torch
    import transformers

    rng = np.random.default_rng(seed)
    written, weights = files(build("gpt2", settings("gpt2", rng)))
    model = from_files("gpt2", written, weights)
    folder = save(model, tmp_path / "saved")
    back, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    inputs = batch("gpt2", written, rng)
    compare(model, inputs, run("gpt2", back.eval(), inputs))
    mask = np.sort(inputs["attention_mask"], 1)
    fields = {"input_ids": torch.tensor(inputs["input_ids"]).long(), "attention_mask": torch.tensor(mask)}
    settled = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = back.generate(**fields, max_new_tokens=9, **settled)[:, mask.shape[1] :].numpy()
    np.testing.assert_array_equal(
        generate(load(folder), inputs["input_ids"], mask, max_new_tokens=9), expected
    )


@pytest.mark.parity
@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:transformers")
def test_adapters_open_in_peft_and_come_back(method, reference, tmp_path, key):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model, inputs, _ = reference
    where = ".*/(query_key_value|mlp/output)"
    rank = {} if method == "ia3" else {"rank": 2}
    adapted = getattr(adapters, method)(model, where=where, key=key, **rank)

    def stirred(path, leaf):
        own = f"/{method}/" in path
        return leaf + 0.2 * jax.random.normal(fold_path(key, path), leaf.shape) if own else leaf

    adapted = adapted.with_params(map_with_path(stirred, adapted.params))
    folder = save(model, tmp_path / "base")
    peft.save(adapted, tmp_path / "adapter", base=str(folder))
    settled = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settled["fan_in_fan_out"]  # or PEFT warns
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder), str(tmp_path / "adapter")
    ).eval()
    ids = inputs["input_ids"]
    with torch.no_grad():
        found = theirs(input_ids=torch.tensor(ids).long()).logits.numpy()
    expected = np.asarray(adapted({"input_ids": ids})["token_logits"])
    assert error(found, expected) < 1e-4
    back = peft.load(load(folder), tmp_path / "adapter")
    assert error(back({"input_ids": ids})["token_logits"], expected) < 1e-5
    assert error(load(folder)({"input_ids": ids})["token_logits"], expected) > 1e-2
