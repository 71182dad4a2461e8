"""Configuration of Wav2Vec2 and HuBERT."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from jtl.errors import InputError
from jtl.models import architecture
from jtl.models.architecture import HeadSpec
from jtl.models.parts.layers import activation

ONLY = {
    "add_adapter": (False, None),
    "adapter_attn_dim": (None,),
    "conv_pos_batch_norm": (False, None),
    "use_weighted_layer_sum": (False, None),
    "quantization_config": (None,),
}
UNUSED = {"layerdrop": 0.0, "mask_time_prob": 0.0, "mask_feature_prob": 0.0, "apply_spec_augment": False}


@dataclasses.dataclass(frozen=True)
class Wav2Vec2Config:
    """The dimensions of Wav2Vec2, with the names and defaults of config.json.

    Attributes:
        ctc: whether it has the layer over characters; in config.json, whether ``architectures`` names a class
            ``...ForCTC``.
    """

    model_type: ClassVar[str] = "wav2vec2"
    task: ClassVar[str] = "Wav2Vec2"  # how class names in ``transformers`` begin
    head_dropout: ClassVar[float] = 0.0
    feat_proj_layer_norm: ClassVar[bool] = True

    vocab_size: int = 32
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout: float = 0.1
    activation_dropout: float = 0.1
    attention_dropout: float = 0.1
    feat_proj_dropout: float = 0.0
    final_dropout: float = 0.1
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    feat_extract_norm: str = "group"
    feat_extract_activation: str = "gelu"
    conv_dim: tuple[int, ...] = (512, 512, 512, 512, 512, 512, 512)
    conv_stride: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    conv_kernel: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_bias: bool = False
    num_conv_pos_embeddings: int = 128
    num_conv_pos_embedding_groups: int = 16
    do_stable_layer_norm: bool = False
    pad_token_id: int = 0  # CTC's blank
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    classifier_proj_size: int = 256  # width of the projection before the classifier
    ctc: bool = False

    def __post_init__(self):
        architecture.check_heads(self.hidden_size, self.num_attention_heads)
        if self.feat_extract_norm not in ("group", "layer"):
            raise InputError(
                f"feat_extract_norm={self.feat_extract_norm!r} is unknown; supported: 'group', 'layer'"
            )
        if not len(self.conv_dim) == len(self.conv_kernel) == len(self.conv_stride):
            raise InputError(
                f"conv_dim, conv_kernel and conv_stride name {len(self.conv_dim)}, {len(self.conv_kernel)} and "
                f"{len(self.conv_stride)} convolutions"
            )
        if self.hidden_size % self.num_conv_pos_embedding_groups:
            raise InputError(
                f"hidden size {self.hidden_size} is not a multiple of num_conv_pos_embedding_groups="
                f"{self.num_conv_pos_embedding_groups}"
            )
        activation(self.hidden_act)
        activation(self.feat_extract_activation)

    @property
    def head(self) -> HeadSpec:
        """A projection and a classifier; ``transformers`` averages over time between them, which is equivalent."""
        return HeadSpec(
            "features",
            {"dense": "projector", "out": "classifier"},
            f"{self.task}ForSequenceClassification",
            hidden=True,
            activation="identity",
            width=self.classifier_proj_size,
        )

    @property
    def shortest(self) -> int:
        """Number of samples that one frame sees."""
        samples = 1
        for kernel, stride in zip(reversed(self.conv_kernel), reversed(self.conv_stride), strict=True):
            samples = (samples - 1) * stride + kernel
        return samples

    def frames(self, samples: Any) -> Any:
        """Return how many frames the convolutions make of ``samples``, a number or an array."""
        for kernel, stride in zip(self.conv_kernel, self.conv_stride, strict=True):
            samples = (samples - kernel) // stride + 1
        return samples

    def width(self, output: str) -> int:
        """Return the size of the last axis of an output."""
        return self.vocab_size if output == "token_logits" else self.hidden_size

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Wav2Vec2Config:
        """Return the configuration of a config.json.

        Raises:
            ValueError: a setting is not supported.
        """
        ctc = any(name.endswith("ForCTC") for name in config.get("architectures") or ())
        return architecture.from_hf(cls, {**config, "ctc": ctc}, model_type=cls.model_type, only=ONLY)

    def to_hf(self) -> dict[str, Any]:
        """Return the content of config.json; settings that mask and skip in training are dropped."""
        fields = dataclasses.asdict(self)
        kind = f"{self.task}ForCTC" if fields.pop("ctc") else f"{self.task}Model"
        count = len(self.conv_dim)
        return {
            "model_type": self.model_type,
            "architectures": [kind],
            "num_feat_extract_layers": count,
            **fields,
            **UNUSED,
        }


@dataclasses.dataclass(frozen=True)
class HubertConfig(Wav2Vec2Config):
    """The dimensions of HuBERT, with the names and defaults of config.json."""

    model_type: ClassVar[str] = "hubert"
    task: ClassVar[str] = "Hubert"

    feat_proj_layer_norm: bool = True  # type: ignore[misc]
