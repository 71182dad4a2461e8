"""Every train step compiles for a real TPU topology; its memory per chip is printed and must fit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jtl import adapters, heads, tree
from jtl.model import Linen, Model, cast
from jtl.models import ARCHITECTURES
from jtl.tasks import Classify
from jtl.train import accumulate, make_step, mesh

pytestmark = [
    pytest.mark.tpu,
    pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache"),
]
CHIP = 16 * 2**30  # bytes of a v5e chip


@pytest.fixture(scope="module")
def slice_2x2():
    pytest.importorskip("libtpu", reason="pip install -r requirements-tpu.txt")
    from jax.experimental import topologies

    # A program for absent chips cannot be read back from the cache.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
    yield mesh.make_mesh(topologies.get_topology_desc("v5e:2x2", "tpu").devices)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


# Two layers of MiniLM, and of a ViT of its width, show all that six do; `minilm` and Lite0 are whole.
SMALL = {"hidden_size": 384, "num_hidden_layers": 2, "intermediate_size": 1536}
SIZES = {
    "bert": ("bert", SMALL),
    "vit": ("vit", {**SMALL, "num_attention_heads": 6}),
    "minilm": ("bert", {**SMALL, "num_hidden_layers": 6}),
    "efficientnet-lite0": ("efficientnet_lite", {}),
}


def real_size(name, classes):
    """A model with a head: shapes alone."""
    kind, sizes = SIZES[name]
    architecture = ARCHITECTURES[kind]
    config = architecture.config(**sizes)
    example = jax.tree.map(jnp.asarray, architecture.example(config))

    def build(key):
        variables = architecture.module(config).init(key, **example)
        return heads.classifier(
            Model(dict(variables), Linen(architecture.module(config)), (), config), classes, key=key
        )

    return jax.eval_shape(build, jax.random.key(0)), example


def batch_of(example, rows, length=128):
    def shape(x):
        rest = x.shape[1:] if x.ndim > 2 else (length,)
        return jax.ShapeDtypeStruct((rows, *rest), x.dtype)

    return {**jax.tree.map(shape, example), "label": jax.ShapeDtypeStruct((rows,), jnp.int32)}


STEPS = {
    "full": ([(".*", 1.0)], {}),
    "head": ([("head/.*", 1.0), (".*", 0.0)], {}),
    "sharded": ([(".*", 1.0)], {"sharding": mesh.FULLY_SHARDED}),
    "accumulated": ([(".*", 1.0)], {"gradient": accumulate(2)}),
    "bfloat16": ([(".*", 1.0)], {}),
    "lora": ([(".*/lora/.*|head/.*", 1.0), (".*", 0.0)], {}),
}


CASES = [("bert", step) for step in STEPS] + [("vit", "sharded")]
# Their compilation takes minutes.
CASES += [pytest.param(name, "full", marks=pytest.mark.slow) for name in ("minilm", "efficientnet-lite0")]


@pytest.mark.parametrize(("name", "step"), CASES)
def test_a_step_fits_a_v5e_slice(name, step, slice_2x2, capsys):
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
    memory = compiled.memory_analysis()
    # What is donated is counted as argument and as output; it is there once.
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    with capsys.disabled():
        print(f"\n  v5e:2x2 {name} {step}: {peak / 2**20:,.0f} MiB a chip", end="")
    assert peak < CHIP
    text = compiled.as_text()
    assert "all-reduce" in text or "reduce-scatter" in text, "the gradient is not summed over chips"
    weights = 4 * tree.size(model.params)
    if step == "sharded":
        assert memory.argument_size_in_bytes < 3 * weights / 4 * 1.2 + 32 * 2**20
    elif step in ("head", "lora"):
        assert memory.argument_size_in_bytes < 1.1 * weights + 32 * 2**20
    assert np.isfinite(compiled.cost_analysis()["flops"])
