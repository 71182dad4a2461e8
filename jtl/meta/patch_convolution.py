"""Conv4 and ResNet-12 whose convolutions are matrix products of image patches, for gradient-based meta-learning.

In meta-learning each task has its own kernels, which are differentiated twice; XLA's convolutions are slow at this.
Under ``vmap`` over tasks these modules are several times as fast on a CPU. With one kernel for all rows the plain
modules are twice as fast. Leaves, outputs and derivatives are those of the plain modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jtl.models.conv4 import Conv4
from jtl.models.resnet12 import ResNet12


class PatchConv4(Conv4):
    """``Conv4`` by patches; its first layer is normalised through its kernel, so it takes no adapter and no tap."""

    def _convolved(self, x: Array, i: int, norm: tuple[Any, ...], convolution: Any = None) -> Array:
        if i:
            return super()._convolved(x, i, norm, by_patches)
        kernel = Kernel(self.width, name="conv_0")(x.shape[-1])
        return NormalisedProduct(*norm, name="norm_0")(read_patches(x, self._strides), kernel)


def by_patches(
    image: Float[Array, "B H W c"],
    kernel: Float[Array, "3 3 c C"],
    strides: Sequence[int],
    *_: Any,
    **__: Any,
) -> Float[Array, "B h w C"]:
    """A 3 x 3 convolution, padded as ``"SAME"``, as one matrix product.

    For XLA, tasks with one kernel each are a grouped convolution, which a CPU runs as a scalar loop, as is its second
    derivative: a step of MAML took 12 to 20 times as long.
    """
    patches = read_patches(image, strides[0])
    *places, size = patches.shape
    flat, kernel = patches.reshape(-1, size), kernel.reshape(size, -1)
    if size < kernel.shape[1]:
        found = flat @ kernel
    else:
        found = jax.lax.dot_general(flat, turned(kernel), (((1,), (1,)), ((), ())))
    return found.reshape(*places, -1)


class PatchResNet12(ResNet12):
    """``ResNet12`` by patches."""

    _convolution: ClassVar[Any] = staticmethod(by_patches)


def read_patches(image: Float[Array, "B H W c"], stride: int) -> Float[Array, "B h w 9*c"]:
    """Returns the 3 x 3 patches that a convolution reads, padded as ``"SAME"``."""
    H, W = image.shape[1:3]
    h, w = -(-H // stride), -(-W // stride)
    pads = [(size - 1) * stride + 3 - full for size, full in ((h, H), (w, W))]
    x = jnp.pad(image, ((0, 0), *((pad // 2, pad - pad // 2) for pad in pads), (0, 0)))
    shifted = [x[:, i::stride, j::stride][:, :h, :w] for i in range(3) for j in range(3)]
    return jnp.concatenate(shifted, -1)


@jax.custom_vjp
def turned(kernel: Float[Array, "m n"]) -> Float[Array, "n m"]:
    """Returns the transpose, whose cotangent is computed before it is transposed back.

    So the gradient of a kernel in ``patches @ kernel`` is the product gᵀ · patches, with g the cotangent of the
    output. XLA would compute patchesᵀ · g, which takes a CPU two to four times as long where the patches are wider
    than g, because it transposes the larger operand. Only reverse mode is supported, of any order.
    """
    return kernel.T


@jax.custom_vjp
def _turned_back(cotangent: Float[Array, "n m"]) -> Float[Array, "m n"]:
    return jax.lax.optimization_barrier(cotangent).T


turned.defvjp(lambda kernel: (turned(kernel), None), lambda _, g: (_turned_back(g),))
_turned_back.defvjp(lambda g: (_turned_back(g), None), lambda _, h: (turned(h),))


class Kernel(nn.Module):
    """The kernel of an ``nn.Conv``, as the matrix that multiplies patches.

    Attributes:
        width: columns, C.
    """

    width: int

    @nn.compact
    def __call__(self, channels: int) -> Float[Array, "n C"]:
        """Returns the kernel (3, 3, channels, C) as a matrix."""
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 3, channels, self.width))
        return kernel.reshape(9 * channels, self.width)


class NormalisedProduct(nn.BatchNorm):
    """``nn.BatchNorm`` of ``patches @ kernel``, computed by rescaling the kernel instead of passes over the product.

    For patches with mean m and covariance S, column k of the kernel has outputs with mean m·k and variance kᵀ S k. So
    the normalisation is linear too, and its derivatives are small where patches are narrow. The first layer of Conv4
    has the narrowest patches and the largest map. Because its patches do not depend on parameters, m and S are
    computed once for all inner steps of MAML, which makes them a tenth faster.

    It is a subclass so that code which looks for normalisation layers (``jtl.meta.normalise``, ``jtl.domain.tent``)
    finds it. Of the fields of ``nn.BatchNorm`` it reads ``use_running_average``, ``momentum`` and ``epsilon``. As
    there, statistics are in float32 where the patches have lower precision.
    """

    @nn.compact
    def __call__(  # type: ignore[override]
        self,
        patches: Float[Array, "B h w n"],
        kernel: Float[Array, "n C"],
        *,
        mask: Bool[Array, "B 1 1 1"] | None = None,
    ) -> Float[Array, "B h w C"]:
        """Returns outputs normalised by the rows of ``mask`` (by default all), or by the running statistics."""
        size, width = kernel.shape
        running = {
            "mean": self.variable("batch_stats", "mean", jnp.zeros, (width,)),
            "var": self.variable("batch_stats", "var", jnp.ones, (width,)),
        }
        dtype = jnp.result_type(patches, kernel)
        wide = jnp.promote_types(dtype, jnp.float32)
        flat, kernel = patches.reshape(-1, size).astype(wide), kernel.astype(wide)
        if self.use_running_average:
            mean, var = (running[name].value[None] for name in ("mean", "var"))
        else:
            counts = jnp.ones((len(flat), 1)) if mask is None else _a_row(mask, patches)
            centre = (counts * flat).sum(0, keepdims=True) / counts.sum()
            spread = flat - centre
            covariance = (counts * spread).T @ spread / counts.sum()
            mean, var = centre @ kernel, (kernel * (covariance @ kernel)).sum(0, keepdims=True)
            if not self.is_initializing():
                for name, new in {"mean": mean, "var": var}.items():
                    running[name].value = self.momentum * running[name].value + (1 - self.momentum) * new[0]
        scale = self.param("scale", nn.initializers.ones, (width,))[None] * jax.lax.rsqrt(var + self.epsilon)
        bias = self.param("bias", nn.initializers.zeros, (width,))[None] - mean * scale
        found = flat.astype(dtype) @ (kernel * scale).astype(dtype) + bias.astype(dtype)
        return found.reshape(*patches.shape[:-1], width)


def _a_row(mask: Array, patches: Array) -> Array:
    """``mask`` as 0 or 1 for each patch, (B·h·w, 1)."""
    return jnp.broadcast_to(mask, (*patches.shape[:-1], 1)).reshape(-1, 1).astype(jnp.float32)
