"""Conv4, the four-block convolutional network of few-shot learning (Vinyals et al. 2016, section 4.1.1).

https://arxiv.org/abs/1606.04080. Each block is a 3 x 3 convolution, batch normalisation, ReLU and 2 x 2 max-pooling;
28 x 28 images give 64 features, 84 x 84 ones 1,600. MAML takes 32 filters on miniImageNet.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float


class Conv4(nn.Module):
    """``jtl.model.linen(module, module.init(key, image))``; gives ``map`` (B, h, w, C) and ``features`` (B, h·w·C).

    Attributes:
        width: filters of each convolution, C.
        patches: convolve by one matrix product of all 3 x 3 patches. For meta-learning, where under ``vmap`` each task
            has kernels of its own; one kernel for all rows is twice as fast without.
    """

    width: int = 64
    patches: bool = False

    @nn.compact
    def __call__(
        self, image: Float[Array, "B H W c"], *, use_running_average: bool = True
    ) -> dict[str, Array]:
        """Apply the blocks. Raises ValueError for images under 16 x 16, of which nothing would be left."""
        if min(image.shape[1:3]) < 16:
            raise ValueError(f"Conv4 halves images four times: give it 16 x 16 or more, found {image.shape}")
        x = image
        convolve = _by_patches if self.patches else None
        for i in range(4):
            x = nn.Conv(self.width, (3, 3), use_bias=False, conv_general_dilated=convolve, name=f"conv_{i}")(
                x
            )
            x = nn.BatchNorm(use_running_average=use_running_average, name=f"norm_{i}")(x)
            x = _max_pool(nn.relu(x))
        return {"map": x, "features": x.reshape(x.shape[0], -1)}


def _by_patches(
    image: Float[Array, "B H W c"], kernel: Float[Array, "3 3 c C"], *_: Any, **__: Any
) -> Float[Array, "B H W C"]:
    """A 3 x 3 convolution of stride 1 as one matrix product.

    Tasks with a kernel each are a grouped convolution to XLA, which a CPU runs as a scalar loop, its second derivative
    too: a step of MAML took 12 to 20 times as long.
    """
    B, H, W, c = image.shape
    x = jnp.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)))
    patches = jnp.concatenate([x[:, i : i + H, j : j + W] for i in range(3) for j in range(3)], -1)
    return (patches.reshape(-1, 9 * c) @ kernel.reshape(9 * c, -1)).reshape(B, H, W, -1)


def _max_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """2 x 2 max-pooling; a last odd row or column is dropped. As a maximum over axes its derivatives are cheap."""
    B, H, W, C = x.shape
    h, w = H // 2, W // 2
    return jnp.max(x[:, : 2 * h, : 2 * w].reshape(B, h, 2, w, 2, C), (2, 4))
