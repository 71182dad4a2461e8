"""DistilBERT: half of BERT's layers, without token types and pooler.

Sanh, Debut, Chaumond, Wolf 2019, "DistilBERT, a distilled version of BERT", https://arxiv.org/abs/1910.01108.
Numerically equal to ``DistilBertModel`` of ``transformers``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jtl.errors import InputError
from jtl.models import architecture
from jtl.models.architecture import Architecture, HeadSpec, Tensor, linear, norm, span_spec
from jtl.models.bert import example
from jtl.models.parts.attention import Attention, mask_bias
from jtl.models.parts.dropout import Dropout
from jtl.models.parts.layers import Ids, Mlp, activation, mean_over

HEAD = HeadSpec(
    "pooled",
    {"dense": "pre_classifier", "out": "classifier"},
    "DistilBertForSequenceClassification",
    hidden=True,
    activation="relu",
    dropout=("out",),
)
EPSILON = 1e-12


@dataclasses.dataclass(frozen=True)
class DistilBertConfig:
    """The dimensions of DistilBERT, with the names and defaults of config.json."""

    model_type: ClassVar[str] = "distilbert"

    vocab_size: int = 30522
    max_position_embeddings: int = 512
    n_layers: int = 6
    n_heads: int = 12
    dim: int = 768
    hidden_dim: int = 3072
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation: str = "gelu"
    seq_classif_dropout: float = 0.2
    initializer_range: float = 0.02

    def __post_init__(self):
        architecture.check_heads(self.dim, self.n_heads)
        activation(self.activation)

    @property
    def head(self) -> HeadSpec:
        """The standard classification head."""
        return HEAD

    def width(self, output: str) -> int:
        """Return the size of the last axis of an output."""
        return self.dim

    @property
    def head_dropout(self) -> float:
        """Dropout rate before the classifier."""
        return self.seq_classif_dropout

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> DistilBertConfig:
        """Return the configuration of a config.json.

        Raises:
            ValueError: a setting is not supported.
        """
        only = {"sinusoidal_pos_embds": (False, None)}  # transformers freezes such tables, jtl would not
        return architecture.from_hf(cls, config, model_type=cls.model_type, only=only)

    def to_hf(self) -> dict[str, Any]:
        """Return the content of config.json, without ``architectures``."""
        return {"model_type": self.model_type, **dataclasses.asdict(self)}


class Embeddings(nn.Module):
    """Sum of word and position embeddings, normalised: ids (B, L) to (B, L, D)."""

    config: DistilBertConfig

    @nn.compact
    def __call__(self, input_ids: Ids, *, train: bool = False) -> Float[Array, "B L D"]:
        """Look up, add, normalise."""
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        x = nn.Embed(c.vocab_size, c.dim, embedding_init=init, name="word")(input_ids)
        position_ids = jnp.arange(input_ids.shape[1])[None]
        x += nn.Embed(c.max_position_embeddings, c.dim, embedding_init=init, name="position")(position_ids)
        x = nn.LayerNorm(EPSILON, name="norm")(x)
        return Dropout(c.dropout)(x, train=train)


class Layer(nn.Module):
    """BERT's layer with dropout after the MLP only: (B, L, D) to (B, L, D)."""

    config: DistilBertConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], bias: Float[Array, "B 1 1 L"] | None = None, *, train: bool = False
    ) -> Float[Array, "B L D"]:
        """Transform hidden states; ``bias`` is from ``mask_bias``."""
        c = self.config
        attention = Attention(c.n_heads, c.attention_dropout, std=c.initializer_range, name="attention")
        x = nn.LayerNorm(EPSILON, name="attention_norm")(x + attention(x, bias, train=train))
        y = Mlp(c.hidden_dim, c.activation, c.initializer_range, name="mlp")(x)
        y = Dropout(c.dropout)(y, train=train)
        return nn.LayerNorm(EPSILON, name="mlp_norm")(x + y)


class Encoder(nn.Module):
    """The stack of layers: (B, L, D) to (B, L, D)."""

    config: DistilBertConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], bias: Float[Array, "B 1 1 L"] | None = None, *, train: bool = False
    ) -> Float[Array, "B L D"]:
        """Apply every layer."""
        for i in range(self.config.n_layers):
            x = Layer(self.config, name=f"layer_{i}")(x, bias, train=train)
        return x


class DistilBert(nn.Module):
    """DistilBERT encoder.

    Returns ``sequence`` (B, L, D), the last hidden states; ``pooled`` (B, D), that of the first token; and ``features``
    (B, D), their mean over the attention mask.
    """

    config: DistilBertConfig

    @nn.compact
    def __call__(
        self,
        input_ids: Ids,
        attention_mask: Ids | None = None,
        *,
        train: bool = False,
    ) -> dict[str, Array]:
        """Encode; without ``attention_mask`` every position is real."""
        c = self.config
        L = input_ids.shape[1]
        if L > c.max_position_embeddings:
            raise InputError(
                f"input_ids: length {L} exceeds max_position_embeddings={c.max_position_embeddings}"
            )
        x = Embeddings(c, name="embeddings")(input_ids, train=train)
        x = Encoder(c, name="encoder")(x, mask_bias(attention_mask), train=train)
        return {"sequence": x, "pooled": x[:, 0], "features": mean_over(x, attention_mask)}


def tensors(config: DistilBertConfig) -> dict[str, Tensor]:
    """Name map: variable path to tensor in a Hugging Face file."""
    names = {
        "params/embeddings/word/embedding": Tensor("embeddings.word_embeddings.weight"),
        "params/embeddings/position/embedding": Tensor("embeddings.position_embeddings.weight"),
    } | norm("embeddings/norm", "embeddings.LayerNorm")
    for i in range(config.n_layers):
        ours, theirs = f"encoder/layer_{i}", f"transformer.layer.{i}"
        for name, letter in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "out")):
            names |= linear(f"{ours}/attention/{name}", f"{theirs}.attention.{letter}_lin")
        names |= norm(f"{ours}/attention_norm", f"{theirs}.sa_layer_norm")
        names |= linear(f"{ours}/mlp/intermediate", f"{theirs}.ffn.lin1")
        names |= linear(f"{ours}/mlp/output", f"{theirs}.ffn.lin2")
        names |= norm(f"{ours}/mlp_norm", f"{theirs}.output_layer_norm")
    return names


# Checkpoints (hub id: layers x width, heads), all of https://arxiv.org/abs/1910.01108:
#   distilbert/distilbert-base-uncased, distilbert-base-cased, distilbert-base-multilingual-cased: 6 x 768, 12
#   distilbert/distilbert-base-uncased-finetuned-sst-2-english: 6 x 768, 12, with its head
ARCHITECTURE = Architecture(
    name="distilbert",
    config=DistilBertConfig,
    module=DistilBert,
    tensors=tensors,
    prefix="distilbert.",
    head=HEAD,
    example=example,
    base_class="DistilBertModel",
    ignored=(r"embeddings\.position_ids", r"vocab_(transform|layer_norm|projector)\..*", r"qa_outputs\..*"),
    spans=span_spec("DistilBertForQuestionAnswering"),
)
