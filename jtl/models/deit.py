"""DeiT: a ViT with a second special token, the distillation token.

Touvron et al. 2021, "Training data-efficient image transformers & distillation through attention",
https://arxiv.org/abs/2012.12877. Numerically equal to ``DeiTModel`` of ``transformers``.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from jaxtyping import Array

from jtl.models import vit
from jtl.models.architecture import Architecture, HeadSpec, Tensor
from jtl.models.parts.layers import Images

HEAD = HeadSpec("pooled", {"out": "classifier"}, "DeiTForImageClassification")


@dataclasses.dataclass(frozen=True)
class DeiTConfig(vit.ViTConfig):
    """The dimensions of DeiT: those of a ViT."""

    model_type: ClassVar[str] = "deit"

    @property
    def head(self) -> HeadSpec:
        """The standard classification head."""
        return HEAD


class DeiT(vit.ViT):
    """Vision transformer with a distillation token.

    Returns what ``ViT`` returns, with ``sequence`` (B, 2 + patches, D), and ``distillation`` (B, D), the normalised
    last hidden state of that token, which a head distilled from a teacher reads.
    """

    tokens: tuple[str, ...] = ("cls_token", "distillation_token")

    def __call__(self, image: Images, *, train: bool = False) -> dict[str, Array]:
        """Encode normalised images of any size."""
        outputs = super().__call__(image, train=train)
        return {**outputs, "distillation": outputs["sequence"][:, 1]}


def tensors(config: DeiTConfig) -> dict[str, Tensor]:
    """Name map: variable path to tensor in a Hugging Face file."""
    token = {"params/embeddings/distillation_token": Tensor("embeddings.distillation_token")}
    return vit.tensors(config) | token


# Checkpoints of https://arxiv.org/abs/2012.12877 (hub id: layers x width, heads, patch, image):
#   facebook/deit-tiny-distilled-patch16-224: 12 x 192, 3, 16, 224
#   facebook/deit-small-distilled-patch16-224: 12 x 384, 6, 16, 224
#   facebook/deit-base-distilled-patch16-224, -384: 12 x 768, 12, 16
# The ones without "distilled" in their name are ViTs, also by their model_type.
ARCHITECTURE = Architecture(
    name="deit",
    config=DeiTConfig,
    module=DeiT,
    tensors=tensors,
    prefix="deit.",
    head=HEAD,
    example=vit.example,
    base_class="DeiTModel",
    ignored=(*vit.ARCHITECTURE.ignored, r"(cls|distillation)_classifier\..*"),
    renames=vit.V5_NAMES,
    in_memory=vit.IN_MEMORY,
)
