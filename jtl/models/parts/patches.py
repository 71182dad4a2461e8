"""From images to tokens: patches, special tokens, and position embeddings resampled to the image's patch grid."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jtl.errors import InputError
from jtl.models.parts.dropout import Dropout
from jtl.models.parts.layers import Images


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of a size given as one number or two."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def cubic(distance: np.ndarray, a: float) -> np.ndarray:
    """Cubic convolution kernel (Keys 1981, https://doi.org/10.1109/TASSP.1981.1163711)."""
    x = np.abs(distance)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def bicubic(old: int, new: int, antialias: bool = False) -> Float[np.ndarray, "new old"]:
    """Return the matrix that resamples ``old`` values to ``new`` like torch's ``interpolate(mode="bicubic")``.

    With ``align_corners=False``. Without ``antialias`` the kernel has a = -0.75, keeps its width when shrinking and
    repeats the border. With it, a = -0.5, the width grows with the shrinking factor, and weights are renormalised at
    the border. ``jax.image.resize`` differs from both: a = -0.5 and renormalised, also without antialiasing.

    Args:
        old: number of values.
        new: number of resampled values.
        antialias: see above.
    """
    scale = old / new
    centre = (np.arange(new) + 0.5) * scale - 0.5
    matrix = np.zeros((new, old))
    if antialias:
        matrix = cubic((np.arange(old) - centre[:, None]) / max(scale, 1.0), -0.5)
        return (matrix / matrix.sum(1, keepdims=True)).astype(np.float32)
    first = np.floor(centre).astype(int) - 1
    for tap in range(4):
        index = first + tap
        np.add.at(matrix, (np.arange(new), index.clip(0, old - 1)), cubic(centre - index, -0.75))
    return matrix.astype(np.float32)


def resample(
    positions: Float[Array, "N D"], old: tuple[int, int], new: tuple[int, int], antialias: bool = False
) -> Float[Array, "M D"]:
    """Resample position embeddings to another patch grid: see ``bicubic``.

    Args:
        positions: of the old grid, row by row.
        old: its rows and columns.
        new: rows and columns of the new grid.
        antialias: see ``bicubic``.
    """
    rows, columns = (bicubic(o, n, antialias) for o, n in zip(old, new, strict=True))
    table = positions.reshape(*old, -1).astype(jnp.float32)
    table = jnp.einsum("hi,wj,ijd->hwd", rows, columns, table).astype(positions.dtype)
    return table.reshape(-1, positions.shape[-1])


class PatchEmbeddings(nn.Module):
    """Special tokens, then patches row by row, plus position embeddings: image (B, H, W, C) to (B, N, D).

    Attributes:
        hidden: D.
        patch: height and width of a patch.
        image: height and width of the images for which the position embeddings were trained; for another patch grid
            they are resampled as by ``interpolate_pos_encoding=True`` in ``transformers``.
        channels: C.
        tokens: names of the learned tokens in front, which have positions.
        registers: number of register tokens after those, which have none.
        dropout: rate after the embeddings.
        antialias: how positions are resampled, see ``bicubic``.
        std: of the initialisation.
    """

    hidden: int
    patch: tuple[int, int]
    image: tuple[int, int]
    channels: int = 3
    tokens: tuple[str, ...] = ("cls_token",)
    registers: int = 0
    dropout: float = 0.0
    antialias: bool = False
    std: float = 0.02

    @nn.compact
    def __call__(self, image: Images, *, train: bool = False) -> Float[Array, "B N D"]:
        """Embed images of any size that holds at least one patch.

        Raises:
            ValueError: the image has another number of channels or is smaller than a patch.
        """
        B, H, W, C = image.shape
        D, T = self.hidden, len(self.tokens)
        (h, w), native = self.patch, (self.image[0] // self.patch[0], self.image[1] // self.patch[1])
        grid = (H // h, W // w)
        if C != self.channels or 0 in grid:
            raise InputError(
                f"image: shape {image.shape} does not hold {self.channels} channels, patches {self.patch}"
            )
        normal = nn.initializers.truncated_normal(self.std)
        patches = nn.Conv(D, self.patch, self.patch, "VALID", kernel_init=normal, name="patch")(image)
        tokens = [self.param(name, normal, (1, 1, D)) for name in self.tokens]
        position = self.param("position", normal, (1, T + native[0] * native[1], D))
        if grid != native:
            table = resample(position[0, T:], native, grid, self.antialias)
            position = jnp.concatenate([position[:, :T], table[None]], 1)
        tokens = [jnp.broadcast_to(token, (B, 1, D)) for token in tokens]
        x = jnp.concatenate([*tokens, patches.astype(position.dtype).reshape(B, -1, D)], 1) + position
        if self.registers:
            registers = self.param("registers", normal, (1, self.registers, D))
            x = jnp.concatenate([x[:, :T], jnp.broadcast_to(registers, (B, self.registers, D)), x[:, T:]], 1)
        return Dropout(self.dropout)(x, train=train)
