"""Configuration of T5, and the cache of its decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import jax.numpy as jnp

from jtl.errors import InputError
from jtl.models import architecture
from jtl.models.architecture import HeadSpec
from jtl.models.parts import cache, scan
from jtl.models.parts.layers import activation

# The head in transformers, an MLP on the decoder's last state, differs from the linear one on ``features``.
HEAD = HeadSpec("features", {}, "T5ForSequenceClassification")
ONLY = {"is_decoder": (False, None), "is_encoder_decoder": (True, None), "quantization_config": (None,)}


@dataclasses.dataclass(frozen=True)
class T5Config:
    """The dimensions of T5, with the names and defaults of config.json.

    The paper's T5 ties its last layer to the embeddings and scales that layer's input; T5 1.1 and Flan-T5 do neither.
    Files of ``transformers`` v4 express both by ``tie_word_embeddings``, those of v5 only the scaling, by
    ``scale_decoder_outputs``.
    """

    model_type: ClassVar[str] = "t5"
    head: ClassVar[HeadSpec] = HEAD
    head_dropout: ClassVar[float] = 0.0

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int | None = None  # None: num_layers
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    feed_forward_proj: str = "relu"
    scale_decoder_outputs: bool = True
    tie_word_embeddings: bool = True
    decoder_start_token_id: int = 0
    eos_token_id: int | tuple[int, ...] | None = 1
    pad_token_id: int | None = 0
    scan_layers: bool = False  # jtl's own: see jtl.models.parts.scan

    def __post_init__(self):
        if self.num_decoder_layers is None:
            object.__setattr__(self, "num_decoder_layers", self.num_layers)
        count, furthest = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if count < 4 or furthest <= count // 2:
            raise InputError(
                f"relative_attention_num_buckets={count} must be at least 4, and relative_attention_max_distance="
                f"{furthest} more than half of that"
            )
        kind = self.feed_forward_proj.removeprefix("gated-")
        if "-" in kind:
            raise InputError(
                f"feed_forward_proj={self.feed_forward_proj!r} is unknown: expected an activation, or gated- and one"
            )
        activation(kind)

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate."""
        return self.feed_forward_proj.startswith("gated-")

    @property
    def activation(self) -> str:
        """Activation of the MLP; ``gated-gelu`` is the tanh approximation."""
        kind = self.feed_forward_proj.removeprefix("gated-")
        return "gelu_new" if self.feed_forward_proj == "gated-gelu" else kind

    def width(self, output: str) -> int:
        """Return the size of the last axis of an output."""
        return self.vocab_size if output == "token_logits" else self.d_model

    def cache(self, rows: int, length: int, dtype: Any) -> dict[str, Any]:
        """Return an empty ``cache`` collection for up to ``length`` tokens of ``rows`` texts, and for their inputs.

        In ``Model.variables`` it makes every forward read its ``decoder_input_ids`` as the continuation of the cached
        tokens. A forward with ``input_ids`` stores the keys and values of the encoder's output; later forwards do
        without.
        """

        def kept(positions: int) -> dict[str, Any]:
            return cache.keys_and_values(rows, positions, self.num_heads, self.d_kv, dtype=dtype)

        layers = {
            f"layer_{i}": {
                "attention": kept(length),
                "cross_attention": kept(0),
            }  # grows to the length of the input text
            for i in range(self.num_decoder_layers or 0)
        }
        decoder = scan.stacked(layers) if self.scan_layers else layers
        return cache.empty(rows, length, heard=jnp.zeros((rows, 0), bool), decoder=decoder)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> T5Config:
        """Return the configuration of a config.json.

        Raises:
            ValueError: a setting is not supported.
        """
        tied = config.get("tie_word_embeddings") is not False
        settings = {"scale_decoder_outputs": tied, **config, "tie_word_embeddings": tied}
        return architecture.from_hf(cls, settings, model_type=cls.model_type, only=ONLY)

    def settled(self, keys: Collection[str]) -> T5Config:
        """Return the configuration of a file with these tensors: a separate last layer means that it is not tied.

        Files of the paper's T5 may also have one, a copy of the embeddings.
        """
        if self.scale_decoder_outputs:
            return self
        return dataclasses.replace(self, tie_word_embeddings="lm_head.weight" not in keys)

    def to_hf(self) -> dict[str, Any]:
        """Return the content of config.json, without ``architectures``."""
        fields = dataclasses.asdict(self) | {"tie_word_embeddings": self.scale_decoder_outputs}
        del fields["scan_layers"]
        return {"model_type": self.model_type, "is_encoder_decoder": True, **fields}
