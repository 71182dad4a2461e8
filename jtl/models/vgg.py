"""VGG 11 to 19: stages of 3 x 3 convolutions with ReLU, each followed by max-pooling.

Simonyan and Zisserman 2014, "Very Deep Convolutional Networks for Large-Scale Image Recognition",
https://arxiv.org/abs/1409.1556. The name map is torchvision's; Keras' layer names are read too. Its features are the
usual ones for style transfer and perceptual losses.

Files differ in the pixels they expect, which the configuration says: torchvision's expect RGB normalised as usual for
ImageNet (the defaults here); those from Caffe, Keras' among them, BGR from 0 to 255 minus the mean.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jtl.errors import InputError
from jtl.models import architecture
from jtl.models.architecture import CONV, Architecture, HeadSpec, Tensor, linear
from jtl.models.parts.layers import Images

HEAD = HeadSpec("pooled", {"out": "classifier.6"}, "VGGForImageClassification", dropout=("out",))

GRID = 7  # rows and columns that the fully connected layers see


@dataclasses.dataclass(frozen=True)
class VGGConfig:
    """The dimensions and the preprocessing. The defaults are those of VGG16's backbone; ``DEPTHS`` has the others.

    Attributes:
        fully_connected: width of the two layers before the classifier, 4096 in the paper; 0 leaves them out.
        image_mean: the model expects RGB images ``(pixel / 255 - image_mean) / image_std``.
        image_std: see ``image_mean``.
        channel_order: of the first convolution; with "bgr" the model reverses the channels of its RGB input.
    """

    model_type: ClassVar[str] = "vgg"

    depths: tuple[int, ...] = (2, 2, 3, 3, 3)
    hidden_sizes: tuple[int, ...] = (64, 128, 256, 512, 512)
    fully_connected: int = 0
    dropout_rate: float = 0.5
    num_channels: int = 3
    image_size: int = 224
    image_mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    image_std: tuple[float, ...] = (0.229, 0.224, 0.225)
    channel_order: str = "rgb"

    def __post_init__(self):
        if len(self.hidden_sizes) != len(self.depths) or min(self.depths, default=0) < 1:
            raise InputError(
                f"hidden_sizes={self.hidden_sizes} and depths={self.depths}: expected a width and a depth of at least "
                "1 for each stage"
            )
        if self.channel_order not in ("rgb", "bgr"):
            raise InputError(f"channel_order={self.channel_order!r} is unknown; expected 'rgb' or 'bgr'")

    @property
    def head(self) -> HeadSpec:
        """The standard classification head: dropout, if there are fully connected layers, and one linear layer."""
        return HEAD

    @property
    def head_dropout(self) -> float:
        """Dropout rate before the classifier."""
        return self.dropout_rate if self.fully_connected else 0.0

    def width(self, output: str) -> int:
        """Return the size of the last axis of an output."""
        return (output == "pooled" and self.fully_connected) or self.hidden_sizes[-1]

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> VGGConfig:
        """Return the configuration of jtl's own config.json (``transformers`` has no such model type).

        Raises:
            ValueError: a setting is not supported.
        """
        return architecture.from_hf(cls, config, model_type=cls.model_type, only={"batch_norm": (False,)})

    def to_hf(self) -> dict[str, Any]:
        """Return the content of config.json, without ``architectures``."""
        return {"model_type": self.model_type, **dataclasses.asdict(self)}


DEPTHS = {
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}


def adaptive(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Return the matrix that averages ``old`` values into ``new`` windows, like torch's AdaptiveAvgPool."""
    first = np.arange(new) * old // new
    last = -(-(np.arange(new) + 1) * old // new)
    inside = (np.arange(old) >= first[:, None]) & (np.arange(old) < last[:, None])
    return (inside / inside.sum(1, keepdims=True)).astype(np.float32)


class Layer(nn.Module):
    """A 3 x 3 convolution and ReLU: (B, H, W, C) to (B, H, W, D)."""

    channels: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        """Convolve."""
        init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        return nn.relu(nn.Conv(self.channels, (3, 3), padding=1, kernel_init=init, name="conv")(x))


class Stage(nn.Module):
    """Layers of one width, after max-pooling in all stages but the first: (B, H, W, C) to (B, h, w, D)."""

    channels: int
    depth: int
    first: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        """Downsample and apply every layer."""
        if not self.first:
            x = nn.max_pool(x, (2, 2), (2, 2))
        for i in range(self.depth):
            x = Layer(self.channels, name=f"layer_{i}")(x)
        return x


class Encoder(nn.Module):
    """The stages and a final max-pooling: (B, H, W, C) to (B, H / 32, W / 32, D), rounded down."""

    config: VGGConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        """Apply every stage."""
        for i, (channels, depth) in enumerate(zip(self.config.hidden_sizes, self.config.depths, strict=True)):
            x = Stage(channels, depth, i == 0, name=f"stage_{i}")(x)
        return nn.max_pool(x, (2, 2), (2, 2))


class FullyConnected(nn.Module):
    """Average pooling to 7 x 7, then two layers with ReLU: (B, H, W, C) to (B, D)."""

    config: VGGConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], *, train: bool = False) -> Float[Array, "B D"]:
        """Apply both layers, with dropout after the first; the dropout after the second belongs to the head."""
        c = self.config
        rows, columns = (adaptive(n, GRID).astype(x.dtype) for n in x.shape[1:3])
        x = jnp.einsum("ih,jw,bhwc->bcij", rows, columns, x).reshape(len(x), -1)
        x = nn.relu(nn.Dense(c.fully_connected, name="dense_0")(x))
        x = nn.Dropout(c.dropout_rate, deterministic=not train)(x)
        return nn.relu(nn.Dense(c.fully_connected, name="dense_1")(x))


class VGG(nn.Module):
    """VGG without its classifier.

    Returns ``map``, the last feature map after its max-pooling, (B, H / 32, W / 32, D) rounded down for five stages;
    ``features`` (B, D), its spatial mean; and ``pooled``, the same or, with ``config.fully_connected``, the output
    (B, F) of these layers. The taps ``encoder/stage_I/layer_J`` are relu{I+1}_{J+1} in the papers' naming; taps of
    stages come before their max-pooling.
    """

    config: VGGConfig

    @nn.compact
    def __call__(self, image: Images, *, train: bool = False) -> dict[str, Array]:
        """Encode normalised images.

        Raises:
            ValueError: the image has another number of channels or is too small.
        """
        c, least = self.config, 2 ** len(self.config.depths)
        if image.shape[-1] != c.num_channels or min(image.shape[1:3]) < least:
            raise InputError(
                f"image: expected shape (B, H, W, {c.num_channels}), found {tuple(image.shape)}, with H and W of at "
                f"least {least}; repeat a grey image along the last axis"
            )
        x = jnp.asarray(image)
        x = Encoder(c, name="encoder")(x[..., ::-1] if c.channel_order == "bgr" else x)
        pooled = features = x.mean((1, 2))
        if c.fully_connected:
            pooled = FullyConnected(c, name="fully_connected")(x, train=train)
        return {"map": x, "features": features, "pooled": pooled}


def _layers(config: VGGConfig) -> Iterator[tuple[int, int, int]]:
    """Stage, layer in it, and number in torchvision's sequence, which also counts ReLUs and max-pooling."""
    number = 0
    for i, depth in enumerate(config.depths):
        for j in range(depth):
            yield i, j, number
            number += 2
        number += 1


def tensors(config: VGGConfig) -> dict[str, Tensor]:
    """Name map: variable path to tensor in a torchvision file."""
    names: dict[str, Tensor] = {}
    for i, j, number in _layers(config):
        ours, theirs = f"params/encoder/stage_{i}/layer_{j}/conv", f"features.{number}"
        names |= {
            f"{ours}/kernel": Tensor(f"{theirs}.weight", CONV),
            f"{ours}/bias": Tensor(f"{theirs}.bias"),
        }
    if config.fully_connected:
        names |= linear("fully_connected/dense_0", "classifier.0")
        names |= linear("fully_connected/dense_1", "classifier.3")
    return names


def aliases(config: VGGConfig) -> dict[str, str]:
    """Return torchvision's names of the backbone's layers by Keras' names."""
    return {
        f"block{i + 1}_conv{j + 1}/{theirs}": f"features.{number}.{ours}"
        for i, j, number in _layers(config)
        for theirs, ours in (("kernel", "weight"), ("bias", "bias"))
    }


def example(config: VGGConfig) -> dict[str, np.ndarray]:
    """Return a batch of one image that becomes one cell of the feature map."""
    side = 2 ** len(config.depths)
    return {"image": np.zeros((1, side, side, config.num_channels), np.float32)}


# Checkpoints, each in a folder with a config.json:
#   torchvision vgg11, 13, 16, 19: {"model_type": "vgg", "depths": ..., "fully_connected": 4096}
#   Keras trunks (.weights.h5): {"model_type": "vgg", "channel_order": "bgr", "image_std": [1 / 255, ...],
#       "image_mean": [123.68 / 255, 116.779 / 255, 103.939 / 255]}
ARCHITECTURE = Architecture(
    name="vgg",
    config=VGGConfig,
    module=VGG,
    tensors=tensors,
    prefix="",
    head=HEAD,
    example=example,
    base_class="VGG",
    ignored=(r"conv2d(_\d)?/(kernel|bias)",),  # the side outputs of HED in jtl.load("vgg16")
    aliases=aliases,
)
