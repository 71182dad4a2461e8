"""Conv4, the four-block convolutional network of few-shot learning (Vinyals et al. 2016, section 4.1.1).

https://arxiv.org/abs/1606.04080. Each block is a 3 x 3 convolution, batch normalisation, ReLU and 2 x 2 max-pooling;
28 x 28 images give 64 features, 84 x 84 ones 1,600. MAML takes 32 filters on miniImageNet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Conv4(nn.Module):
    """``jtl.model.linen(module, module.init(key, image))``; gives ``map`` (B, h, w, C) and ``features`` (B, h·w·C).

    Attributes:
        width: filters of each convolution, C.
        strided: convolve by strides of 2 in place of pooling, as MAML does for Omniglot (Finn et al. 2017,
            https://arxiv.org/abs/1703.03400, section 5.2): a quarter of the arithmetic. 28 x 28 images give a map of
            2 x 2.
        patches: convolve by one matrix product of all 3 x 3 patches. For meta-learning, where under ``vmap`` each task
            has kernels of its own; one kernel for all rows is twice as fast without.
    """

    width: int = 64
    strided: bool = False
    patches: bool = False
    momentum: float = 0.99

    @nn.compact
    def __call__(
        self, image: Float[Array, "B H W c"], *, use_running_average: bool = True
    ) -> dict[str, Array]:
        """Apply the blocks. Raises ValueError for images under 16 x 16, of which nothing would be left."""
        if min(image.shape[1:3]) < 16:
            raise ValueError(f"Conv4 halves images four times: give it 16 x 16 or more, found {image.shape}")
        x = image
        stride = 2 if self.strided else 1
        convolve = by_patches if self.patches else None
        for i in range(4):
            x = nn.Conv(
                self.width, (3, 3), stride, use_bias=False, conv_general_dilated=convolve, name=f"conv_{i}"
            )(x)
            norm = nn.BatchNorm(use_running_average, momentum=self.momentum, name=f"norm_{i}")
            x = nn.relu(norm(x))
            x = x if self.strided else max_pool(x)
        return {"map": x, "features": x.reshape(x.shape[0], -1)}


def by_patches(
    image: Float[Array, "B H W c"],
    kernel: Float[Array, "3 3 c C"],
    strides: Sequence[int],
    *_: Any,
    **__: Any,
) -> Float[Array, "B h w C"]:
    """A 3 x 3 convolution, padded as ``"SAME"``, as one matrix product.

    Tasks with a kernel each are a grouped convolution to XLA, which a CPU runs as a scalar loop, its second derivative
    too: a step of MAML took 12 to 20 times as long.
    """
    B, H, W, c = image.shape
    stride = strides[0]
    h, w = -(-H // stride), -(-W // stride)
    pads = [(size - 1) * stride + 3 - full for size, full in ((h, H), (w, W))]
    x = jnp.pad(image, ((0, 0), *((pad // 2, pad - pad // 2) for pad in pads), (0, 0)))
    shifted = [x[:, i::stride, j::stride][:, :h, :w] for i in range(3) for j in range(3)]
    patches = jnp.concatenate(shifted, -1).reshape(-1, 9 * c)
    kernel = turned(kernel.reshape(9 * c, -1))
    return jax.lax.dot_general(patches, kernel, (((1,), (1,)), ((), ()))).reshape(B, h, w, -1)


@jax.custom_vjp
def turned(kernel: Float[Array, "m n"]) -> Float[Array, "n m"]:
    """The transpose, whose cotangent is computed before it is turned back.

    So the gradient of a kernel in ``patches @ kernel`` is the product gᵀ · patches, g the cotangent of the output. XLA
    would make patchesᵀ · g of it, which takes a CPU two to four times as long: the larger operand is turned. Reverse
    mode alone, of any order.
    """
    return kernel.T


@jax.custom_vjp
def _turned_back(cotangent: Float[Array, "n m"]) -> Float[Array, "m n"]:
    return jax.lax.optimization_barrier(cotangent).T


turned.defvjp(lambda kernel: (turned(kernel), None), lambda _, g: (_turned_back(g),))
_turned_back.defvjp(lambda g: (_turned_back(g), None), lambda _, h: (turned(h),))


def max_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """2 x 2 max-pooling; a last odd row or column is dropped. As a maximum over axes its derivatives are cheap."""
    B, H, W, C = x.shape
    h, w = H // 2, W // 2
    return jnp.max(x[:, : 2 * h, : 2 * w].reshape(B, h, 2, w, 2, C), (2, 4))
