"""N runs in one program give what each gives alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jtl import adapters, finetune, tree
from jtl import model as models
from jtl.loss import Loss
from jtl.train import adamw, make_step, run_of, schedule, sweep


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(8, name="first")(x))
        return nn.Dense(3, name="second")(x)


class Fit(Loss):
    def value(self, model, outputs, batch, key):
        return jnp.square(outputs["features"] - batch["y"]).mean(), {}


X = jax.random.normal(jax.random.key(1), (6, 4))
BATCH = {"x": X, "y": X[:, :3]}
RATES = (1e-2, 3e-2, 1e-1)


@pytest.fixture
def runs():
    plain = models.linen(Net(), Net().init(jax.random.key(0), X))
    return [
        adapters.lora(plain, rank=2, where="first|second", key=jax.random.key(i), batch=BATCH)
        for i in range(3)
    ]


def step_at(model, rate):
    labels = finetune.train_only(model, ".*/lora/.*")
    return make_step(Fit(), adamw(schedule(rate, 10)), labels)


@pytest.mark.parametrize("own_batches", [False, True])
def test_each_run_is_that_run_alone(runs, own_batches):
    keys = jax.random.split(jax.random.key(5), 3)
    batches = [{"x": X + i * own_batches, "y": BATCH["y"]} for i in range(3)]
    together = sweep(step_at(runs[0], 1.0), own_batches=own_batches)
    state = together.init(runs, keys, RATES)
    batch = jax.tree.map(lambda *rows: jnp.stack(rows), *batches) if own_batches else batches[0]
    for _ in range(4):
        state, metrics = together(state, batch)
    assert metrics["loss"].shape == (3,)
    for i, (model, rate) in enumerate(zip(runs, RATES, strict=True)):
        step = step_at(model, rate)
        alone = step.init(model, keys[i])
        for _ in range(4):
            alone, own = step(alone, batches[i])
        np.testing.assert_allclose(metrics["loss"][i], own["loss"], rtol=1e-5)
        found = tree.flatten(run_of(state, i).model.params)
        for path, leaf in tree.flatten(alone.model.params).items():
            np.testing.assert_allclose(found[path], leaf, atol=1e-5, err_msg=path)


def test_what_cannot_run_together(runs):
    keys = jax.random.split(jax.random.key(5), 3)
    together = sweep(step_at(runs[0], 1.0))
    with pytest.raises(ValueError, match="3 models, 3 keys and 2 rates: one of each"):
        together.init(runs, keys, RATES[:2])
    other = runs[1].with_params(tree.overlay(runs[1].params, {"first": {"bias": jnp.ones(8)}}, replace=True))
    with pytest.raises(
        ValueError, match="model 1 differs from model 0 in 1 frozen leaves, such as 'first/bias'"
    ):
        together.init([runs[0], other, runs[2]], keys)
    constant = make_step(Fit(), optax.adam(1e-2), finetune.train_only(runs[0], ".*/lora/.*"))
    with pytest.raises(ValueError, match="rates need an optimiser whose peak is part of its state"):
        sweep(constant).init(runs, keys, RATES)
