"""BERT: a post-norm transformer encoder over word pieces.

Devlin, Chang, Lee, Toutanova 2019, "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding",
https://arxiv.org/abs/1810.04805. Numerically equal to ``BertModel`` of ``transformers``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jtl.errors import InputError
from jtl.models import architecture
from jtl.models.architecture import Architecture, HeadSpec, Tensor, linear, norm, span_spec
from jtl.models.parts.attention import Attention, mask_bias
from jtl.models.parts.dropout import Dropout
from jtl.models.parts.layers import Ids, Mlp, activation, dense, mean_over

HEAD = HeadSpec("pooled", {"out": "classifier"}, "BertForSequenceClassification", dropout=("out",))


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The dimensions of BERT, with the names and defaults of config.json."""

    model_type: ClassVar[str] = "bert"

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None  # None: hidden_dropout_prob
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12

    def __post_init__(self):
        architecture.check_heads(self.hidden_size, self.num_attention_heads)
        activation(self.hidden_act)

    @property
    def head(self) -> HeadSpec:
        """The standard classification head."""
        return HEAD

    def width(self, output: str) -> int:
        """Return the size of the last axis of an output."""
        return self.hidden_size

    @property
    def head_dropout(self) -> float:
        """Dropout rate before the classifier."""
        return self.hidden_dropout_prob if self.classifier_dropout is None else self.classifier_dropout

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> BertConfig:
        """Return the configuration of a config.json.

        Raises:
            ValueError: a setting is not supported.
        """
        return architecture.from_hf(cls, config, model_type=cls.model_type, only=ENCODER_ONLY)

    def to_hf(self) -> dict[str, Any]:
        """Return the content of config.json, without ``architectures``."""
        return {"model_type": self.model_type, **dataclasses.asdict(self)}


ENCODER_ONLY = {
    "is_decoder": (False, None),
    "add_cross_attention": (False, None),
    "position_embedding_type": ("absolute", None),
    "embedding_size": (None,),
}


class Embeddings(nn.Module):
    """Sum of word, position and token-type embeddings, normalised: ids (B, L) to (B, L, D)."""

    config: BertConfig

    @nn.compact
    def __call__(
        self,
        input_ids: Ids,
        position_ids: Ids | Int[Array, "1 L"],
        token_type_ids: Ids | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "B L D"]:
        """Look up, add, normalise."""
        c = self.config
        if token_type_ids is None:
            token_type_ids = jnp.zeros((1, 1), jnp.int32)

        def table(size, name):
            init = nn.initializers.normal(c.initializer_range)
            return nn.Embed(size, c.hidden_size, embedding_init=init, name=name)

        x = table(c.vocab_size, "word")(input_ids)
        x += table(c.type_vocab_size, "token_type")(token_type_ids)
        x += table(c.max_position_embeddings, "position")(position_ids)
        x = nn.LayerNorm(c.layer_norm_eps, name="norm")(x)
        return Dropout(c.hidden_dropout_prob)(x, train=train)


class Layer(nn.Module):
    """Attention, then MLP; each is added to its input and the sum is normalised: (B, L, D) to (B, L, D)."""

    heads: int
    intermediate: int
    act: str
    dropout: float
    attention_dropout: float
    eps: float
    std: float

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], bias: Float[Array, "B 1 1 L"] | None = None, *, train: bool = False
    ) -> Float[Array, "B L D"]:
        """Transform hidden states; ``bias`` is from ``mask_bias``."""
        drop = Dropout(self.dropout)
        attention = Attention(self.heads, self.attention_dropout, std=self.std, name="attention")
        y = attention(x, bias, train=train)
        x = nn.LayerNorm(self.eps, name="attention_norm")(x + drop(y, train=train))
        y = Mlp(self.intermediate, self.act, self.std, name="mlp")(x)
        return nn.LayerNorm(self.eps, name="mlp_norm")(x + drop(y, train=train))


class Encoder(nn.Module):
    """The stack of layers: (B, L, D) to (B, L, D)."""

    config: BertConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], bias: Float[Array, "B 1 1 L"] | None = None, *, train: bool = False
    ) -> Float[Array, "B L D"]:
        """Apply every layer."""
        c = self.config
        for i in range(c.num_hidden_layers):
            x = Layer(
                c.num_attention_heads,
                c.intermediate_size,
                c.hidden_act,
                c.hidden_dropout_prob,
                c.attention_probs_dropout_prob,
                c.layer_norm_eps,
                c.initializer_range,
                name=f"layer_{i}",
            )(x, bias, train=train)
        return x


class Bert(nn.Module):
    """BERT encoder with its pooler.

    Returns ``sequence`` (B, L, D), the last hidden states; ``pooled`` (B, D), tanh of a dense layer on the first token;
    and ``features`` (B, D), the mean of the hidden states over the attention mask.
    """

    config: BertConfig

    @nn.compact
    def __call__(
        self,
        input_ids: Ids,
        attention_mask: Ids | None = None,
        token_type_ids: Ids | None = None,
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
        x = Embeddings(c, name="embeddings")(input_ids, jnp.arange(L)[None], token_type_ids, train=train)
        x = Encoder(c, name="encoder")(x, mask_bias(attention_mask), train=train)
        pooled = jnp.tanh(dense(c.hidden_size, "pooler", c.initializer_range)(x[:, 0]))
        return {"sequence": x, "pooled": pooled, "features": mean_over(x, attention_mask)}


def encoder_tensors(config: BertConfig) -> dict[str, Tensor]:
    """Name map of embeddings and encoder, shared with RoBERTa."""
    names = {
        "params/embeddings/word/embedding": Tensor("embeddings.word_embeddings.weight"),
        "params/embeddings/position/embedding": Tensor("embeddings.position_embeddings.weight"),
        "params/embeddings/token_type/embedding": Tensor("embeddings.token_type_embeddings.weight"),
    } | norm("embeddings/norm", "embeddings.LayerNorm")
    for i in range(config.num_hidden_layers):
        ours, theirs = f"encoder/layer_{i}", f"encoder.layer.{i}"
        for name in ("query", "key", "value"):
            names |= linear(f"{ours}/attention/{name}", f"{theirs}.attention.self.{name}")
        names |= linear(f"{ours}/attention/output", f"{theirs}.attention.output.dense")
        names |= norm(f"{ours}/attention_norm", f"{theirs}.attention.output.LayerNorm")
        names |= linear(f"{ours}/mlp/intermediate", f"{theirs}.intermediate.dense")
        names |= linear(f"{ours}/mlp/output", f"{theirs}.output.dense")
        names |= norm(f"{ours}/mlp_norm", f"{theirs}.output.LayerNorm")
    return names


def tensors(config: BertConfig) -> dict[str, Tensor]:
    """Name map: variable path to tensor in a Hugging Face file."""
    return encoder_tensors(config) | linear("pooler", "pooler.dense")


def example(config: Any) -> dict[str, np.ndarray]:
    """Return a batch of one text of one token."""
    return {"input_ids": np.zeros((1, 1), np.int32), "attention_mask": np.ones((1, 1), np.int32)}


TF_NAMES = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))

# Checkpoints of these shapes (hub id: layers x width, heads):
#   google-bert/bert-base-uncased, bert-base-cased: 12 x 768, 12      https://arxiv.org/abs/1810.04805
#   google-bert/bert-large-uncased: 24 x 1024, 16                     https://arxiv.org/abs/1810.04805
#   google/bert_uncased_L-2_H-128_A-2 (tiny) ... L-8_H-512_A-8        https://arxiv.org/abs/1908.08962
#   nreimers/MiniLM-L6-H384-uncased, sentence-transformers/all-MiniLM-L6-v2: 6 x 384, 12
#                                                                     https://arxiv.org/abs/2002.10957
#   BAAI/bge-small-en-v1.5: 12 x 384, 12                              https://arxiv.org/abs/2309.07597
ARCHITECTURE = Architecture(
    name="bert",
    config=BertConfig,
    module=Bert,
    tensors=tensors,
    prefix="bert.",
    head=HEAD,
    example=example,
    base_class="BertModel",
    ignored=(r"embeddings\.position_ids", r"embeddings\.token_type_ids", r"cls\..*", r"qa_outputs\..*"),
    renames=TF_NAMES,
    spans=span_spec("BertForQuestionAnswering", unused="params/pooler/.*"),
)
