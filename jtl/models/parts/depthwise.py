"""Depthwise convolution that is also fast on a CPU.

XLA's CPU compiler runs a grouped convolution, and even more its gradient, as a scalar loop; a training step of
EfficientNet-Lite0 spends nearly all its time there. Written as one multiply-add of the whole shifted image per kernel
position, it becomes vector code. Accelerators keep their own kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jtl.errors import InputError

Pairs = tuple[tuple[int, int], ...]


def depthwise_conv(
    image: Float[Array, "B H W C"],
    kernel: Float[Array, "h w 1 C"],
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> Float[Array, "B H2 W2 C"]:
    """Convolve each channel with its own filter, with the signature of ``lax.conv_general_dilated``, for ``nn.Conv``.

    Reverse mode of any order and ``vmap`` work on every platform; forward mode (``jax.jvp``) works on none.

    Args:
        image: the feature map.
        kernel: one filter per channel.
        strides: of the windows.
        padding: as in ``lax.conv_general_dilated``.
        **options: the remaining arguments that ``nn.Conv`` passes: one group per channel, no dilation.

    Raises:
        ValueError: it is another kind of convolution.
    """
    groups = options["feature_group_count"]
    dilations = {*(options.get("lhs_dilation") or (1,)), *(options.get("rhs_dilation") or (1,))}
    if not groups == image.shape[-1] == kernel.shape[-1] or dilations != {1}:
        raise InputError(
            f"depthwise_conv needs one group and one filter a channel and no dilation: found {groups} groups, "
            f"{image.shape[-1]} channels in, {kernel.shape[-1]} out, dilations {sorted(dilations)}"
        )
    grouped = partial(lax.conv_general_dilated, window_strides=strides, padding=padding, **options)
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(image.shape[1:3], kernel.shape[:2], strides, padding)
    pads = tuple((int(low), int(high)) for low, high in padding)
    return lax.platform_dependent(
        image,
        kernel,
        cpu=lambda image, kernel: _shifted(image, kernel, tuple(strides), pads),
        default=grouped,
    )


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _shifted(image: Array, kernel: Array, strides: tuple[int, int], pads: Pairs) -> Array:
    """Sum over kernel positions of the shifted image times the kernel at that position."""
    image = jnp.pad(image, ((0, 0), *pads, (0, 0)))
    (h, w), (sh, sw) = kernel.shape[:2], strides
    rows, columns = (image.shape[1] - h) // sh * sh + 1, (image.shape[2] - w) // sw * sw + 1
    places = [(i, j) for i in range(h) for j in range(w)]
    shifts = (
        image[:, i : i + rows : sh, j : j + columns : sw] * kernel[i : i + 1, j : j + 1] for i, j in places
    )
    return reduce(jnp.add, shifts)


def _forward(image: Array, kernel: Array, strides: tuple[int, int], pads: Pairs):
    return _shifted(image, kernel, strides, pads), (image, kernel)


def _backward(strides: tuple[int, int], pads: Pairs, saved: tuple[Array, Array], upstream: Array):
    image, kernel = saved
    return _image_gradient(image, kernel, strides, pads, upstream), _kernel_gradient(
        image, kernel, strides, pads, upstream
    )


def _image_gradient(image: Array, kernel: Array, strides: tuple[int, int], pads: Pairs, upstream: Array):
    """The dilated gradient convolved with the flipped kernel, again as a sum of shifted images."""
    sizes = zip(image.shape[1:3], kernel.shape[:2], upstream.shape[1:3], strides, pads, strict=True)
    margins = [(k - 1 - low, n + low - (m - 1) * s - 1, s - 1) for n, k, m, s, (low, _) in sizes]
    zero = jnp.zeros((), upstream.dtype)
    dilated = lax.pad(upstream, zero, ((0, 0, 0), *margins, (0, 0, 0)))
    return _shifted(dilated, kernel[::-1, ::-1], (1, 1), ((0, 0), (0, 0)))


def _kernel_gradient(image: Array, kernel: Array, strides: tuple[int, int], pads: Pairs, upstream: Array):
    """Correlation of image and gradient, one example at a time, which stays in the CPU cache through all positions."""
    (h, w), (sh, sw) = kernel.shape[:2], strides
    size = [(m - 1) * s + 1 for m, s in zip(upstream.shape[1:3], strides, strict=True)]
    image = jnp.pad(image, ((0, 0), *pads, (0, 0)))
    wide = jnp.promote_types(kernel.dtype, jnp.float32)

    def add(total: Array, example: tuple[Array, Array]):
        x, g = example

        def at(position):
            window = lax.dynamic_slice(x, (position // w, position % w, 0), (*size, x.shape[-1]))
            return jnp.sum(window[::sh, ::sw] * g, (0, 1), dtype=wide)

        return total + lax.map(at, jnp.arange(h * w)), None

    total, _ = lax.scan(add, jnp.zeros((h * w, kernel.shape[-1]), wide), (image, upstream))
    return total.reshape(kernel.shape).astype(kernel.dtype)


_shifted.defvjp(_forward, _backward)
