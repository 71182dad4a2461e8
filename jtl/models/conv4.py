"""Conv4, the four-block convolutional network of few-shot learning.

Vinyals et al. 2016, "Matching Networks for One Shot Learning", https://arxiv.org/abs/1606.04080, section 4.1.1. A block
is a 3 x 3 convolution, batch normalisation, ReLU and 2 x 2 max-pooling. Images of 28 x 28 pixels give 64 features,
those of 84 x 84 pixels 1,600. MAML uses 32 filters on miniImageNet.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jtl.errors import InputError


class Conv4(nn.Module):
    """Conv4, used as ``jtl.model.linen(module, module.init(key, image))``.

    Returns ``map`` (B, h, w, C) and ``features`` (B, h·w·C).

    Attributes:
        width: filters of each convolution, C.
        strided: use stride 2 instead of pooling, as MAML does for Omniglot (Finn et al. 2017,
            https://arxiv.org/abs/1703.03400, section 5.2): a quarter of the arithmetic. The map of 28 x 28 images is 2
            x 2.
        momentum: of the running statistics.
    """

    width: int = 64
    strided: bool = False
    momentum: float = 0.99

    @nn.compact
    def __call__(
        self, image: Float[Array, "B H W c"], *, use_running_average: bool = True
    ) -> dict[str, Array]:
        """Apply the blocks.

        Raises:
            ValueError: the image is smaller than 16 x 16, so nothing would be left.
        """
        if min(image.shape[1:3]) < 16:
            raise InputError(f"Conv4 halves images four times: give it 16 x 16 or more, found {image.shape}")
        x = image
        for i in range(4):
            x = nn.relu(self._convolved(x, i, (use_running_average, -1, self.momentum)))
            x = x if self.strided else max_pool(x)
        return {"map": x, "features": x.reshape(x.shape[0], -1)}

    @property
    def _strides(self) -> int:
        return 2 if self.strided else 1

    def _convolved(self, x: Array, i: int, norm: tuple[Any, ...], convolution: Any = None) -> Array:
        """Convolution and normalisation of block ``i``; ``norm`` are the fields of the latter."""
        x = nn.Conv(
            self.width, (3, 3), self._strides, use_bias=False, conv_general_dilated=convolution, name=f"conv_{i}"
        )(x)  # fmt: skip
        return nn.BatchNorm(*norm, name=f"norm_{i}")(x)


def max_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """2 x 2 max-pooling that drops a last odd row or column; as a maximum over axes its derivatives are cheap."""
    B, H, W, C = x.shape
    h, w = H // 2, W // 2
    return jnp.max(x[:, : 2 * h, : 2 * w].reshape(B, h, 2, w, 2, C), (2, 4))
