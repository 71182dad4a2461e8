"""ResNet-12, the residual network of few-shot learning.

Oreshkin et al. 2018, "TADAM: Task dependent adaptive metric for improved few-shot learning",
https://arxiv.org/abs/1805.10123. Four blocks of three 3 x 3 convolutions with batch normalisation, with the widths of
MetaOptNet (Lee et al. 2019, https://arxiv.org/abs/1904.03758) but without its DropBlock.
"""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jtl.errors import InputError
from jtl.models.conv4 import max_pool


class ResNet12(nn.Module):
    """ResNet-12, used as ``jtl.model.linen(module, module.init(key, image))``.

    Returns ``map`` (B, h, w, C) and its spatial mean ``features`` (B, C). A block is
    max-pool(act(norm(conv(act(norm(conv(act(norm(conv(x)))))))) + norm(1 x 1 conv(x)))), where act is the leaky ReLU of
    slope 0.1.

    Attributes:
        widths: filters of the blocks; C is the last.
    """

    widths: tuple[int, ...] = (64, 160, 320, 640)

    _convolution: ClassVar[Any] = None  # XLA's own

    @nn.compact
    def __call__(
        self, image: Float[Array, "B H W c"], *, use_running_average: bool = True
    ) -> dict[str, Array]:
        """Apply the blocks.

        Raises:
            ValueError: the image is so small that nothing would be left.
        """
        least = 2 ** len(self.widths)
        if min(image.shape[1:3]) < least:
            raise InputError(
                f"ResNet12 halves images {len(self.widths)} times: give it {least} x {least} or more, found "
                f"{image.shape}"
            )
        x = image

        def norm(x: Array, name: str) -> Array:
            return nn.BatchNorm(use_running_average=use_running_average, name=name)(x)

        for b, width in enumerate(self.widths):
            shortcut = norm(nn.Conv(width, (1, 1), use_bias=False, name=f"short_{b}")(x), f"short_norm_{b}")
            for i in range(3):
                name = f"{b}_{i}"
                x = nn.Conv(
                    width, (3, 3), use_bias=False, conv_general_dilated=self._convolution, name=f"conv_{name}"
                )(x)
                x = norm(x, f"norm_{name}")
                x = nn.leaky_relu(x + shortcut if i == 2 else x, 0.1)
            x = max_pool(x)
        return {"map": x, "features": jnp.mean(x, (1, 2))}
