"""DINOv2: a self-supervised ViT with scaled residual branches, and optionally register tokens.

Oquab et al. 2023, "DINOv2: Learning Robust Visual Features without Supervision", https://arxiv.org/abs/2304.07193;
Darcet et al. 2023, "Vision Transformers Need Registers", https://arxiv.org/abs/2309.16588. Numerically equal to
``Dinov2Model`` and ``Dinov2WithRegistersModel`` of ``transformers``, without mask tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jtl.models import architecture, vit
from jtl.models.architecture import Architecture, HeadSpec, Tensor, linear, norm
from jtl.models.parts.attention import Attention
from jtl.models.parts.layers import Images, Mlp, activation, dense
from jtl.models.parts.patches import PatchEmbeddings, pair

HEAD = HeadSpec("pooled", {"out": "classifier"}, "Dinov2ForImageClassification")
REGISTERS_HEAD = HeadSpec("pooled", {"out": "classifier"}, "Dinov2WithRegistersForImageClassification")


@dataclasses.dataclass(frozen=True)
class Dinov2Config:
    """The dimensions of DINOv2, with the names and defaults of config.json."""

    model_type: ClassVar[str] = "dinov2"
    num_register_tokens: ClassVar[int] = 0

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    mlp_ratio: int | float = 4
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6
    image_size: int | tuple[int, int] = 224
    patch_size: int | tuple[int, int] = 14
    num_channels: int = 3
    qkv_bias: bool = True
    layerscale_value: float = 1.0
    drop_path_rate: float = 0.0
    use_swiglu_ffn: bool = False

    def __post_init__(self):
        architecture.check_heads(self.hidden_size, self.num_attention_heads)
        activation(self.hidden_act)

    @property
    def head(self) -> HeadSpec:
        """The standard classification head."""
        return HEAD

    def width(self, output: str) -> int:
        """Return the size of the last axis of an output."""
        return 2 * self.hidden_size if output == "pooled" else self.hidden_size

    @property
    def head_dropout(self) -> float:
        """Dropout rate before the classifier: 0."""
        return 0.0

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Dinov2Config:
        """Return the configuration of a config.json.

        Raises:
            ValueError: a setting is not supported.
        """
        return architecture.from_hf(cls, config, model_type=cls.model_type)

    def to_hf(self) -> dict[str, Any]:
        """Return the content of config.json, without ``architectures``; the mask token of pretraining is dropped."""
        return {"model_type": self.model_type, **dataclasses.asdict(self), "use_mask_token": False}


@dataclasses.dataclass(frozen=True)
class Dinov2WithRegistersConfig(Dinov2Config):
    """The dimensions of DINOv2 with register tokens."""

    model_type: ClassVar[str] = "dinov2_with_registers"

    patch_size: int | tuple[int, int] = 16
    num_register_tokens: int = 4  # type: ignore[misc]

    @property
    def head(self) -> HeadSpec:
        """The standard classification head."""
        return REGISTERS_HEAD


class SwiGlu(nn.Module):
    """Gated MLP on the last axis, ``silu(x A) * (x B) C`` (Shazeer 2020, https://arxiv.org/abs/2002.05202).

    A and B are side by side in one kernel, as in the files.
    """

    hidden: int
    std: float = 0.02

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Apply the gated MLP."""
        gate, value = jnp.split(dense(2 * self.hidden, "intermediate", self.std)(x), 2, -1)
        return dense(x.shape[-1], "output", self.std)(jax.nn.silu(gate) * value)


class Layer(nn.Module):
    """A ViT layer whose branches are scaled per channel and dropped as a whole: (B, N, D) to (B, N, D).

    Scales: Touvron et al. 2021, https://arxiv.org/abs/2103.17239. Dropped branches: Huang et al. 2016,
    https://arxiv.org/abs/1603.09382.
    """

    config: Dinov2Config

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], *, train: bool = False) -> Float[Array, "B N D"]:
        """Transform hidden states."""
        c = self.config
        D, std = c.hidden_size, c.initializer_range
        drop_path = nn.Dropout(c.drop_path_rate, broadcast_dims=(1, 2), deterministic=not train)

        def scaled(y, name):
            return y * self.param(name, nn.initializers.constant(c.layerscale_value), (D,)).reshape(1, 1, D)

        attention = Attention(
            c.num_attention_heads, c.attention_probs_dropout_prob, c.qkv_bias, std, name="attention"
        )
        y = attention(nn.LayerNorm(c.layer_norm_eps, name="attention_norm")(x), train=train)
        x += drop_path(scaled(y, "attention_scale"))
        hidden = int(D * c.mlp_ratio)
        mlp: nn.Module
        if c.use_swiglu_ffn:
            mlp = SwiGlu((int(hidden * 2 / 3) + 7) // 8 * 8, std, name="mlp")
        else:
            mlp = Mlp(hidden, c.hidden_act, std, name="mlp")
        y = mlp(nn.LayerNorm(c.layer_norm_eps, name="mlp_norm")(x))
        return x + drop_path(scaled(y, "mlp_scale"))


class Encoder(nn.Module):
    """The stack of layers: (B, N, D) to (B, N, D)."""

    config: Dinov2Config

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], *, train: bool = False) -> Float[Array, "B N D"]:
        """Apply every layer."""
        for i in range(self.config.num_hidden_layers):
            x = Layer(self.config, name=f"layer_{i}")(x, train=train)
        return x


class Dinov2(nn.Module):
    """DINOv2 encoder.

    Returns ``sequence`` (B, 1 + registers + patches, D), the normalised last hidden states; ``features`` (B, D), the
    CLS token; and ``pooled`` (B, 2D), the CLS token concatenated with the mean over patches.
    """

    config: Dinov2Config

    @nn.compact
    def __call__(self, image: Images, *, train: bool = False) -> dict[str, Array]:
        """Encode normalised images of any size."""
        c = self.config
        x = PatchEmbeddings(
            c.hidden_size,
            pair(c.patch_size),
            pair(c.image_size),
            c.num_channels,
            registers=c.num_register_tokens,
            dropout=c.hidden_dropout_prob,
            antialias=c.num_register_tokens > 0,  # as in transformers
            std=c.initializer_range,
            name="embeddings",
        )(image, train=train)
        x = Encoder(c, name="encoder")(x, train=train)
        x = nn.LayerNorm(c.layer_norm_eps, name="norm")(x)
        patches = x[:, 1 + c.num_register_tokens :]
        pooled = jnp.concatenate([x[:, 0], patches.mean(1)], -1)
        return {"sequence": x, "pooled": pooled, "features": x[:, 0]}


def tensors(config: Dinov2Config) -> dict[str, Tensor]:
    """Name map: variable path to tensor in a Hugging Face file."""
    names = vit.embedding_tensors() | norm("norm", "layernorm")
    if config.num_register_tokens:
        names["params/embeddings/registers"] = Tensor("embeddings.register_tokens")
    first, second = ("weights_in", "weights_out") if config.use_swiglu_ffn else ("fc1", "fc2")
    for i in range(config.num_hidden_layers):
        ours, theirs = f"encoder/layer_{i}", f"encoder.layer.{i}"
        names |= vit.attention_tensors(f"{ours}/attention", f"{theirs}.attention", config.qkv_bias)
        names |= norm(f"{ours}/attention_norm", f"{theirs}.norm1") | norm(
            f"{ours}/mlp_norm", f"{theirs}.norm2"
        )
        names |= linear(f"{ours}/mlp/intermediate", f"{theirs}.mlp.{first}")
        names |= linear(f"{ours}/mlp/output", f"{theirs}.mlp.{second}")
        names[f"params/{ours}/attention_scale"] = Tensor(f"{theirs}.layer_scale1.lambda1")
        names[f"params/{ours}/mlp_scale"] = Tensor(f"{theirs}.layer_scale2.lambda1")
    return names


# Checkpoints (hub id: layers x width, heads; patch 14, image 518):
#   facebook/dinov2-small, -base, -large: 12 x 384, 6; 12 x 768, 12; 24 x 1024, 16   https://arxiv.org/abs/2304.07193
#   facebook/dinov2-giant: 40 x 1536, 24, swiglu                                     https://arxiv.org/abs/2304.07193
#   facebook/dinov2-with-registers-small, -base, -large, -giant                      https://arxiv.org/abs/2309.16588
ARCHITECTURE = Architecture(
    name="dinov2",
    config=Dinov2Config,
    module=Dinov2,
    tensors=tensors,
    prefix="dinov2.",
    head=HEAD,
    example=vit.example,
    base_class="Dinov2Model",
    ignored=(r"embeddings\.mask_token", r"decoder\..*"),  # the latter is in jtl.load("dinov2-small-focus")
    renames=((r"^backbone\.", ""), *vit.V5_ATTENTION),
    in_memory=vit.IN_MEMORY_ATTENTION,
)
WITH_REGISTERS = dataclasses.replace(
    ARCHITECTURE,
    name="dinov2_with_registers",
    config=Dinov2WithRegistersConfig,
    prefix="dinov2_with_registers.",
    head=REGISTERS_HEAD,
    base_class="Dinov2WithRegistersModel",
)
