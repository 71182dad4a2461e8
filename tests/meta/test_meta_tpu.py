"""A meta-training step compiles for a real TPU topology, its tasks split over the chips."""

import jax
import jax.numpy as jnp
import optax
import pytest

from jtl import heads, meta
from jtl.meta.patch_convolution import PatchConv4
from jtl.model import linen
from jtl.tasks import Classify
from jtl.train import make_step

pytestmark = pytest.mark.tpu


@pytest.mark.slow
def test_maml_of_conv4(slice_2x2):
    def build(key):
        model = linen(PatchConv4(), PatchConv4().init(key, jnp.zeros((1, 28, 28, 1))))
        return heads.classifier(model, 5, key=key, on="features", width=64)

    model = jax.eval_shape(build, jax.random.key(0))

    def part(rows):
        return {
            "image": jax.ShapeDtypeStruct((32, rows, 28, 28, 1), jnp.float32),
            "label": jax.ShapeDtypeStruct((32, rows), jnp.int32),
        }

    gradient = meta.maml(steps=2, rate=0.4)
    step = make_step(Classify(stats="batch"), optax.adam(1e-3), gradient=gradient, mesh=slice_2x2)
    compiled = step.lower(model, {"support": part(5), "query": part(25)}).compile()
    memory = compiled.memory_analysis().temp_size_in_bytes
    print(f"Conv4, 32 tasks of 5-way 1-shot, 2 inner steps: {memory / 2**20:.0f} MiB a chip")
    assert memory < 16 * 2**30
    # Chips meet in the mean over tasks alone: no chip sees another's tasks.
    text = compiled.as_text()
    assert "all-reduce" in text
    assert not any(name in text for name in ("all-gather", "all-to-all", "collective-permute"))
