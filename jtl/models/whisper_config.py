"""Configuration of Whisper, and the cache of its decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from jtl.models import architecture
from jtl.models.architecture import HeadSpec
from jtl.models.parts import cache
from jtl.models.parts.layers import activation

# The head in transformers, a projection before the mean over time, differs from the linear one on ``features``.
HEAD = HeadSpec("features", {}, "WhisperForAudioClassification")
MULTILINGUAL = 51865  # size of the smallest vocabulary with languages and translation
OTHERS = 51765  # tokens other than languages in the English-only vocabulary
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
    """The dimensions of Whisper, with the names and defaults of config.json."""

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
    max_source_positions: int = 1500  # of the encoder; each covers two frames of the spectrogram
    max_target_positions: int = 448
    decoder_start_token_id: int = 50257
    bos_token_id: int | None = 50256
    eos_token_id: int = 50256
    pad_token_id: int | None = 50256
    suppress_tokens: tuple[int, ...] | None = None  # never generated
    begin_suppress_tokens: tuple[int, ...] | None = (220, 50256)  # not generated at the start of a transcript

    def __post_init__(self):
        architecture.check_heads(self.d_model, self.encoder_attention_heads)
        architecture.check_heads(self.d_model, self.decoder_attention_heads)
        activation(self.activation_function)

    @property
    def multilingual(self) -> bool:
        """Whether it knows several languages and translates."""
        return self.vocab_size >= MULTILINGUAL

    def width(self, output: str) -> int:
        """Return the size of the last axis of an output."""
        return self.vocab_size if output == "token_logits" else self.d_model

    def cache(self, rows: int, length: int, dtype: Any) -> dict[str, Any]:
        """Return an empty ``cache`` collection for up to ``length`` tokens of ``rows`` texts, and for their audio.

        In ``Model.variables`` it makes every forward read its tokens as the continuation of the cached ones. A forward
        with ``log_mel`` stores the keys and values of the encoder's output; later forwards do without.
        """
        heads, size = self.decoder_attention_heads, self.d_model // self.decoder_attention_heads

        def kept(positions: int) -> dict[str, Any]:
            return cache.keys_and_values(rows, positions, heads, size, dtype=dtype)

        layers = {
            f"layer_{i}": {"attention": kept(length), "cross_attention": kept(self.max_source_positions)}
            for i in range(self.decoder_layers)
        }
        return cache.empty(rows, length, decoder=layers)

    def generation(self) -> dict[str, Any]:
        """Return the generation_config.json with which ``transformers`` transcribes like ``jtl.tasks.transcribe``.

        The tokens of languages, tasks and times follow the end-of-text token, in the order of the paper's code
        (https://github.com/openai/whisper/blob/main/whisper/tokenizer.py). For a vocabulary of another size they are
        left out.
        """
        ids = {
            "bos_token_id": self.bos_token_id,
            "decoder_start_token_id": self.decoder_start_token_id,
            "eos_token_id": self.eos_token_id,
            "pad_token_id": self.pad_token_id,
            "max_length": self.max_target_positions,
            "begin_suppress_tokens": _listed(self.begin_suppress_tokens),
            "suppress_tokens": _listed(self.suppress_tokens),
        }
        languages = self.vocab_size - OTHERS - self.multilingual
        if languages not in (99, 100):
            return ids
        behind = self.eos_token_id + 2 + languages  # after the start-of-text token and the languages
        names = ("translate", "transcribe", "startoflm", "startofprev", "nospeech", "notimestamps")
        at = {name: behind + i for i, name in enumerate(names)}
        ids |= {
            "is_multilingual": self.multilingual,
            "max_initial_timestamp_index": 50,  # in steps of 0.02 s: the first words begin within a second
            "no_timestamps_token_id": at["notimestamps"],
            "prev_sot_token_id": at["startofprev"],
            "return_timestamps": False,
        }
        if not self.multilingual:
            return ids
        from transformers.models.whisper.tokenization_whisper import LANGUAGES  # in the order of their tokens

        spoken = list(LANGUAGES)[:languages]
        return ids | {
            "lang_to_id": {f"<|{name}|>": self.eos_token_id + 2 + i for i, name in enumerate(spoken)},
            "task_to_id": {name: at[name] for name in ("transcribe", "translate")},
        }

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> WhisperConfig:
        """Return the configuration of a config.json.

        Raises:
            ValueError: a setting is not supported.
        """
        return architecture.from_hf(cls, config, model_type=cls.model_type, only=ONLY)

    def to_hf(self) -> dict[str, Any]:
        """Return the content of config.json, without ``architectures``."""
        return {"model_type": self.model_type, **dataclasses.asdict(self)}


def _listed(tokens: tuple[int, ...] | None) -> list[int] | None:
    return None if tokens is None else list(tokens)
