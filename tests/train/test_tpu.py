"""Train steps compile for a real TPU topology; their memory per chip is printed at the end of the test run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jtl import adapters, finetune, heads, sharding, tree
from jtl.model import Linen, Model, cast
from jtl.models import ARCHITECTURES
from jtl.tasks import CausalLM, Classify
from jtl.train import accumulate, make_step

pytestmark = pytest.mark.tpu
CHIP = 16 * 2**30  # bytes of a v5e chip
SPARE = 32 * 2**20  # for a batch, and for what a program adds


# Two layers of MiniLM, and of a ViT of its width, show all that six do; `minilm` and Lite0 are whole.
SMALL = {"hidden_size": 384, "num_hidden_layers": 2, "intermediate_size": 1536}
SIZES = {
    "bert": ("bert", SMALL),
    "vit": ("vit", {**SMALL, "num_attention_heads": 6}),
    "minilm": ("bert", {**SMALL, "num_hidden_layers": 6}),
    "efficientnet-lite0": ("efficientnet_lite", {}),
    # A layer of SmolLM2, with all of its vocabulary.
    "smollm2": ("llama", {"vocab_size": 49152, "hidden_size": 576, "num_hidden_layers": 1, "num_attention_heads": 9,
                          "num_key_value_heads": 3, "intermediate_size": 1536, "tie_word_embeddings": True}),
}  # fmt: skip


def real_size(name, classes=None, **smaller):
    """A model, with a head if it has classes: shapes alone."""
    kind, sizes = SIZES[name]
    sizes = {**sizes, **smaller}
    architecture = ARCHITECTURES[kind]
    config = architecture.config(**sizes)
    example = jax.tree.map(jnp.asarray, architecture.example(config))

    def build(key):
        variables = architecture.module(config).init(key, **example)
        model = Model(dict(variables), Linen(architecture.module(config)), (), config)
        return model if classes is None else heads.classifier(model, classes, key=key)

    return jax.eval_shape(build, jax.random.key(0)), example


def batch_of(example, rows, length=128):
    def shape(x):
        rest = x.shape[1:] if x.ndim > 2 else (length,)
        return jax.ShapeDtypeStruct((rows, *rest), x.dtype)

    return {**jax.tree.map(shape, example), "label": jax.ShapeDtypeStruct((rows,), jnp.int32)}


STEPS = {
    "full": ([(".*", 1.0)], {}),
    "head": ([("head/.*", 1.0), (".*", 0.0)], {}),
    "sharded": ([(".*", 1.0)], {"sharding": sharding.FULLY_SHARDED}),
    "accumulated": ([(".*", 1.0)], {"gradient": accumulate(2)}),
    "bfloat16": ([(".*", 1.0)], {}),
    "lora": ([(".*/lora/.*|head/.*", 1.0), (".*", 0.0)], {}),
}


CASES = [("bert", "full")]
# Each compiles for half a minute or more.
LONGER = [("bert", step) for step in STEPS if step != "full"] + [
    ("vit", "sharded"),
    ("minilm", "full"),
    ("efficientnet-lite0", "full"),
]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in LONGER]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "step"), CASES)
def test_a_step_fits_a_v5e_slice(name, step, slice_2x2, record_property):
    model, example = real_size(name, classes=10)
    model = cast(model, jnp.bfloat16) if step == "bfloat16" else model
    if step == "lora":
        model = jax.eval_shape(lambda model: adapters.lora(model, key=jax.random.key(0)), model)
    rules, options = STEPS[step]
    compiled = (
        make_step(Classify(), optax.adamw(1e-4), tree.assign(rules, model.params), mesh=slice_2x2, **options)
        .lower(model, batch_of(example, rows=32))
        .compile()
    )
    held = check(compiled, f"{name} {step}", record_property)
    weights = 4 * tree.size(model.params)
    # AdamW holds two more arrays for each that trains; a sharded chip a quarter of all.
    share = {"sharded": 3 / 4 * 1.2, "head": 1.1, "lora": 1.1, "bfloat16": 3}.get(step, 3)
    assert held < share * weights + SPARE


@pytest.mark.slow
def test_a_language_model_fits_a_v5e_slice(slice_2x2, record_property):
    """In bfloat16, its weights spread over the chips."""
    model, example = real_size("smollm2")
    batch = batch_of(example, rows=32)
    del batch["label"]
    step = make_step(
        CausalLM(), optax.adamw(1e-4), None, mesh=slice_2x2, sharding=sharding.FULLY_SHARDED
    ).lower(cast(model, jnp.bfloat16), batch)
    held = check(step.compile(), "smollm2 causal", record_property)
    assert held < 3 / 4 * 1.2 * 4 * tree.size(model.params) + SPARE


def check(compiled, name, record_property):
    """Fits a chip and sums over chips; notes its memory, and returns the bytes of its arguments."""
    memory = compiled.memory_analysis()
    # What is donated is counted as argument and as output; it is there once.
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    record_property("memory", f"v5e:2x2 {name}: {peak / 2**20:,.0f} MiB a chip")
    assert peak < CHIP
    text = compiled.as_text()
    assert "all-reduce" in text or "reduce-scatter" in text, "the gradient is not summed over chips"
    assert np.isfinite(compiled.cost_analysis()["flops"])
    return memory.argument_size_in_bytes


def l2_sp(model):
    return Classify() + finetune.L2SP(model.params, alpha=0.01, beta=0.01)


def ewc(model):
    return Classify() + finetune.EWC(model.params, model.params, strength=1.0)


ADAPTERS = (
    "dora", "vera", "adalora", "loha", "lokr", "ia3", "bottleneck", "loreft", "prompt", "prefix",
)  # fmt: skip
LABELS = {
    "layerwise": lambda model: finetune.layerwise(model, 0.8),
    "gradual": lambda model: finetune.gradual_unfreezing(model, every=10),
    "bitfit": lambda model: finetune.train_only(model, ".*/bias|head/.*"),
}


@pytest.mark.slow
@pytest.mark.parametrize("technique", [*ADAPTERS, *LABELS, "l2_sp", "ewc"])
def test_every_technique_compiles(technique, slice_2x2, record_property):
    """One narrow layer of BERT: what differs between the techniques does not depend on its size."""
    narrow = {"hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 256}
    model, example = real_size("bert", 10, **narrow)
    labels = LABELS[technique](model) if technique in LABELS else None
    loss = {"l2_sp": l2_sp, "ewc": ewc}.get(technique, lambda _: Classify())(model)
    if technique in ADAPTERS:
        insert = getattr(adapters, technique)
        model = jax.eval_shape(lambda model: insert(model, key=jax.random.key(0)), model)
        labels = finetune.train_only(model, f"(.*/)?{technique}/.*|head/.*")
    step = make_step(loss, optax.adamw(1e-4), labels, mesh=slice_2x2)
    compiled = step.lower(model, batch_of(example, rows=8)).compile()
    held = check(compiled, f"one layer, {technique}", record_property)
    weights = 4 * tree.size(model.variables)
    copies = 5 if technique == "ewc" else 4 if technique == "l2_sp" else 1.5 if technique in ADAPTERS else 3
    assert held < copies * weights + 2**20
