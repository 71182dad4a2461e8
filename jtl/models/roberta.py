"""RoBERTa: BERT's encoder, trained longer on more text, with positions counted from the padding id.

Liu et al. 2019, "RoBERTa: A Robustly Optimized BERT Pretraining Approach", https://arxiv.org/abs/1907.11692.
Numerically equal to ``RobertaModel`` of ``transformers`` without its pooler.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from jtl.errors import InputError
from jtl.models.architecture import Architecture, HeadSpec, span_spec
from jtl.models.bert import TF_NAMES, BertConfig, Embeddings, Encoder, encoder_tensors, example
from jtl.models.parts.attention import mask_bias
from jtl.models.parts.layers import Ids, mean_over

HEAD = HeadSpec(
    "pooled",
    {"dense": "classifier.dense", "out": "classifier.out_proj"},
    "RobertaForSequenceClassification",
    hidden=True,
    activation="tanh",
    dropout=("dense", "out"),
)


@dataclasses.dataclass(frozen=True)
class RobertaConfig(BertConfig):
    """The dimensions of RoBERTa, with the names and defaults of config.json."""

    model_type: ClassVar[str] = "roberta"

    vocab_size: int = 50265
    pad_token_id: int = 1

    @property
    def head(self) -> HeadSpec:
        """The standard classification head."""
        return HEAD


def positions(input_ids: Ids, pad: int) -> Ids:
    """Number the real tokens pad + 1, pad + 2, ..., and padding ``pad``, as in fairseq."""
    real = (input_ids != pad).astype(jnp.int32)
    return jnp.cumsum(real, 1) * real + pad


class Roberta(nn.Module):
    """RoBERTa encoder.

    Returns ``sequence`` (B, L, D), the last hidden states; ``pooled`` (B, D), that of the first token; and ``features``
    (B, D), their mean over the attention mask.
    """

    config: RobertaConfig

    @nn.compact
    def __call__(
        self,
        input_ids: Ids,
        attention_mask: Ids | None = None,
        token_type_ids: Ids | None = None,
        *,
        train: bool = False,
    ) -> dict[str, Array]:
        """Encode; without ``attention_mask`` every position is attended to."""
        c = self.config
        L, longest = input_ids.shape[1], c.max_position_embeddings - c.pad_token_id - 1
        if L > longest:
            raise InputError(f"input_ids: length {L} exceeds {longest}, the positions past pad_token_id")
        position_ids = positions(input_ids, c.pad_token_id)
        x = Embeddings(c, name="embeddings")(input_ids, position_ids, token_type_ids, train=train)
        x = Encoder(c, name="encoder")(x, mask_bias(attention_mask), train=train)
        return {"sequence": x, "pooled": x[:, 0], "features": mean_over(x, attention_mask)}


# Checkpoints (hub id: layers x width, heads):
#   FacebookAI/roberta-base: 12 x 768, 12; roberta-large: 24 x 1024, 16      https://arxiv.org/abs/1907.11692
#   distilbert/distilroberta-base: 6 x 768, 12                               https://arxiv.org/abs/1910.01108
#   microsoft/codebert-base: 12 x 768, 12                                    https://arxiv.org/abs/2002.08155
#   sentence-transformers/all-distilroberta-v1: 6 x 768, 12                  https://arxiv.org/abs/1908.10084
ARCHITECTURE = Architecture(
    name="roberta",
    config=RobertaConfig,
    module=Roberta,
    tensors=encoder_tensors,
    prefix="roberta.",
    head=HEAD,
    example=example,
    base_class="RobertaModel",
    ignored=(
        r"embeddings\.position_ids",
        r"embeddings\.token_type_ids",
        r"pooler\..*",
        r"lm_head\..*",
        r"qa_outputs\..*",
    ),
    renames=TF_NAMES,
    spans=span_spec("RobertaForQuestionAnswering"),
)
