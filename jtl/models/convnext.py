"""ConvNeXt and ConvNeXt V2: convolutional networks designed like a hierarchical vision transformer.

Liu et al. 2022, "A ConvNet for the 2020s", https://arxiv.org/abs/2201.03545; Woo et al. 2023, "ConvNeXt V2:
Co-designing and Scaling ConvNets with Masked Autoencoders", https://arxiv.org/abs/2301.00808. V2 normalises responses
in its blocks, where V1 scales their output. Numerically equal to ``ConvNextModel`` and ``ConvNextV2Model`` of
``transformers``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jtl.errors import InputError
from jtl.models import architecture
from jtl.models.architecture import CONV, DEPTHWISE, Architecture, HeadSpec, Tensor, linear, norm
from jtl.models.parts.depthwise import depthwise_conv
from jtl.models.parts.layers import Images, activation, dense
from jtl.models.parts.patches import pair

HEAD = HeadSpec("pooled", {"out": "classifier"}, "ConvNextForImageClassification")
V2_HEAD = HeadSpec("pooled", {"out": "classifier"}, "ConvNextV2ForImageClassification")

EPSILON = 1e-6  # of every norm but the last, whose epsilon is in the configuration
EXPANSION = 4  # inner width of a block, relative to its input


@dataclasses.dataclass(frozen=True)
class ConvNextConfig:
    """The dimensions of ConvNeXt, with the names and defaults (tiny) of config.json.

    Attributes:
        drop_path_rate: rate at which training skips the last block; it rises linearly from 0 at the first block.
        layer_scale_init_value: initial scale of the blocks' outputs; 0 for no scales.
    """

    model_type: ClassVar[str] = "convnext"
    response_norm: ClassVar[bool] = False

    num_channels: int = 3
    patch_size: int | tuple[int, int] = 4
    num_stages: int = 4
    hidden_sizes: tuple[int, ...] = (96, 192, 384, 768)
    depths: tuple[int, ...] = (3, 3, 9, 3)
    hidden_act: str = "gelu"
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    layer_scale_init_value: float = 1e-6
    drop_path_rate: float = 0.0
    image_size: int | tuple[int, int] = 224

    def __post_init__(self):
        activation(self.hidden_act)
        if (
            not self.num_stages == len(self.hidden_sizes) == len(self.depths)
            or min(self.depths, default=0) < 1
        ):
            raise InputError(
                f"hidden_sizes={self.hidden_sizes} and depths={self.depths}: expected a width and a depth of at least "
                f"1 for each of num_stages={self.num_stages}"
            )

    @property
    def head(self) -> HeadSpec:
        """The standard classification head: one linear layer on the pooled features."""
        return HEAD

    @property
    def head_dropout(self) -> float:
        """Dropout rate before the classifier: 0."""
        return 0.0

    def width(self, output: str) -> int:
        """Return the size of the last axis of an output."""
        return self.hidden_sizes[-1]

    def drop_rates(self) -> tuple[tuple[float, ...], ...]:
        """Return the rate at which training skips each block of each stage."""
        rates = np.linspace(0, self.drop_path_rate, sum(self.depths))
        return tuple(tuple(map(float, part)) for part in np.split(rates, np.cumsum(self.depths)[:-1]))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ConvNextConfig:
        """Return the configuration of a config.json.

        Raises:
            ValueError: a setting is not supported.
        """
        return architecture.from_hf(cls, config, model_type=cls.model_type)

    def to_hf(self) -> dict[str, Any]:
        """Return the content of config.json, without ``architectures``."""
        return {"model_type": self.model_type, **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class ConvNextV2Config(ConvNextConfig):
    """The dimensions of ConvNeXt V2."""

    model_type: ClassVar[str] = "convnextv2"
    response_norm: ClassVar[bool] = True
    layer_scale_init_value: ClassVar[float] = 0.0  # type: ignore[misc]

    @property
    def head(self) -> HeadSpec:
        """The standard classification head: one linear layer on the pooled features."""
        return V2_HEAD


class ResponseNorm(nn.Module):
    """Global response normalisation (Woo et al. 2023, section 4) with a residual: (B, H, W, C) to (B, H, W, C).

    Each channel is scaled by its norm over the image, relative to the mean of these norms.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Normalise, scale and shift."""
        scale = self.param("scale", nn.initializers.zeros, (1, 1, 1, x.shape[-1]))
        bias = self.param("bias", nn.initializers.zeros, (1, 1, 1, x.shape[-1]))
        square = jnp.square(x.astype(jnp.float32)).sum((1, 2), keepdims=True)
        # The square root has no gradient at 0; torch uses 0.
        size = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
        relative = (size / (size.mean(-1, keepdims=True) + EPSILON)).astype(x.dtype)
        return scale * (x * relative) + bias + x


class Embeddings(nn.Module):
    """Patch embeddings, normalised: (B, H, W, C) to (B, H / patch, W / patch, D), rounded down."""

    config: ConvNextConfig

    @nn.compact
    def __call__(self, image: Images) -> Float[Array, "B h w D"]:
        """Embed normalised images.

        Raises:
            ValueError: the image has another number of channels or is too small.
        """
        c = self.config
        patch, shrink = pair(c.patch_size), 2 ** (c.num_stages - 1)
        least = (patch[0] * shrink, patch[1] * shrink)
        if image.shape[-1] != c.num_channels or image.shape[1] < least[0] or image.shape[2] < least[1]:
            raise InputError(
                f"image: expected shape (B, H, W, {c.num_channels}), found {tuple(image.shape)}, with H and W of at "
                f"least {least[0]} and {least[1]}; repeat a grey image along the last axis"
            )
        x = _conv(c, c.hidden_sizes[0], patch, "patch")(image)
        return nn.LayerNorm(EPSILON, name="norm")(x)


class Block(nn.Module):
    """Residual block: 7 x 7 depthwise convolution, norm, wide layer, narrow layer: (B, H, W, D) to (B, H, W, D).

    Attributes:
        drop: rate at which an example skips the block in training (stochastic depth, Huang et al. 2016,
            https://arxiv.org/abs/1603.09382).
        config: the dimensions.
    """

    drop: float
    config: ConvNextConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B H W D"], *, train: bool = False) -> Float[Array, "B H W D"]:
        """Transform a feature map."""
        c, D = self.config, x.shape[-1]
        y = nn.Conv(
            D,
            (7, 7),
            padding=3,
            feature_group_count=D,
            conv_general_dilated=depthwise_conv,
            kernel_init=nn.initializers.normal(c.initializer_range),
            name="depthwise",
        )(x)
        y = nn.LayerNorm(EPSILON, name="norm")(y)
        y = activation(c.hidden_act)(dense(EXPANSION * D, "intermediate", c.initializer_range)(y))
        if c.response_norm:
            y = ResponseNorm(name="response_norm")(y)
        y = dense(D, "output", c.initializer_range)(y)
        if c.layer_scale_init_value > 0:
            scale = self.param("output_scale", nn.initializers.constant(c.layer_scale_init_value), (D,))
            y *= scale.reshape(1, 1, 1, D)
        return x + nn.Dropout(self.drop, broadcast_dims=(1, 2, 3), deterministic=not train)(y)


class Stage(nn.Module):
    """Blocks of one width, after a norm and a 2 x 2 convolution of stride 2 in all stages but the first.

    Maps (B, H, W, C) to (B, h, w, D).
    """

    channels: int
    first: bool
    drop: tuple[float, ...]
    config: ConvNextConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], *, train: bool = False) -> Float[Array, "B h w D"]:
        """Downsample and apply every block."""
        if not self.first:
            x = nn.LayerNorm(EPSILON, name="downsample_norm")(x)
            x = _conv(self.config, self.channels, (2, 2), "downsample")(x)
        for i, drop in enumerate(self.drop):
            x = Block(drop, self.config, name=f"block_{i}")(x, train=train)
        return x


class Encoder(nn.Module):
    """The stages: (B, H, W, C) to (B, h, w, D)."""

    config: ConvNextConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], *, train: bool = False) -> Float[Array, "B h w D"]:
        """Apply every stage."""
        c = self.config
        for i, (channels, drop) in enumerate(zip(c.hidden_sizes, c.drop_rates(), strict=True)):
            x = Stage(channels, i == 0, drop, c, name=f"stage_{i}")(x, train=train)
        return x


class ConvNext(nn.Module):
    """ConvNeXt without its classifier.

    Returns ``map``, the last feature map, (B, H / 32, W / 32, D) rounded down for four stages and patches of 4;
    ``features`` and ``pooled`` (B, D), its normalised spatial mean. For a feature pyramid use taps:
    ``model(batch, taps=("encoder/stage_0", ...))``; blocks are at ``encoder/stage_0/block_0``.
    """

    config: ConvNextConfig

    @nn.compact
    def __call__(self, image: Images, *, train: bool = False) -> dict[str, Array]:
        """Encode normalised images of any size."""
        x = Embeddings(self.config, name="embeddings")(image)
        x = Encoder(self.config, name="encoder")(x, train=train)
        pooled = nn.LayerNorm(self.config.layer_norm_eps, name="norm")(x.mean((1, 2)))
        return {"map": x, "features": pooled, "pooled": pooled}


def _conv(config: ConvNextConfig, channels: int, size: tuple[int, int], name: str) -> nn.Conv:
    init = nn.initializers.normal(config.initializer_range)
    return nn.Conv(channels, size, size, "VALID", kernel_init=init, name=name)


def tensors(config: ConvNextConfig) -> dict[str, Tensor]:
    """Name map: variable path to tensor in a Hugging Face file."""
    names = _convolution("embeddings/patch", "embeddings.patch_embeddings")
    names |= norm("embeddings/norm", "embeddings.layernorm") | norm("norm", "layernorm")
    for i, depth in enumerate(config.depths):
        stage, key = f"encoder/stage_{i}", f"encoder.stages.{i}"
        if i > 0:
            names |= norm(f"{stage}/downsample_norm", f"{key}.downsampling_layer.0")
            names |= _convolution(f"{stage}/downsample", f"{key}.downsampling_layer.1")
        for j in range(depth):
            ours, theirs = f"{stage}/block_{j}", f"{key}.layers.{j}"
            names |= _convolution(f"{ours}/depthwise", f"{theirs}.dwconv", DEPTHWISE)
            names |= norm(f"{ours}/norm", f"{theirs}.layernorm")
            names |= linear(f"{ours}/intermediate", f"{theirs}.pwconv1")
            names |= linear(f"{ours}/output", f"{theirs}.pwconv2")
            if config.response_norm:
                names |= norm(f"{ours}/response_norm", f"{theirs}.grn")
            if config.layer_scale_init_value > 0:
                names[f"params/{ours}/output_scale"] = Tensor(f"{theirs}.layer_scale_parameter")
    return names


def _convolution(path: str, key: str, layout: architecture.Layout = CONV) -> dict[str, Tensor]:
    return {
        f"params/{path}/kernel": Tensor(f"{key}.weight", layout),
        f"params/{path}/bias": Tensor(f"{key}.bias"),
    }


def example(config: ConvNextConfig) -> dict[str, np.ndarray]:
    """Return a batch of one image that becomes one cell of the feature map."""
    shrink = 2 ** (config.num_stages - 1)
    height, width = pair(config.patch_size)
    return {"image": np.zeros((1, height * shrink, width * shrink, config.num_channels), np.float32)}


# Checkpoints (hub id: blocks of the stages; widths, doubled from stage to stage, begin with):
#   facebook/convnext-tiny-224, -small, -base, -large: 3, 3, 9, 3; 96; 3, 3, 27, 3; 96, 128, 192
#   facebook/convnext-base-224-22k, -large-224-22k, -xlarge-224-22k (256)                https://arxiv.org/abs/2201.03545
#   facebook/convnextv2-atto-1k-224, -femto, -pico, -nano, -tiny, -base, -large, -huge   https://arxiv.org/abs/2301.00808
ARCHITECTURE = Architecture(
    name="convnext",
    config=ConvNextConfig,
    module=ConvNext,
    tensors=tensors,
    prefix="convnext.",
    head=HEAD,
    example=example,
    base_class="ConvNextModel",
)
V2 = dataclasses.replace(
    ARCHITECTURE,
    name="convnextv2",
    config=ConvNextV2Config,
    prefix="convnextv2.",
    head=V2_HEAD,
    base_class="ConvNextV2Model",
)
