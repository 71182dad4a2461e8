"""A step of a third column compiles for a real TPU topology, its rows split over the chips."""

import jax
import optax
import pytest
from progressive_models import MODELS, WHERE, batch_of

from jtl import progressive
from jtl.tasks import Classify
from jtl.train import make_step

pytestmark = pytest.mark.tpu


@pytest.mark.parametrize("kind", ["conv4", "bert"])
def test_a_third_column(slice_2x2, kind):
    batch = batch_of(kind)

    def build(key):
        model = MODELS[kind](key)
        for _ in range(2):
            model = progressive.grow(model, where=WHERE[kind], batch=batch, key=key)
        return model

    model = jax.eval_shape(build, jax.random.key(0))
    stats = "batch" if "batch_stats" in model.variables else "running"
    labels = progressive.labels(model)
    step = make_step(Classify(stats=stats), optax.adam(1e-3), labels, mesh=slice_2x2)
    text = step.lower(model, batch).compile().as_text()
    # Chips meet in sums over rows alone: no chip sees another's.
    assert "all-reduce" in text
    assert not any(name in text for name in ("all-gather", "all-to-all", "collective-permute"))
