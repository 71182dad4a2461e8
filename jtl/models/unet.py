"""A small U-Net for image generation by flow matching, conditioned on time and class.

Ronneberger, Fischer and Brox 2015, "U-Net: Convolutional Networks for Biomedical Image Segmentation",
https://arxiv.org/abs/1505.04597, in the form of diffusion models: residual blocks whose normalised maps are scaled and
shifted by the condition, and attention on the coarsest map (Ho, Jain and Abbeel 2020, https://arxiv.org/abs/2006.11239,
appendix B; Dhariwal and Nichol 2021, https://arxiv.org/abs/2105.05233, section 3). It predicts the clean image and
returns the ``velocity`` towards it, which is easier for a narrow network than predicting the noise (Li and He 2025,
https://arxiv.org/abs/2511.13720): see ``jtl.tasks.flow_matching``. It works on patches of 2 x 2 pixels, a quarter of
the arithmetic.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jtl import tree
from jtl.errors import InputError
from jtl.model import Model, linen, with_config
from jtl.models.parts.attention import Attention
from jtl.models.parts.layers import Images
from jtl.models.parts.patches import pair

CLASSES = "label/embedding"  # the leaf with a row for each class, and a last one for no class


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The dimensions of a U-Net. The default has 0.3 million parameters and learns digits on a CPU.

    Attributes:
        num_classes: C. The label C means no class.
        image_size: height and width.
        patch_size: side of the patches that the network treats as pixels.
        num_channels: of the images.
        widths: channels of each level; each further level halves the map.
        blocks: residual blocks of a level on the way down and on the way up, and before and after the attention on the
            coarsest level.
        num_attention_heads: of that attention.
        condition_size: width of the embedding of time and class.
        groups: of the group norms.
        nearest: smallest ``1 - time`` by which the velocity divides.
    """

    num_classes: int = 10
    image_size: int | tuple[int, int] = 28
    patch_size: int = 2
    num_channels: int = 3
    widths: tuple[int, ...] = (32, 64)
    blocks: int = 1
    num_attention_heads: int = 4
    condition_size: int = 96
    groups: int = 8
    nearest: float = 0.05

    def __post_init__(self):
        step = self.patch_size * 2 ** (len(self.widths) - 1)
        if any(side % step for side in pair(self.image_size)):
            raise InputError(
                f"the sides of images must be multiples of {step}, the patch times two for each further level; found "
                f"{self.image_size}"
            )
        if wrong := [width for width in self.widths if width % self.groups]:
            raise InputError(f"width {wrong[0]} is not a multiple of the number of groups, {self.groups}")


def sines(values: Float[Array | np.ndarray, " N"], width: int) -> Float[Array, "N width"]:
    """Cosines, then sines, of ``values`` times ``width / 2`` frequencies, which fall from 1 towards 1/10,000."""
    frequencies = jnp.exp(-jnp.log(10_000.0) * jnp.arange(width // 2) / (width // 2))
    angles = jnp.asarray(values)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


def to_depth(x: Float[Array, "B H W C"], side: int) -> Float[Array, "B h w D"]:
    """Turn patches of ``side`` x ``side`` pixels into single pixels: D = C · side²."""
    B, H, W, C = x.shape
    x = x.reshape(B, H // side, side, W // side, side, C).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, H // side, W // side, side * side * C)


def to_space(x: Float[Array, "B h w D"], side: int) -> Float[Array, "B H W C"]:
    """The inverse of ``to_depth``."""
    B, h, w, D = x.shape
    x = x.reshape(B, h, w, side, side, D // side**2).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, h * side, w * side, D // side**2)


class Block(nn.Module):
    """Residual block of two convolutions on normalised maps; the condition scales and shifts between them.

    The second convolution is initialised to zero, so a new block adds nothing.
    """

    width: int
    groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"], condition: Float[Array, "B E"]) -> Float[Array, "B h w W"]:
        """Transform a map."""
        y = nn.silu(nn.GroupNorm(self.groups, name="norm")(x))
        y = nn.Conv(self.width, (3, 3), name="conv_0")(y)
        scale, shift = jnp.split(nn.Dense(2 * self.width, name="modulation")(condition), 2, -1)
        y = nn.GroupNorm(self.groups, use_scale=False, use_bias=False)(y)
        y = nn.silu(y * (1 + scale[:, None, None]) + shift[:, None, None])
        y = nn.Conv(self.width, (3, 3), kernel_init=nn.initializers.zeros, name="conv_1")(y)
        return y + (x if x.shape[-1] == self.width else nn.Dense(self.width, name="skip")(x))


class UNet(nn.Module):
    """A U-Net that returns ``velocity`` and ``clean``, both (B, H, W, C)."""

    config: UNetConfig

    @nn.compact
    def __call__(
        self,
        image: Images,
        time: Float[Array | np.ndarray, " B"],
        label: Int[Array | np.ndarray, " B"],
    ) -> dict[str, Array]:
        """Return the clean images behind noisy ones, and the velocity ``(clean - image) / (1 - time)``.

        Args:
            image: in the space in which noise is added, about -1 to 1.
            time: from 0 for noise to 1 for an image.
            label: a class, or ``num_classes`` for none.

        Raises:
            ValueError: the images have another size.
        """
        c = self.config
        if image.shape[1:] != (*pair(c.image_size), c.num_channels):
            size = ", ".join(map(str, (*pair(c.image_size), c.num_channels)))
            raise InputError(f"image: expected (B, {size}), found {image.shape}")
        time = jnp.asarray(time)
        E, unit = c.condition_size, nn.initializers.normal(1.0)
        hidden = nn.silu(nn.Dense(E, name="time_hidden")(sines(1000 * time, E)))
        # Class embeddings that start far apart are distinguished early.
        table = nn.Embed(c.num_classes + 1, E, embedding_init=unit, name="label")
        condition = nn.silu(nn.Dense(E, name="time_output")(hidden) + table(jnp.asarray(label)))
        count = 0

        def blocks(x: Array, width: int, skips: list[Array]) -> list[Array]:
            """The maps after each block of a level; each block takes one of ``skips``, if there are any."""
            nonlocal count
            maps = []
            for _ in range(c.blocks):
                x = jnp.concatenate([x, skips.pop()], -1) if skips else x
                x = Block(width, c.groups, name=f"layer_{count}")(x, condition)
                count += 1
                maps.append(x)
            return maps

        x = nn.Conv(c.widths[0], (3, 3), name="stem")(to_depth(jnp.asarray(image), c.patch_size))
        passed: list[list[Array]] = []
        for i, width in enumerate(c.widths):
            x = nn.Conv(width, (3, 3), 2, name=f"halve_{i}")(x) if i else x
            passed.append(blocks(x, width, []))
            x = passed[-1][-1]

        rows = nn.GroupNorm(c.groups, name="attention_norm")(x).reshape(len(x), -1, c.widths[-1])
        x = x + Attention(c.num_attention_heads, name="attention")(rows).reshape(x.shape)
        x = blocks(x, c.widths[-1], [])[-1]
        for i in reversed(range(len(c.widths) - 1)):
            x = to_space(nn.Dense(4 * c.widths[i], name=f"double_{i}")(x), 2)
            x = blocks(x, c.widths[i], passed[i])[-1]

        x = nn.silu(nn.GroupNorm(c.groups, name="norm")(x))
        pixels = c.patch_size**2 * c.num_channels
        zeros = nn.initializers.zeros
        clean = to_space(nn.Conv(pixels, (3, 3), kernel_init=zeros, name="output")(x), c.patch_size)
        left = jnp.maximum(1 - time, c.nearest).astype(clean.dtype)
        return {"velocity": (clean - image) / left[:, None, None, None], "clean": clean}


def unet(config: UNetConfig, *, key: Array) -> Model:
    """Return a U-Net with random weights."""
    module = UNet(config)
    return linen(module, jax.jit(module.init)(key, **example(config))).replace(config=config)


def example(config: UNetConfig) -> dict[str, np.ndarray]:
    """Return a batch of one grey image to trace a U-Net, as ``batch=`` of ``jtl.adapters``."""
    size = (1, *pair(config.image_size), config.num_channels)
    return {
        "image": np.zeros(size, np.float32),
        "time": np.zeros(1, np.float32),
        "label": np.zeros(1, np.int32),
    }


def with_classes(model: Model, like: Sequence[int | None], *, key: Array, apart: float = 1.0) -> Model:
    """Return ``model`` with new classes after its own, each with a new row in the class embeddings.

    The new rows share a mark, a random vector, as DreamBooth's subjects share a rare word (Ruiz et al. 2023,
    https://arxiv.org/abs/2208.12242, section 4.2): what the body learns about one of them holds for all.

    Args:
        model: a U-Net without adapters.
        like: for each new class the old class whose row it starts from, besides the mark; None for a random row.
        key: random key for the mark and the random rows.
        apart: size of the mark; a row has size 1. With 0 there is no mark, and the new classes start as the old ones.

    Raises:
        ValueError: a class does not exist, or the model has adapters, which refer to the old table.
    """
    config = model.config
    if wrong := [c for c in like if c is not None and not 0 <= c < config.num_classes]:
        raise InputError(f"no class {wrong[0]}: the model has 0 to {config.num_classes - 1}")
    if model.techniques:
        raise InputError(
            f"the model has {[type(t).__name__ for t in model.techniques]} in it: add classes first, or merge adapters"
        )
    leaves = tree.flatten(model.params)
    old = leaves[CLASSES]
    mark, *rows = jax.random.normal(key, (1 + len(like), old.shape[1]), old.dtype)
    new = jnp.stack([row if c is None else old[c] for row, c in zip(rows, like, strict=True)])
    leaves[CLASSES] = jnp.concatenate([old[:-1], new + apart * mark[None], old[-1:]])
    return with_config(model.with_params(tree.nest(leaves)), num_classes=config.num_classes + len(like))
