"""ResNet 18 to 152: stages of residual blocks.

He et al. 2015, "Deep Residual Learning for Image Recognition", https://arxiv.org/abs/1512.03385. Numerically equal to
``ResNetModel`` and ``ResNetForImageClassification`` of ``transformers``; torchvision's names are read too. Both
downsample in the 3 x 3 convolution of a bottleneck ("V1.5"); with ``downsample_in_bottleneck`` in the 1 x 1, as in the
paper.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import numpy as np
from jaxtyping import Array, Float

from jtl.errors import InputError
from jtl.models import architecture
from jtl.models.architecture import CONV, Architecture, HeadSpec, Tensor
from jtl.models.parts.layers import Images, activation

HEAD = HeadSpec("pooled", {"out": "classifier.1"}, "ResNetForImageClassification")

REDUCTION = 4  # output width of a bottleneck over its inner width
MOMENTUM, EPSILON = 0.9, 1e-5  # of every batch norm; torch calls the momentum 0.1


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """The dimensions of ResNet, with the names and defaults (ResNet-50) of config.json."""

    model_type: ClassVar[str] = "resnet"

    num_channels: int = 3
    embedding_size: int = 64
    hidden_sizes: tuple[int, ...] = (256, 512, 1024, 2048)
    depths: tuple[int, ...] = (3, 4, 6, 3)
    layer_type: str = "bottleneck"
    hidden_act: str = "relu"
    downsample_in_first_stage: bool = False
    downsample_in_bottleneck: bool = False

    def __post_init__(self):
        activation(self.hidden_act)
        if self.layer_type not in ("basic", "bottleneck"):
            raise InputError(f"layer_type={self.layer_type!r} is unknown; expected 'basic' or 'bottleneck'")
        if len(self.hidden_sizes) != len(self.depths) or min(self.depths, default=0) < 1:
            raise InputError(
                f"hidden_sizes={self.hidden_sizes} and depths={self.depths}: expected a width and a depth of at least "
                "1 for each stage"
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

    def strides(self) -> tuple[int, ...]:
        """Return the stride of each stage."""
        return (2 if self.downsample_in_first_stage else 1, *(2,) * (len(self.depths) - 1))

    def convolutions(self, channels: int, stride: int) -> tuple[tuple[int, int, int], ...]:
        """Return channels, kernel size and stride of each convolution of a block with ``channels`` outputs."""
        if self.layer_type == "basic":
            return (channels, 3, stride), (channels, 3, 1)
        inner = channels // REDUCTION
        first, second = (stride, 1) if self.downsample_in_bottleneck else (1, stride)
        return (inner, 1, first), (inner, 3, second), (channels, 1, 1)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ResNetConfig:
        """Return the configuration of a config.json.

        Raises:
            ValueError: a setting is not supported.
        """
        return architecture.from_hf(cls, config, model_type=cls.model_type)

    def to_hf(self) -> dict[str, Any]:
        """Return the content of config.json, without ``architectures``."""
        return {"model_type": self.model_type, **dataclasses.asdict(self)}


def _conv(channels: int, size: int, stride: int, name: str) -> nn.Conv:
    init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    return nn.Conv(channels, (size, size), stride, size // 2, use_bias=False, kernel_init=init, name=name)


def _norm(use_running_average: bool, name: str) -> nn.BatchNorm:
    return nn.BatchNorm(use_running_average, momentum=MOMENTUM, epsilon=EPSILON, name=name)


class Embeddings(nn.Module):
    """A 7 x 7 convolution and max-pooling, each of stride 2: (B, H, W, C) to (B, H / 4, W / 4, D), rounded up."""

    config: ResNetConfig

    @nn.compact
    def __call__(self, image: Images, *, use_running_average: bool = True) -> Float[Array, "B h w D"]:
        """Embed normalised images.

        Raises:
            ValueError: the image has another number of channels than the configuration.
        """
        c = self.config
        if image.shape[-1] != c.num_channels:
            raise InputError(
                f"image: expected shape (B, H, W, {c.num_channels}), found {tuple(image.shape)}; "
                "repeat a grey image along the last axis"
            )
        x = _conv(c.embedding_size, 7, 2, "conv")(image)
        x = activation(c.hidden_act)(_norm(use_running_average, "conv_norm")(x))
        return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))


class Block(nn.Module):
    """Residual block: two 3 x 3 convolutions, or a bottleneck of 1 x 1, 3 x 3 and 1 x 1.

    Maps (B, H, W, C) to (B, H / stride, W / stride, D), rounded up. Where the two differ in shape, the input goes
    through a 1 x 1 convolution. Each convolution has a batch norm; the inner activation is ReLU whatever ``hidden_act``
    is.
    """

    channels: int
    stride: int
    config: ResNetConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], *, use_running_average: bool = True
    ) -> Float[Array, "B h w D"]:
        """Transform a feature map."""
        y = x
        for i, convolution in enumerate(self.config.convolutions(self.channels, self.stride)):
            y = nn.relu(y) if i else y
            y = _conv(*convolution, f"conv_{i}")(y)
            y = _norm(use_running_average, f"conv_{i}_norm")(y)
        if self.stride != 1 or x.shape[-1] != self.channels:
            x = _conv(self.channels, 1, self.stride, "shortcut")(x)
            x = _norm(use_running_average, "shortcut_norm")(x)
        return activation(self.config.hidden_act)(x + y)


class Stage(nn.Module):
    """Blocks of one width, the first of which may downsample: (B, H, W, C) to (B, h, w, D)."""

    channels: int
    stride: int
    depth: int
    config: ResNetConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], *, use_running_average: bool = True
    ) -> Float[Array, "B h w D"]:
        """Apply every block."""
        for i in range(self.depth):
            block = Block(self.channels, self.stride if i == 0 else 1, self.config, name=f"block_{i}")
            x = block(x, use_running_average=use_running_average)
        return x


class Encoder(nn.Module):
    """The stages: (B, H, W, C) to (B, H / 8, W / 8, D), with ``downsample_in_first_stage`` half of that, rounded up."""

    config: ResNetConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], *, use_running_average: bool = True
    ) -> Float[Array, "B h w D"]:
        """Apply every stage."""
        c = self.config
        for i, stage in enumerate(zip(c.hidden_sizes, c.strides(), c.depths, strict=True)):
            x = Stage(*stage, c, name=f"stage_{i}")(x, use_running_average=use_running_average)
        return x


class ResNet(nn.Module):
    """ResNet without its classifier.

    Returns ``map``, the last feature map, (B, ceil(H / 32), ceil(W / 32), D) for four stages; ``features`` and
    ``pooled`` (B, D), its spatial mean. For a feature pyramid use taps:
    ``model(batch, taps=("encoder/stage_0", ...))``; blocks are at ``encoder/stage_0/block_0``.

    Batch normalisation is as in ``jtl.models.efficientnet_lite``: with ``use_running_average=False`` it uses the
    statistics of the batch and updates the running ones in ``batch_stats``. The variance is divided by n = B·H·W, in
    torch by n - 1.
    """

    config: ResNetConfig

    @nn.compact
    def __call__(self, image: Images, *, use_running_average: bool = True) -> dict[str, Array]:
        """Encode normalised images of any size."""
        x = Embeddings(self.config, name="embeddings")(image, use_running_average=use_running_average)
        x = Encoder(self.config, name="encoder")(x, use_running_average=use_running_average)
        pooled = x.mean((1, 2))
        return {"map": x, "features": pooled, "pooled": pooled}


def tensors(config: ResNetConfig) -> dict[str, Tensor]:
    """Name map: variable path to tensor in a Hugging Face file."""
    names = _convolution("embeddings/conv", "embedder.embedder")
    channels = config.embedding_size
    for i, (width, stride, depth) in enumerate(
        zip(config.hidden_sizes, config.strides(), config.depths, strict=True)
    ):
        for j in range(depth):
            ours, theirs = f"encoder/stage_{i}/block_{j}", f"encoder.stages.{i}.layers.{j}"
            for k in range(len(config.convolutions(width, 1))):
                names |= _convolution(f"{ours}/conv_{k}", f"{theirs}.layer.{k}")
            if j == 0 and (stride != 1 or channels != width):
                names |= _convolution(f"{ours}/shortcut", f"{theirs}.shortcut")
        channels = width
    return names


def _convolution(path: str, key: str) -> dict[str, Tensor]:
    kernel = {f"params/{path}/kernel": Tensor(f"{key}.convolution.weight", CONV)}
    return kernel | architecture.batch_norm(f"{path}_norm", f"{key}.normalization")


def example(config: ResNetConfig) -> dict[str, np.ndarray]:
    """Return a batch of one image that becomes one cell of the feature map."""
    return {"image": np.zeros((1, 32, 32, config.num_channels), np.float32)}


TORCHVISION = (
    (r"^conv1\.", "embedder.embedder.convolution."),
    (r"^bn1\.", "embedder.embedder.normalization."),
    *((rf"^layer{i + 1}\.(\d+)\.", rf"encoder.stages.{i}.layers.\1.") for i in range(4)),
    *((rf"(?<=\d\.)conv{i + 1}\.", f"layer.{i}.convolution.") for i in range(3)),
    *((rf"(?<=\d\.)bn{i + 1}\.", f"layer.{i}.normalization.") for i in range(3)),
    (r"downsample\.0\.", "shortcut.convolution."),
    (r"downsample\.1\.", "shortcut.normalization."),
    (r"^fc\.", "classifier.1."),
)

# Checkpoints of https://arxiv.org/abs/1512.03385, on ImageNet (hub id: blocks of the stages, kind):
#   microsoft/resnet-18: 2, 2, 2, 2, basic; -34: 3, 4, 6, 3, basic
#   microsoft/resnet-50: 3, 4, 6, 3, bottleneck; -101: 3, 4, 23, 3; -152: 3, 8, 36, 3
# torchvision's resnet18 to resnet152, in a folder with a config.json of these dimensions
ARCHITECTURE = Architecture(
    name="resnet",
    config=ResNetConfig,
    module=ResNet,
    tensors=tensors,
    prefix="resnet.",
    head=HEAD,
    example=example,
    base_class="ResNetModel",
    ignored=(r".*\.num_batches_tracked",),
    renames=TORCHVISION,
)
