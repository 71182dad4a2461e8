"""Llama, Mistral, Qwen2 and Qwen3: against committed outputs of `transformers`, NumPy, and by gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import read
from support import error, from_files, outputs, shapes

from experiments.models.random_models import DECODERS, batch, build, files, run, settings
from jtl import adapters, distill, finetune, heads
from jtl.model import Mode, cast, with_base
from jtl.models import ARCHITECTURES
from jtl.models.parts.rope import Linear, Llama3, frequencies
from jtl.tasks import CausalLM
from jtl.tree import flatten


def reference(name):
    config, weights, inputs, theirs = read(name)
    return from_files(name, config, weights), inputs, theirs


@pytest.fixture(scope="module")
def llama():
    return reference("llama")


def at_real(value, inputs):
    """Zero at padding, where outputs mean nothing."""
    return np.asarray(value) * inputs.get("attention_mask", np.ones(inputs["input_ids"].shape))[..., None]


def compare(model, inputs, theirs):
    for output, value in outputs(model, inputs, theirs).items():
        assert error(at_real(value, inputs), at_real(theirs[output], inputs)) < 1e-4, output


@pytest.mark.parametrize("name", DECODERS)
def test_committed_outputs(name):
    compare(*reference(name))


@pytest.mark.parametrize("name", DECODERS)
def test_name_map_and_config(name):
    for seed in range(4):
        config = settings(name, np.random.default_rng(seed)) | {"model_type": name}
        config = ARCHITECTURES[name].config.from_hf(config)
        tensors = ARCHITECTURES[name].tensors(config)
        assert set(tensors) == set(shapes(ARCHITECTURES[name], config))
        assert len({tensor.key for tensor in tensors.values()}) == len(tensors)
        assert ARCHITECTURES[name].config.from_hf(config.to_hf()) == config
        assert hash(config) == hash(dataclasses.replace(config))


def test_grouped_queries_against_numpy(llama):
    """One layer's attention of a padded text, with its two heads of keys for four of queries."""
    model, inputs, _ = llama
    c, row = model.config, 1  # padded on the left
    assert (c.groups, c.num_attention_heads) == (2, 4) and c.window(0) is None
    leaves = {k: np.asarray(v, np.float64) for k, v in flatten(model.params).items()}
    mask, ids = inputs["attention_mask"][row], inputs["input_ids"][row]
    at, E = "decoder/layer_0/attention", c.per_head

    def normed(x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.rms_norm_eps)

    x = normed(leaves["embeddings/word/embedding"][ids]) * leaves["decoder/layer_0/attention_norm/scale"]

    def heads_of(name, turned):
        y = x @ leaves[f"{at}/{name}/kernel"] + leaves.get(f"{at}/{name}/bias", 0.0)
        y = y.reshape(len(ids), -1, E)
        if not turned:
            return y
        position = np.cumsum(mask) - 1
        turn = np.exp(
            1j * position[:, None] * frequencies(E, c.rope_theta, c.rope_scaling).astype(np.float64)
        )
        z = (y[..., : E // 2] + 1j * y[..., E // 2 :]) * turn[:, None]
        return np.concatenate([z.real, z.imag], -1)

    q, k, v = heads_of("query", True), heads_of("key", True), heads_of("value", False)
    out = np.zeros(q.shape)
    for head in range(4):
        for t in np.flatnonzero(mask):
            seen = [s for s in range(t + 1) if mask[s]]
            logits = np.array([q[t, head] @ k[s, head // 2] for s in seen]) / np.sqrt(E)
            weights = np.exp(logits - logits.max())
            out[t, head] = weights / weights.sum() @ v[seen, head // 2]
    expected = out.reshape(len(ids), -1) @ leaves[f"{at}/output/kernel"] + leaves.get(
        f"{at}/output/bias", 0.0
    )
    found = model(inputs, taps=(at,))["taps"][at][row]
    np.testing.assert_allclose(found[mask == 1], expected[mask == 1], atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_what_a_token_sees(name):
    """Itself and those before it, in Mistral's one layer no further than its window; no padding."""
    model, inputs, _ = reference(name)
    if name == "mistral":
        model = distill.choose_layers(model, [0], stack="decoder/layer_")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    table = model.params["embeddings"]["word"]["embedding"]
    B, L = ids.shape
    module = model.base.module.clone(config=dataclasses.replace(model.config, vocab_size=B * L))
    wide = with_base(model, module=module)

    def states(x):
        """Of one embedding a position: ids that name rows of a table of their own."""
        params = {**model.params, "embeddings": {"word": {"embedding": x.reshape(B * L, -1)}}}
        places = {"input_ids": jnp.arange(B * L).reshape(B, L), "attention_mask": mask}
        return wide.with_params(params)(places)["sequence"]

    x = table[ids]
    moved = jax.jit(jax.jacrev(lambda x: (states(x) ** 2).sum(-1)))(x)  # (B, L, B, L, D)
    sees = np.abs(np.stack([moved[b, :, b] for b in range(B)])).max(-1) > 0
    query, key = np.arange(L)[:, None], np.arange(L)
    near = query - key < (3 if name == "mistral" else L)
    expected = (key <= query) & near & (mask[:, None, :] != 0)
    np.testing.assert_array_equal(sees[mask != 0], expected[mask != 0])
    assert not any(np.abs(moved[b, :, other]).max() for b in range(B) for other in range(B) if other != b)


def test_features_are_those_of_the_last_real_token(llama):
    model, inputs, _ = llama
    out = model(inputs)
    last = [np.flatnonzero(row)[-1] for row in inputs["attention_mask"]]
    np.testing.assert_array_equal(out["features"], out["sequence"][np.arange(len(last)), last])
    empty = model(inputs | {"attention_mask": np.zeros_like(inputs["attention_mask"])})
    assert np.isfinite(empty["features"]).all()


@pytest.mark.parametrize("name", DECODERS)
def test_a_cache_changes_nothing(name):
    """A padded text read in three parts gives what it gives at once."""
    model, inputs, _ = reference(name)
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


def test_frequencies():
    plain = frequencies(8, 10000.0, None)
    np.testing.assert_allclose(plain, [1, 0.1, 0.01, 0.001], rtol=1e-6)
    np.testing.assert_allclose(frequencies(8, 10000.0, Linear(4.0)), plain / 4, rtol=1e-6)
    # Wavelengths of 6.3, 63, 628 and 6283 positions; 1 to 4 periods in 512 are in between.
    llama3 = frequencies(8, 10000.0, Llama3(8.0, 1.0, 4.0, 512))
    np.testing.assert_allclose(llama3, plain / [1, 1, 8, 8], rtol=1e-6)
    between = frequencies(8, 10000.0, Llama3(8.0, 0.5, 2.0, 512))[2]
    share = (512 * 0.01 / (2 * np.pi) - 0.5) / 1.5
    np.testing.assert_allclose(between, (1 - share) * 0.01 / 8 + share * 0.01, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama", {"hidden_size": 10, "num_attention_heads": 3}, "not a multiple"),
        ("llama", {"num_key_value_heads": 5}, "not a multiple of num_key_value_heads=5"),
        ("llama", {"head_dim": 3}, "must be even, got 3"),
        ("llama", {"hidden_act": "gelo"}, "did you mean.*gelu"),
        (
            "llama",
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_type='dynamic' is not supported",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}},
            "'llama3' lacks low_freq_factor",
        ),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "'linear' lacks factor"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout=0.1 is not supported"),
        ("llama", {"sliding_window": 7}, "sliding_window=7 is not supported for llama"),
        ("mistral", {"model_type": "llama"}, "'llama', expected 'mistral'"),
        ("qwen2", {"use_sliding_window": True, "layer_types": ["full_attention"]}, "names 1 layers"),
        ("qwen3", {"use_sliding_window": True, "layer_types": ["chunked"] * 32}, "layer_types has .*chunked"),
    ],
)
def test_unsupported_settings_are_refused(name, change, message):
    with pytest.raises(ValueError, match=message):
        ARCHITECTURES[name].config.from_hf({"model_type": name} | change)


def test_bfloat16(llama):
    model, inputs, theirs = llama
    low = cast(model, jnp.bfloat16)(inputs)
    for output in ("sequence", "token_logits"):
        assert error(at_real(low[output], inputs), at_real(theirs[output], inputs)) < 0.1


def test_what_the_techniques_find(llama, key):
    """Adapters, the student, layer-wise rates and the head know the paths; only the head's leaves are new."""
    model, inputs, _ = llama
    adapted = adapters.lora(model, rank=2, where=".*/(query|value)|embeddings/word", key=key)
    np.testing.assert_array_equal(adapted(inputs)["token_logits"], model(inputs)["token_logits"])
    moved = adapted.with_params(jax.tree.map(lambda x: x + 0.1, adapted.params))
    merged = adapters.merge(moved)
    # The table is tied: both of its uses see the adapter.
    assert error(merged(inputs)["token_logits"], np.asarray(moved(inputs)["token_logits"])) < 1e-4
    student = distill.choose_layers(model, [1], stack="decoder/layer_")
    assert student.config.num_hidden_layers == 1
    kept = student.params["decoder"]["layer_0"]["mlp"]["gate"]["kernel"]
    np.testing.assert_array_equal(kept, model.params["decoder"]["layer_1"]["mlp"]["gate"]["kernel"])
    assert np.isfinite(student(inputs)["token_logits"]).all()
    depth = flatten(finetune.depths(model))
    assert depth["embeddings/word/embedding"] == 0 and depth["decoder/norm/scale"] == 2
    assert depth["decoder/layer_0/mlp/output/kernel"] == 1
    classifier = heads.classifier(model, 3, key=key)
    assert set(flatten(classifier.params)) - set(flatten(model.params)) == {"head/out/kernel"}
    assert classifier(inputs)["logits"].shape == (3, 3)
    with pytest.raises(adapters.SiteError, match="prompt tuning needs"):
        adapters.prompt(model, length=2, key=key)
    with pytest.raises(adapters.SiteError, match="prefix tuning needs"):
        adapters.prefix(model, length=2, key=key)


def test_the_loss_falls_where_it_is_followed(llama):
    model, inputs, _ = llama
    value, slope = jax.jit(jax.value_and_grad(lambda m: CausalLM()(m, inputs, None)[0]))(model)
    assert all(
        np.abs(leaf).max() > 0 for path, leaf in flatten(slope.params).items() if "key/bias" not in path
    )
    lower = CausalLM()(jax.tree.map(lambda x, g: x - 1e-2 * g, model, slope), inputs, None)[0]
    assert float(lower) < float(value)


@pytest.mark.parity
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", DECODERS)
def test_outputs_live(name, seed):
    rng = np.random.default_rng(seed)
    config = settings(name, rng)
    torch_model = build(name, config)
    written, weights = files(torch_model)
    inputs = batch(name, written, rng, padded=seed % 3 > 0)
    compare(from_files(name, written, weights), inputs, run(name, torch_model, inputs))


@pytest.mark.parity
@pytest.mark.parametrize("name", DECODERS)
def test_gradients_live(name):
    import torch

    rng = np.random.default_rng(3)
    torch_model = build(name, settings(name, rng))
    written, weights = files(torch_model)
    model = from_files(name, written, weights)
    inputs = batch(name, written, rng)
    shape = (*inputs["input_ids"].shape, model.config.vocab_size)
    weight = (inputs["attention_mask"][..., None] * rng.normal(size=shape)).astype(np.float32)
    logits = torch_model(**{key: torch.tensor(value).long() for key, value in inputs.items()}).logits
    (logits * torch.tensor(weight)).sum().backward()
    theirs = {key: value.grad for key, value in torch_model.named_parameters()}
    ours = flatten(jax.grad(lambda model: (model(inputs)["token_logits"] * weight).sum())(model).variables)
    for path, tensor in ARCHITECTURES[name].tensors(model.config).items():
        found = tensor.layout.to_file(np.asarray(ours[path]))
        scale = max(1.0, float(theirs[tensor.key].abs().max()))  # that of a key's bias is 0 but for rotation
        assert np.abs(found - theirs[tensor.key].numpy()).max() < 1e-4 * scale, path
