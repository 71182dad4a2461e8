"""Schedules and AdamW against their formulas in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jtl import tree
from jtl.train import adamw, schedule
from jtl.train.schedule import decays

SHAPES = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: 0.5 * (1 + np.cos(np.pi * x)),
    "constant": lambda x: 1.0,
}


@pytest.mark.parametrize("decay", SHAPES)
@pytest.mark.parametrize("warmup", [0.0, 0.25])
def test_schedule_is_its_formula(decay, warmup):
    steps, peak = 40, 3e-4
    rising = round(warmup * steps)
    rate = schedule(peak, steps, warmup=warmup, decay=decay)
    for t in range(steps + 1):
        expected = peak * (t / rising if t < rising else SHAPES[decay]((t - rising) / (steps - rising)))
        assert float(rate(t)) == pytest.approx(expected, rel=1e-4, abs=1e-10)


def test_schedule_ends_where_asked_and_checks_its_arguments():
    for decay in ("linear", "cosine"):
        assert float(schedule(1.0, 20, decay=decay, end=0.1)(20)) == pytest.approx(0.1)
    for wrong in ({"steps": 0}, {"steps": 9, "warmup": 1.0}, {"steps": 9, "warmup": -0.1}):
        with pytest.raises(ValueError, match="need steps >= 1"):
            schedule(1.0, **wrong)


def test_adamw_is_algorithm_2_after_clipping():
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)}
    params = {name: x.astype(np.float32) for name, x in params.items()}
    gradients = [
        {n: rng.normal(size=x.shape).astype(np.float32) * 3 for n, x in params.items()} for _ in range(4)
    ]
    rate, decay, b1, b2, eps = 0.1, 0.3, 0.9, 0.999, 1e-8

    found, optimizer = jax.tree.map(jnp.asarray, params), adamw(rate, weight_decay=decay)
    state = optimizer.init(found)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, found)
        found = optax.apply_updates(found, updates)

    expected = dict(params)
    m, v = ({n: np.zeros_like(x) for n, x in params.items()} for _ in range(2))
    for t, gradient in enumerate(gradients, 1):
        norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
        assert norm > 1
        for name, g in gradient.items():
            g = g / norm
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g**2
            direction = (m[name] / (1 - b1**t)) / (np.sqrt(v[name] / (1 - b2**t)) + eps)
            shrink = decay * expected[name] if name == "kernel" else 0
            expected[name] = expected[name] - rate * (direction + shrink)
    for name in params:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)


def test_what_decays_follows_rules_and_skips_frozen_leaves():
    params = {"body": None, "head": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "token": jnp.ones(2)}
    assert tree.flatten(decays(params)) == {"head/bias": False, "head/kernel": True, "token": True}
    given = decays(params, [("token|.*/bias", False), (".*", True)])
    assert tree.flatten(given) == {"head/bias": False, "head/kernel": True, "token": False}
    with pytest.raises(tree.RuleError, match="meets no leaf"):
        adamw(0.1, decay=[("tokens", False), (".*", True)]).init(params)
    zero = jax.tree.map(jnp.zeros_like, params)
    optimizer = adamw(1.0, weight_decay=0.5, clip=None)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    assert {p: float(x.sum()) for p, x in tree.flatten(updates).items()} == {
        "head/bias": 0.0, "head/kernel": -2.0, "token": -1.0,
    }  # fmt: skip
