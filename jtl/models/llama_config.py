"""Configuration of Llama, Mistral, Qwen2 and Qwen3, and the differences between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from jtl.errors import InputError
from jtl.models import architecture
from jtl.models.architecture import HeadSpec
from jtl.models.parts import cache, rope, scan
from jtl.models.parts.layers import activation

NOT_COMPUTED = {"attention_dropout": (0.0, None), "quantization_config": (None,)}


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The dimensions of Llama, with the names and defaults of config.json."""

    model_type: ClassVar[str] = "llama"
    task: ClassVar[str] = "Llama"  # how class names in ``transformers`` begin
    # Fields that this family's config.json lacks, with the values that do not change the computation.
    only: ClassVar[dict[str, tuple]] = {"sliding_window": (None,), "layer_types": (None,)}
    qk_norm: ClassVar[bool] = False
    head_dropout: ClassVar[float] = 0.0

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # None: num_attention_heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: rope.Linear | rope.Llama3 | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None  # which layers use the window; None: all
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = None
    scan_layers: bool = False  # jtl's own: see jtl.models.parts.scan

    def __post_init__(self):
        if self.head_dim is None:
            architecture.check_heads(self.hidden_size, self.num_attention_heads)
        if self.num_attention_heads % self.groups:
            raise InputError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of num_key_value_heads={self.groups}"
            )
        if self.per_head % 2:
            raise InputError(
                f"rotary positions turn pairs: the size of a head must be even, got {self.per_head}"
            )
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            raise InputError(
                f"layer_types names {len(self.layer_types)} layers, num_hidden_layers is {self.num_hidden_layers}"
            )
        if unknown := {*(self.layer_types or ())} - {"full_attention", "sliding_attention"}:
            raise InputError(
                f"layer_types has {sorted(unknown)}; supported: 'full_attention', 'sliding_attention'"
            )
        activation(self.hidden_act)

    @property
    def groups(self) -> int:
        """Number of key-value heads, K."""
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def per_head(self) -> int:
        """Size of a head, E."""
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

    @property
    def biases(self) -> tuple[bool, bool]:
        """Whether query, key and value have biases, and whether the output of attention has one."""
        return self.attention_bias, self.attention_bias

    def window(self, layer: int) -> int | None:
        """Return how many tokens the attention of a layer sees, including the query; None for all before it."""
        types = self.layer_types
        return self.sliding_window if types is None or types[layer] == "sliding_attention" else None

    @property
    def head(self) -> HeadSpec:
        """The standard classification head, on the last real token."""
        return HeadSpec("features", {"out": "score"}, f"{self.task}ForSequenceClassification", bias=False)

    def width(self, output: str) -> int:
        """Return the size of the last axis of an output."""
        return self.vocab_size if output == "token_logits" else self.hidden_size

    def cache(self, rows: int, length: int, dtype: Any) -> dict[str, Any]:
        """Return an empty ``cache`` collection: keys and values of up to ``length`` tokens of ``rows`` texts.

        In ``Model.variables`` it makes every forward read its ``input_ids`` as the continuation of the cached tokens.
        """
        shape = (rows, length, self.groups, self.per_head)
        layers = {
            f"layer_{i}": {"attention": cache.keys_and_values(*shape, dtype=dtype)}
            for i in range(self.num_hidden_layers)
        }
        return cache.empty(rows, length, decoder=scan.stacked(layers) if self.scan_layers else layers)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """Return the configuration of a config.json.

        Raises:
            ValueError: a setting is not supported.
        """
        settings = {**config, **rope.from_hf(config)}
        return architecture.from_hf(cls, settings, model_type=cls.model_type, only=cls.only | NOT_COMPUTED)

    def to_hf(self) -> dict[str, Any]:
        """Return the content of config.json, without ``architectures``."""
        fields = {name: value for name, value in dataclasses.asdict(self).items() if name not in self.only}
        del fields["scan_layers"]
        return {"model_type": self.model_type, **fields, "rope_scaling": rope.to_hf(self.rope_scaling)}


@dataclasses.dataclass(frozen=True)
class MistralConfig(LlamaConfig):
    """The dimensions of Mistral, with the names and defaults of config.json."""

    model_type: ClassVar[str] = "mistral"
    task: ClassVar[str] = "Mistral"
    only: ClassVar[dict[str, tuple]] = {
        name: (False, None) for name in ("attention_bias", "mlp_bias", "layer_types")
    }

    intermediate_size: int = 14336
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 131072

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """Return the configuration of a config.json.

        Raises:
            ValueError: a setting is not supported.
        """
        return super().from_hf({"sliding_window": 4096, **config})


@dataclasses.dataclass(frozen=True)
class Qwen2Config(LlamaConfig):
    """The dimensions of Qwen2, with the names and defaults of config.json."""

    model_type: ClassVar[str] = "qwen2"
    task: ClassVar[str] = "Qwen2"
    only: ClassVar[dict[str, tuple]] = {"attention_bias": (True, None), "mlp_bias": (False, None)}

    vocab_size: int = 151936
    intermediate_size: int = 22016
    num_key_value_heads: int | None = 32
    max_position_embeddings: int = 32768
    attention_bias: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    @property
    def biases(self) -> tuple[bool, bool]:
        """Query, key and value have biases."""
        return self.attention_bias, False

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """Return the configuration of a config.json.

        Raises:
            ValueError: a setting is not supported.
        """
        window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
        types, layers = config.get("layer_types"), config.get("num_hidden_layers", cls.num_hidden_layers)
        first = config.get("max_window_layers", 28)
        if window is None:
            types = None
        elif types is None:
            types = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
        return super().from_hf({**config, "sliding_window": window, "layer_types": types})

    def to_hf(self) -> dict[str, Any]:
        """Return the content of config.json, without ``architectures``."""
        return {**super().to_hf(), "use_sliding_window": self.sliding_window is not None}


@dataclasses.dataclass(frozen=True)
class Qwen3Config(Qwen2Config):
    """The dimensions of Qwen3, with the names and defaults of config.json."""

    model_type: ClassVar[str] = "qwen3"
    task: ClassVar[str] = "Qwen3"
    only: ClassVar[dict[str, tuple]] = {"mlp_bias": (False, None)}
    qk_norm: ClassVar[bool] = True

    head_dim: int | None = 128
    attention_bias: bool = False

    @property
    def biases(self) -> tuple[bool, bool]:
        """``attention_bias`` for query, key, value and output."""
        return self.attention_bias, self.attention_bias
