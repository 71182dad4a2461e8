"""Convolutions by patches against XLA's own, with their derivatives; Conv4 by patches against Conv4."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl.meta.normalise import run_episode
from jtl.meta.patch_convolution import PatchConv4, by_patches
from jtl.model import Mode, cast, linen
from jtl.models.conv4 import Conv4

KEY = jax.random.key(0)


@pytest.mark.parametrize(("side", "channels", "width"), [(7, 4, 5), (8, 4, 5), (8, 1, 16)])
@pytest.mark.parametrize("stride", [1, 2])
def test_patches_and_their_derivatives_are_those_of_a_convolution(stride, side, channels, width):
    """First and second derivatives, by reverse over reverse, as MAML takes them; also under ``vmap``."""

    def native(image, kernel):
        return jax.lax.conv_general_dilated(
            image, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def patched(image, kernel):
        return by_patches(image, kernel, (stride, stride))

    keys = jax.random.split(jax.random.key(side), 3)
    images = jax.random.normal(keys[0], (2, 3, side, side, channels))
    kernels = jax.random.normal(keys[1], (2, 3, 3, channels, width))

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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("normalise", "strided"), [("transductive", True), ("support", False), ("running", True)]
)
def test_conv4_by_patches_is_conv4(normalise, strided):
    """Same leaves, outputs, running statistics and second derivatives, whichever rows normalise."""
    key, images = jax.random.split(KEY)
    images = 0.3 + jax.random.normal(images, (8, 16, 16, 3))
    plain, patched = (kind(6, strided=strided) for kind in (Conv4, PatchConv4))
    variables = plain.init(key, images)
    jax.tree.map(np.testing.assert_array_equal, variables, patched.init(key, images))
    variables = jax.tree.map(lambda x: x + jax.random.uniform(key, x.shape) * (x.ndim == 1), variables)

    def found(module):
        model = linen(module, variables)

        def outputs(params):
            known, asked, state = run_episode(
                model.with_params(params), {"image": images[:5]}, {"image": images[5:]}, normalise, None
            )
            return known["features"], asked["features"], state

        def loss(params):
            known, asked, _ = outputs(params)
            return jnp.mean(jnp.sin(known)) + jnp.mean(jnp.sin(asked))

        def after_a_step(params):
            return loss(jax.tree.map(lambda p, g: p - 0.01 * g, params, jax.grad(loss)(params)))

        return outputs(model.params), jax.grad(loss)(model.params), jax.grad(after_a_step)(model.params)

    own, other = jax.jit(found, static_argnums=0)(patched), jax.jit(found, static_argnums=0)(plain)
    assert jax.tree.structure(own) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(own), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4 * float(np.abs(y).max()))


@pytest.mark.slow
def test_conv4_by_patches_in_low_precision():
    """As far from float32 as plain Conv4 is; running statistics stay in float32."""
    images = 3 + jax.random.normal(KEY, (8, 16, 16, 1))
    variables = Conv4(16).init(KEY, images)
    apart, mode = {}, Mode(stats="batch")
    exact, _ = linen(Conv4(16), variables).run({"image": images}, mode)
    for patches in (False, True):
        model = cast(linen((PatchConv4 if patches else Conv4)(16), variables), jnp.bfloat16)
        found, state = model.run({"image": images}, mode)
        assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("float32")}
        apart[patches] = float(jnp.sqrt(jnp.mean((found["features"] - exact["features"]) ** 2)))
    assert 0 < apart[True] < 1.5 * apart[False]
