"""Stacked layers: the numbers of the unrolled form, in a program whose size does not grow with depth."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from references import read
from support import error, from_files

from jtl import adapters, finetune, heads, load, save
from jtl.model import linen, with_base
from jtl.models import ARCHITECTURES
from jtl.models.bert import Bert, BertConfig
from jtl.models.gpt2 import GPT2Config
from jtl.models.llama_config import LlamaConfig
from jtl.models.parts.scan import stack, stacked, unstack, unstacked
from jtl.models.t5_config import T5Config
from jtl.tasks import CausalLM, beam_search, generate
from jtl.train import make_step
from jtl.tree import flatten

NAMES = ("llama", "qwen2", "gpt2", "t5")  # Qwen2's layers have windows, or none; GPT-2's scales of their own


@pytest.fixture(scope="module")
def models():
    found = {}
    for name in NAMES:
        config, weights, inputs, _ = read(name)
        model = from_files(name, config, weights)
        if name == "gpt2":
            config = dataclasses.replace(model.config, scale_attn_by_inverse_layer_idx=True)
            model = with_base(model.replace(config=config), module=model.base.module.clone(config=config))
        found[name] = (model, inputs)
    assert len({found["qwen2"][0].config.window(i) for i in range(2)}) == 2
    return found


def equal(first, second):
    first, second = flatten(first), flatten(second)
    assert first.keys() == second.keys()
    for path, leaf in first.items():
        np.testing.assert_array_equal(leaf, second[path], err_msg=path)


@pytest.mark.parametrize("name", NAMES)
def test_same_outputs_and_gradients(name, models):
    model, inputs = models[name]
    deep = stack(model)
    assert deep.config.scan_layers and stack(deep) is deep and unstack(model) is model
    assert not any("layer_" in path for path in flatten(deep.params))
    equal(unstack(deep).variables, model.variables)
    assert unstack(deep).config == model.config and unstack(deep).base == model.base
    names = tuple(f"decoder/layer_{i}/mlp" for i in range(2))

    def loss(model, taps):
        out = model(inputs, taps=taps)
        return jnp.square(out["token_logits"]).sum(), (out["token_logits"], out["taps"])

    value = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    (_, (logits, taps)), slope = value(model, names)
    (_, (deep_logits, deep_taps)), deep_slope = value(deep, ("decoder/layers/mlp",))
    assert error(deep_logits, np.asarray(logits)) < 1e-5
    assert error(deep_taps["decoder/layers/mlp"], np.stack([taps[name] for name in names])) < 1e-5
    for path, leaf in flatten(unstacked(deep_slope.params)).items():
        expected = np.asarray(flatten(slope.params)[path])
        np.testing.assert_allclose(leaf, expected, atol=1e-4 * max(1, np.abs(expected).max()), err_msg=path)


@pytest.mark.parametrize("name", NAMES)
def test_same_texts(name, models):
    """With a cache, greedy and of beams."""
    model, inputs = models[name]
    encoder = None if name != "t5" else {key: inputs[key] for key in ("input_ids", "attention_mask")}
    prompts = (None, None) if encoder else (inputs["input_ids"], inputs["attention_mask"])
    for way in (generate, lambda *args, **options: beam_search(*args, **options, beams=3).tokens):
        own, deep = (way(m, *prompts, max_new_tokens=5, encoder=encoder) for m in (model, stack(model)))
        np.testing.assert_array_equal(own, deep)


DEEP = {
    "llama": (
        LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_attention_heads=2),
        ("num_hidden_layers",),
    ),
    "gpt2": (
        GPT2Config(vocab_size=9, n_positions=8, n_embd=8, n_head=2, scale_attn_by_inverse_layer_idx=True),
        ("n_layer",),
    ),
    "t5": (
        T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_heads=2, num_decoder_layers=2),
        ("num_layers", "num_decoder_layers"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DEEP)
def test_the_program_does_not_grow_with_depth(name):
    """Of a gradient, as it is lowered; unrolled it does."""
    config, fields = DEEP[name]
    architecture = ARCHITECTURES[name]

    def size(layers, scan):
        depths = dict.fromkeys(fields, layers)
        module = architecture.module(dataclasses.replace(config, **depths, scan_layers=scan))
        batch = jax.tree.map(jnp.asarray, architecture.example(config))
        variables = jax.eval_shape(lambda: module.init(jax.random.key(0), **batch))
        loss = lambda variables: module.apply(variables, **batch)["token_logits"].sum()  # noqa: E731
        return len(jax.jit(jax.grad(loss)).lower(variables).as_text())

    assert size(24, True) < 1.05 * size(3, True)
    assert size(9, False) > 2 * size(3, False)


@pytest.mark.slow
def test_lora_on_stacked_kernels(models, key):
    """Each layer has factors of its own; trained, merged and unrolled they are those of the unrolled model."""
    model, inputs = models["llama"]
    where = ".*/(query|value|output)"
    adapted = adapters.lora(stack(model), rank=2, where=where, key=key)
    a = adapted.params["decoder"]["layers"]["attention"]["query"]["lora"]["a"]
    assert a.shape == (2, model.config.hidden_size, 2) and not np.array_equal(a[0], a[1])
    np.testing.assert_allclose(
        adapted(inputs)["token_logits"], stack(model)(inputs)["token_logits"], atol=1e-5
    )
    # The same factors in the unrolled model.
    plain = adapters.lora(model, rank=2, where=where, key=key)
    plain = plain.with_params(unstacked(adapted.params))
    trained = []
    for own in (adapted, plain):
        step = make_step(CausalLM(), optax.sgd(0.1), finetune.train_only(own, ".*/lora/.*"))
        state, _ = step(step.init(own, key), inputs)
        state, _ = step(state, inputs)
        trained.append(state.model)
    before, after = flatten(adapted.params), flatten(trained[0].params)
    assert all(np.array_equal(before[path], after[path]) == ("/lora/" not in path) for path in before)
    for path, leaf in flatten(unstacked(trained[0].params)).items():
        np.testing.assert_allclose(leaf, flatten(trained[1].params)[path], atol=1e-5, err_msg=path)
    merged = adapters.merge(trained[0])
    assert (
        error(unstack(merged)(inputs)["token_logits"], np.asarray(trained[0](inputs)["token_logits"])) < 1e-4
    )


def test_saved_folders_are_those_of_the_unrolled_form(models, tmp_path, key):
    model, _ = models["gpt2"]
    classifier = heads.classifier(stack(model), 3, key=key)
    back = load(save(classifier, tmp_path / "model"))
    assert not back.config.scan_layers
    equal(back.variables, unstack(classifier).variables)


def test_any_tree():
    """Stacks inside stacks of other names, and leaves outside."""
    leaves = {
        "a": {f"layer_{i}": {"w": jnp.full(2, i), "layer": jnp.ones(1)} for i in range(11)},
        "layer_norm": jnp.ones(3),
    }
    found = stacked(leaves)
    assert found["a"]["layers"]["w"][:, 0].tolist() == list(range(11))  # not 0, 1, 10, 2, ...
    equal(unstacked(found), leaves)


def test_errors(models, key):
    with pytest.raises(
        ValueError, match=r"layers/w: .* not alike .* 2 of 2 have this leaf, of the shapes .*\(1,\)"
    ):
        stacked({"layer_0": {"w": jnp.ones(1)}, "layer_1": {"w": jnp.ones(2)}})
    with pytest.raises(ValueError, match="layers/w: .* 1 of 2 have this leaf"):
        stacked({"layer_0": {"w": jnp.ones(1)}, "layer_1": {"v": jnp.ones(1)}})
    module = Bert(BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1))
    with pytest.raises(ValueError, match="the layers of bert cannot be stacked"):
        stack(linen(module, {"params": {}}).replace(config=module.config))
    model, _ = models["llama"]
    with pytest.raises(ValueError, match=r"\['Adapter'\] in it, which name layers"):
        stack(adapters.lora(model, rank=2, key=key))
    with pytest.raises(ValueError, match="no numbered layers"):
        finetune.layerwise(stack(model), 0.5)
