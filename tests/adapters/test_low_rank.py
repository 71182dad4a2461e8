"""The product of a low-rank layer: its gradients of first and second order, and what its compiled step holds."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jtl import adapters, finetune
from jtl.adapters.forward import low_rank
from jtl.model import linen
from jtl.tasks import Classify
from jtl.train import make_step

ROWS, M, N, R = 24, 16, 12, 3


@pytest.fixture
def arrays(key):
    shapes = ((ROWS, M), (M, N), (M, R), (R, N))
    keys = jax.random.split(key, len(shapes))
    return tuple(jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True))


def folded(*arrays):
    return jnp.sum(jnp.sin(low_rank(*arrays)))


def explicit(x, weight, a, b):
    return jnp.sum(jnp.sin(x @ (weight + a @ b)))


def close(found, expected):
    jax.tree.map(
        lambda f, e: np.testing.assert_allclose(f, e, atol=2e-5 * float(jnp.abs(e).max())), found, expected
    )


def test_all_gradients(arrays):
    every = (0, 1, 2, 3)
    close(jax.grad(folded, every)(*arrays), jax.grad(explicit, every)(*arrays))


def test_gradients_of_gradients(arrays):
    def second(function):
        square = lambda x, w, a, b: sum(  # noqa: E731
            jnp.sum(g**2) for g in jax.grad(function, (0, 2, 3))(x, w, a, b)
        )
        return jax.grad(square, (0, 2, 3))(*arrays)

    close(second(folded), second(explicit))


def test_many_adapters_at_once(arrays):
    x, weight, a, b = arrays
    many = (jnp.stack([a, 2 * a]), jnp.stack([b, -b]))
    gradients = lambda f: jax.vmap(jax.grad(f, (2, 3)), (None, None, 0, 0))(x, weight, *many)  # noqa: E731
    close(gradients(folded), gradients(explicit))


def test_other_platforms_keep_the_factors_apart(arrays):
    """There a product rounds its operands to bfloat16, so W + A·B would lose a small A·B."""
    lowered = jax.jit(low_rank).trace(*arrays).lower(lowering_platforms=("tpu",))
    products = lowered.as_text().count("stablehlo.dot_general")
    assert products == 3
    on_cpu = jax.jit(low_rank).trace(*arrays).lower(lowering_platforms=("cpu",))
    assert on_cpu.as_text().count("stablehlo.dot_general") == 2


@pytest.mark.parametrize("method", ["lora", "dora", "vera", "ia3"])
def test_a_step_holds_no_gradient_as_large_as_a_weight(method, key):
    """Of a stack of wide layers: no product of the compiled step sums over rows into the shape of a weight."""
    width, rows = 256, 640

    class Net(nn.Module):
        @nn.compact
        def __call__(self, image):
            for i in range(3):
                image = nn.relu(nn.Dense(width, name=f"layer_{i}")(image))
            return {"logits": nn.Dense(2, name="out")(image)}

    batch = {"image": jnp.ones((rows, width)), "label": jnp.zeros(rows, jnp.int32)}
    model = linen(Net(), Net().init(key, batch["image"]))
    options = {"rank": 4} if method in ("lora", "dora", "vera") else {"feedforward": ".*_1"}
    model = getattr(adapters, method)(model, where="layer_.*", key=key, batch=batch, **options)
    labels = finetune.train_only(model, f".*/{method}/.*")

    def products(labels):
        text = make_step(Classify(), optax.sgd(0.1), labels).lower(model, batch).as_text()
        lines = [line for line in text.splitlines() if "dot_general" in line]
        assert lines
        # x^T dy: the rows are summed over, and the result is as large as W.
        return [
            line for line in lines if f"tensor<{rows}x{width}xf32>, tensor<{rows}x{width}xf32>" in line
            or (f"tensor<{width}x{rows}xf32>" in line and f"-> tensor<{width}x{width}xf32>" in line)
        ]  # fmt: skip

    assert products(None), "the test would see such a product, were there one"
    assert not products(labels)
