"""The dimensions of a Whisper: what its config.json says, and the cache of its decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from jtl.models import architecture, cache
from jtl.models.architecture import HeadSpec
from jtl.models.layers import activation

# The head that transformers has, a projection before the mean over time, is not the linear one on `features`.
HEAD = HeadSpec("features", {}, "WhisperForAudioClassification")
NO_RATE = (0.0, None)
ONLY = {
    "scale_embedding": (False, None),
    "tie_word_embeddings": (True, None),
    "attention_dropout": NO_RATE,
    "activation_dropout": NO_RATE,
    "encoder_layerdrop": NO_RATE,
    "decoder_layerdrop": NO_RATE,
    "apply_spec_augment": (False, None),
    "quantization_config": (None,),
}


@dataclasses.dataclass(frozen=True)
class WhisperConfig:
    """The dimensions of a Whisper, under their names and with their defaults in config.json."""

    model_type: ClassVar[str] = "whisper"
    head: ClassVar[HeadSpec] = HEAD
    head_dropout: ClassVar[float] = 0.0

    vocab_size: int = 51865
    num_mel_bins: int = 80
    d_model: int = 384
    encoder_layers: int = 4
    encoder_attention_heads: int = 6
    encoder_ffn_dim: int = 1536
    decoder_layers: int = 4
    decoder_attention_heads: int = 6
    decoder_ffn_dim: int = 1536
    activation_function: str = "gelu"
    dropout: float = 0.0
    init_std: float = 0.02
    max_source_positions: int = 1500  # of the encoder: two frames of the spectrogram each
    max_target_positions: int = 448
    decoder_start_token_id: int = 50257
    bos_token_id: int | None = 50256
    eos_token_id: int = 50256
    pad_token_id: int | None = 50256
    suppress_tokens: tuple[int, ...] | None = None  # never written in a transcript
    begin_suppress_tokens: tuple[int, ...] | None = (220, 50256)  # nor at its start

    def __post_init__(self):
        architecture.check_heads(self.d_model, self.encoder_attention_heads)
        architecture.check_heads(self.d_model, self.decoder_attention_heads)
        activation(self.activation_function)

    def width(self, output: str) -> int:
        """Size of the last axis of an output."""
        return self.vocab_size if output == "token_logits" else self.d_model

    def cache(self, rows: int, length: int, dtype: Any) -> dict[str, Any]:
        """An empty `cache` collection: keys and values of up to `length` tokens of `rows` texts, and of their sounds.

        In `Model.variables` it makes every forward read its tokens as what follows those in the cache. A forward with
        `log_mel` keeps what the decoder's layers look up in it; later ones come without.
        """
        heads, size = self.decoder_attention_heads, self.d_model // self.decoder_attention_heads

        def kept(positions: int) -> dict[str, Any]:
            return cache.keys_and_values(rows, positions, heads, size, dtype=dtype)

        layers = {
            f"layer_{i}": {"attention": kept(length), "cross_attention": kept(self.max_source_positions)}
            for i in range(self.decoder_layers)
        }
        return cache.empty(rows, length, decoder=layers)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> WhisperConfig:
        """From the dict of config.json. Raises ValueError for a setting this module does not compute."""
        return architecture.from_hf(cls, config, model_type=cls.model_type, only=ONLY)

    def to_hf(self) -> dict[str, Any]:
        """The dict of config.json, without `architectures`."""
        return {"model_type": self.model_type, **dataclasses.asdict(self)}
