"""Conv4, the four-block convolutional network of few-shot learning (Vinyals et al. 2016, section 4.1.1).

https://arxiv.org/abs/1606.04080. Each block is a 3 x 3 convolution, batch normalisation, ReLU and 2 x 2 max-pooling;
28 x 28 images give 64 features, 84 x 84 ones 1,600. MAML takes 32 filters on miniImageNet.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jtl.errors import InputError
from jtl.models.patch_convolution import Kernel, NormalisedProduct, by_patches, read_patches


class Conv4(nn.Module):
    """``jtl.model.linen(module, module.init(key, image))``; gives ``map`` (B, h, w, C) and ``features`` (B, h·w·C).

    Attributes:
        width: filters of each convolution, C.
        strided: convolve by strides of 2 in place of pooling, as MAML does for Omniglot (Finn et al. 2017,
            https://arxiv.org/abs/1703.03400, section 5.2): a quarter of the arithmetic. 28 x 28 images give a map of
            2 x 2.
        patches: convolve by one matrix product of all 3 x 3 patches. For meta-learning, where under ``vmap`` each task
            has kernels of its own; one kernel for all rows is twice as fast without. The first layer is normalised
            through its kernel, see ``NormalisedProduct``, and takes no adapter or tap.
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
            raise InputError(f"Conv4 halves images four times: give it 16 x 16 or more, found {image.shape}")
        x = image
        stride = 2 if self.strided else 1
        for i in range(4):
            norm = (use_running_average, -1, self.momentum)
            if self.patches and i == 0:
                kernel = Kernel(self.width, name="conv_0")(x.shape[-1])
                x = NormalisedProduct(*norm, name="norm_0")(read_patches(x, stride), kernel)
            else:
                convolve = by_patches if self.patches else None
                x = nn.Conv(
                    self.width, (3, 3), stride, use_bias=False, conv_general_dilated=convolve, name=f"conv_{i}"
                )(x)  # fmt: skip
                x = nn.BatchNorm(*norm, name=f"norm_{i}")(x)
            x = nn.relu(x)
            x = x if self.strided else max_pool(x)
        return {"map": x, "features": x.reshape(x.shape[0], -1)}


def max_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """2 x 2 max-pooling; a last odd row or column is dropped. As a maximum over axes its derivatives are cheap."""
    B, H, W, C = x.shape
    h, w = H // 2, W // 2
    return jnp.max(x[:, : 2 * h, : 2 * w].reshape(B, h, 2, w, 2, C), (2, 4))
