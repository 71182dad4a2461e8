"""Flax modules of pretrained architectures, one per file, with name maps to Hugging Face files."""

from jtl.models import (
    bert,
    clip,
    convnext,
    deit,
    dinov2,
    distilbert,
    efficientnet_lite,
    feature_pyramid,
    gpt2,
    llama,
    resnet,
    roberta,
    t5,
    unet,
    vgg,
    vit,
    wav2vec2,
    whisper,
)
from jtl.models.architecture import Architecture
from jtl.models.parts import scan

__all__ = ["ARCHITECTURES", "Architecture", "feature_pyramid", "scan", "unet"]

ARCHITECTURES: dict[str, Architecture] = {  # by ``model_type`` of config.json
    a.name: a
    for a in (
        bert.ARCHITECTURE,
        roberta.ARCHITECTURE,
        distilbert.ARCHITECTURE,
        vit.ARCHITECTURE,
        deit.ARCHITECTURE,
        dinov2.ARCHITECTURE,
        dinov2.WITH_REGISTERS,
        efficientnet_lite.ARCHITECTURE,
        resnet.ARCHITECTURE,
        convnext.ARCHITECTURE,
        convnext.V2,
        vgg.ARCHITECTURE,
        clip.ARCHITECTURE,
        *llama.ARCHITECTURES,
        gpt2.ARCHITECTURE,
        t5.ARCHITECTURE,
        whisper.ARCHITECTURE,
        *wav2vec2.ARCHITECTURES,
    )
}
