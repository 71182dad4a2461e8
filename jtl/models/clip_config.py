"""Configuration of CLIP's image and text encoders."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from jtl.errors import InputError
from jtl.models import architecture
from jtl.models.architecture import HeadSpec
from jtl.models.parts.layers import activation
from jtl.models.parts.patches import pair

# The task class of ``transformers`` has only the image encoder: see jtl.models.clip.vision_tower.
VISION_HEAD = HeadSpec("pooled", {"out": "classifier"}, "CLIPForImageClassification")
HEAD = HeadSpec("pooled", {"out": "classifier"}, "CLIPModelForImageClassification")
LEGACY_EOS = 2  # in older configurations, whose texts end with the largest id


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """The dimensions common to both encoders, with the names of config.json."""

    model_type: ClassVar[str]

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0
    initializer_range: float = 0.02

    def __post_init__(self):
        architecture.check_heads(self.hidden_size, self.num_attention_heads)
        activation(self.hidden_act)


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig(TowerConfig):
    """The dimensions of the text encoder.

    Attributes:
        eos_token_id: the token whose state represents a text; 2, an old error, means the largest id in the text.
    """

    model_type: ClassVar[str] = "clip_text_model"

    vocab_size: int = 49408
    max_position_embeddings: int = 77
    pad_token_id: int | None = 1
    bos_token_id: int | None = 49406
    eos_token_id: int = 49407


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig(TowerConfig):
    """The dimensions of the image encoder."""

    model_type: ClassVar[str] = "clip_vision_model"

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int | tuple[int, int] = 224
    patch_size: int | tuple[int, int] = 32

    def grid(self) -> tuple[int, int]:
        """Return rows and columns of patches of an image of the native size."""
        (H, W), (h, w) = pair(self.image_size), pair(self.patch_size)
        return H // h, W // w


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """The dimensions of both encoders, with the names and defaults (ViT-B/32) of config.json.

    Attributes:
        towers: jtl's own setting: "both", or "vision" for the image encoder alone, without its projection. In
            config.json ``architectures`` says so: ``CLIPForImageClassification`` of ``transformers`` has only that.
    """

    model_type: ClassVar[str] = "clip"
    head_dropout: ClassVar[float] = 0.0

    text: CLIPTextConfig = CLIPTextConfig()
    vision: CLIPVisionConfig = CLIPVisionConfig()
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592
    towers: str = "both"

    def __post_init__(self):
        if self.towers not in ("both", "vision"):
            raise InputError(f"towers={self.towers!r} is unknown; expected 'both' or 'vision'")

    @property
    def head(self) -> HeadSpec:
        """The standard classification head: one linear layer on the mean over patches."""
        return HEAD if self.towers == "both" else VISION_HEAD

    def width(self, output: str) -> int:
        """Return the size of the last axis of an output."""
        if output in ("image_embeds", "text_embeds") or (output == "features" and self.towers == "both"):
            return self.projection_dim
        return self.text.hidden_size if output == "text_sequence" else self.vision.hidden_size

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> CLIPConfig:
        """Return the configuration of a config.json.

        Raises:
            ValueError: a setting is not supported.
        """
        kinds: dict[str, type[TowerConfig]] = {"text": CLIPTextConfig, "vision": CLIPVisionConfig}
        parts: dict[str, Any] = {}
        for name, kind in kinds.items():
            # Where an old file has both spellings, transformers also uses the ``_dict`` one.
            written = config.get(f"{name}_config_dict") or config.get(f"{name}_config") or {}
            if isinstance(ends := written.get("eos_token_id"), list | tuple):
                raise InputError(
                    f"config.json: eos_token_id={ends!r} is not supported for clip; expected one id"
                )
            parts[name] = architecture.from_hf(kind, written, model_type=kind.model_type)
        if VISION_HEAD.task_class in (config.get("architectures") or ()):
            parts["towers"] = "vision"
        own = {
            key: config[key]
            for key in ("projection_dim", "logit_scale_init_value", "model_type")
            if key in config
        }
        return dataclasses.replace(architecture.from_hf(cls, own, model_type=cls.model_type), **parts)

    def to_hf(self) -> dict[str, Any]:
        """Return the content of config.json, without ``architectures``."""
        return {
            "model_type": self.model_type,
            "projection_dim": self.projection_dim,
            "logit_scale_init_value": self.logit_scale_init_value,
            "text_config": self._part(self.text),
            "vision_config": self._part(self.vision),
        }

    def _part(self, part: TowerConfig) -> dict[str, Any]:
        fields = {"projection_dim": self.projection_dim, **dataclasses.asdict(part)}
        return {"model_type": part.model_type, **fields}
