"""Conv4: convolution by patches against XLA's own, with its derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl.models.conv4 import by_patches


@pytest.mark.parametrize("side", [7, 8])
@pytest.mark.parametrize("stride", [1, 2])
def test_patches_and_their_derivatives_are_those_of_a_convolution(stride, side):
    """First and second derivatives, by reverse over reverse, as MAML takes them; also under ``vmap``."""

    def native(image, kernel):
        return jax.lax.conv_general_dilated(
            image, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def patched(image, kernel):
        return by_patches(image, kernel, (stride, stride))

    keys = jax.random.split(jax.random.key(side), 3)
    images = jax.random.normal(keys[0], (2, 3, side, side, 4))
    kernels = jax.random.normal(keys[1], (2, 3, 3, 4, 5))

    def derivatives(convolve):
        def loss(image, kernel):
            return jnp.sum(jnp.tanh(convolve(image, kernel)))

        def after_a_step(image, kernel):
            slope = jax.grad(loss, (0, 1))(image, kernel)
            return loss(image - 0.1 * slope[0], kernel - 0.1 * slope[1])

        one = lambda *x: (convolve(*x), jax.grad(loss, (0, 1))(*x), jax.grad(after_a_step, (0, 1))(*x))  # noqa: E731
        return jax.jit(jax.vmap(one))(images, kernels)

    for own, other in zip(
        jax.tree.leaves(derivatives(patched)), jax.tree.leaves(derivatives(native)), strict=True
    ):
        assert np.abs(other).max() > 0.1
        np.testing.assert_allclose(own, other, atol=1e-4)
