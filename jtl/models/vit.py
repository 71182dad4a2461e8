"""ViT: a pre-norm transformer encoder over image patches.

Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale",
https://arxiv.org/abs/2010.11929. Numerically equal to ``ViTModel`` of ``transformers``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import numpy as np
from jaxtyping import Array, Float

from jtl.models import architecture
from jtl.models.architecture import CONV, Architecture, HeadSpec, Tensor, linear, norm
from jtl.models.parts.attention import Attention
from jtl.models.parts.dropout import Dropout
from jtl.models.parts.layers import Images, Mlp, activation, dense
from jtl.models.parts.patches import PatchEmbeddings, pair

HEAD = HeadSpec("pooled", {"out": "classifier"}, "ViTForImageClassification")


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """The dimensions of a ViT, with the names and defaults of config.json.

    Attributes:
        pooler: jtl's own setting: whether there is a dense layer on the CLS token. config.json does not say; in
            ``transformers`` ViTModel has one and ViTForImageClassification has none.
    """

    model_type: ClassVar[str] = "vit"

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    image_size: int | tuple[int, int] = 224
    patch_size: int | tuple[int, int] = 16
    num_channels: int = 3
    qkv_bias: bool = True
    pooler_output_size: int | None = None  # None: hidden_size
    pooler_act: str = "tanh"
    pooler: bool = False

    def __post_init__(self):
        architecture.check_heads(self.hidden_size, self.num_attention_heads)
        activation(self.hidden_act)
        activation(self.pooler_act)

    @property
    def head(self) -> HeadSpec:
        """The standard classification head."""
        return HEAD

    def width(self, output: str) -> int:
        """Return the size of the last axis of an output."""
        return (self.pooler_output_size or self.hidden_size) if output == "pooler" else self.hidden_size

    @property
    def head_dropout(self) -> float:
        """Dropout rate before the classifier: 0."""
        return 0.0

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ViTConfig:
        """Return the configuration of a config.json.

        Raises:
            ValueError: a setting is not supported.
        """
        return architecture.from_hf(cls, config, model_type=cls.model_type)

    def to_hf(self) -> dict[str, Any]:
        """Return the content of config.json, without ``architectures``."""
        fields = dataclasses.asdict(self)
        del fields["pooler"]
        return {"model_type": self.model_type, **fields}


class Layer(nn.Module):
    """Attention, then MLP; each reads the normalised input and is added to it: (B, N, D) to (B, N, D)."""

    config: ViTConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], *, train: bool = False) -> Float[Array, "B N D"]:
        """Transform hidden states."""
        c = self.config
        drop = Dropout(c.hidden_dropout_prob)
        attention = Attention(
            c.num_attention_heads,
            c.attention_probs_dropout_prob,
            c.qkv_bias,
            c.initializer_range,
            name="attention",
        )
        y = attention(nn.LayerNorm(c.layer_norm_eps, name="attention_norm")(x), train=train)
        x += drop(y, train=train)
        mlp = Mlp(c.intermediate_size, c.hidden_act, c.initializer_range, name="mlp")
        return x + drop(mlp(nn.LayerNorm(c.layer_norm_eps, name="mlp_norm")(x)), train=train)


class Encoder(nn.Module):
    """The stack of layers: (B, N, D) to (B, N, D)."""

    config: ViTConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], *, train: bool = False) -> Float[Array, "B N D"]:
        """Apply every layer."""
        for i in range(self.config.num_hidden_layers):
            x = Layer(self.config, name=f"layer_{i}")(x, train=train)
        return x


class ViT(nn.Module):
    """Vision transformer.

    Returns ``sequence`` (B, 1 + patches, D), the normalised last hidden states; ``pooled`` and ``features`` (B, D),
    that of the CLS token; and with ``config.pooler`` also ``pooler`` (B, P).
    """

    config: ViTConfig
    tokens: tuple[str, ...] = ("cls_token",)

    @nn.compact
    def __call__(self, image: Images, *, train: bool = False) -> dict[str, Array]:
        """Encode normalised images of any size."""
        c = self.config
        x = PatchEmbeddings(
            c.hidden_size,
            pair(c.patch_size),
            pair(c.image_size),
            c.num_channels,
            self.tokens,
            dropout=c.hidden_dropout_prob,
            std=c.initializer_range,
            name="embeddings",
        )(image, train=train)
        x = Encoder(c, name="encoder")(x, train=train)
        x = nn.LayerNorm(c.layer_norm_eps, name="norm")(x)
        outputs = {"sequence": x, "pooled": x[:, 0], "features": x[:, 0]}
        if c.pooler:
            pooler = dense(c.width("pooler"), "pooler", c.initializer_range)
            outputs["pooler"] = activation(c.pooler_act)(pooler(x[:, 0]))
        return outputs


def embedding_tensors() -> dict[str, Tensor]:
    """Name map of the patch embeddings, shared with DeiT and DINOv2."""
    return {
        "params/embeddings/cls_token": Tensor("embeddings.cls_token"),
        "params/embeddings/position": Tensor("embeddings.position_embeddings"),
        "params/embeddings/patch/kernel": Tensor("embeddings.patch_embeddings.projection.weight", CONV),
        "params/embeddings/patch/bias": Tensor("embeddings.patch_embeddings.projection.bias"),
    }


def attention_tensors(ours: str, theirs: str, qkv_bias: bool) -> dict[str, Tensor]:
    """Name map of one attention layer, shared with DeiT and DINOv2."""
    names = linear(f"{ours}/output", f"{theirs}.output.dense")
    for name in ("query", "key", "value"):
        names |= linear(f"{ours}/{name}", f"{theirs}.attention.{name}", bias=qkv_bias)
    return names


def tensors(config: ViTConfig) -> dict[str, Tensor]:
    """Name map: variable path to tensor in a Hugging Face file."""
    names = embedding_tensors() | norm("norm", "layernorm")
    for i in range(config.num_hidden_layers):
        ours, theirs = f"encoder/layer_{i}", f"encoder.layer.{i}"
        names |= attention_tensors(f"{ours}/attention", f"{theirs}.attention", config.qkv_bias)
        names |= norm(f"{ours}/attention_norm", f"{theirs}.layernorm_before")
        names |= norm(f"{ours}/mlp_norm", f"{theirs}.layernorm_after")
        names |= linear(f"{ours}/mlp/intermediate", f"{theirs}.intermediate.dense")
        names |= linear(f"{ours}/mlp/output", f"{theirs}.output.dense")
    return names | (linear("pooler", "pooler.dense") if config.pooler else {})


def example(config: Any) -> dict[str, np.ndarray]:
    """Return a batch of one black image of the native size."""
    return {"image": np.zeros((1, *pair(config.image_size), config.num_channels), np.float32)}


# transformers v5 uses these names in memory but writes those of v4 to disk: only a saved state_dict has them.
V5_ATTENTION = (
    (r"(?<=attention\.)q_proj(?=\.)", "attention.query"),
    (r"(?<=attention\.)k_proj(?=\.)", "attention.key"),
    (r"(?<=attention\.)v_proj(?=\.)", "attention.value"),
    (r"(?<=attention\.)o_proj(?=\.)", "output.dense"),
)
V5_NAMES = (
    (r"^layers(?=\.\d)", "encoder.layer"),
    *V5_ATTENTION,
    (r"mlp\.fc1(?=\.)", "intermediate.dense"),
    (r"mlp\.fc2(?=\.)", "output.dense"),
)
IN_MEMORY_ATTENTION = (
    (r"attention\.attention\.query$", "attention.q_proj"),
    (r"attention\.attention\.key$", "attention.k_proj"),
    (r"attention\.attention\.value$", "attention.v_proj"),
    (r"attention\.output\.dense$", "attention.o_proj"),
)
IN_MEMORY = (
    (r"^encoder\.layer(?=\.\d)", "layers"),
    *IN_MEMORY_ATTENTION,
    (r"intermediate\.dense$", "mlp.fc1"),
    (r"output\.dense$", "mlp.fc2"),
)

# Checkpoints (hub id: layers x width, heads, patch, image):
#   google/vit-base-patch16-224-in21k, vit-base-patch16-224: 12 x 768, 12, 16, 224   https://arxiv.org/abs/2010.11929
#   google/vit-large-patch16-224-in21k: 24 x 1024, 16, 16, 224                       https://arxiv.org/abs/2010.11929
#   WinKawaks/vit-tiny-patch16-224, vit-small-patch16-224 (AugReg): 12 x 192, 3      https://arxiv.org/abs/2106.10270
#   facebook/dino-vits16, dino-vitb16: 12 x 384, 6; 12 x 768, 12                     https://arxiv.org/abs/2104.14294
ARCHITECTURE = Architecture(
    name="vit",
    config=ViTConfig,
    module=ViT,
    tensors=tensors,
    prefix="vit.",
    head=HEAD,
    example=example,
    base_class="ViTModel",
    ignored=(r"pooler\..*", r"embeddings\.mask_token", r"decoder\..*"),
    renames=V5_NAMES,
    in_memory=IN_MEMORY,
)
