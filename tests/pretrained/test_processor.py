"""What a model's ``preprocessor_config.json`` asks for is what ``jtl.data.image`` does."""

import json

import jax
import numpy as np
import pytest

from jtl.data.encode.image import Preprocess
from jtl.pretrained import image_processor, save, scratch

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
FILES = {
    "vit": ("vit", {"size": {"height": 30, "width": 30}, "resample": 2, **HALF}),
    "old vit": ("vit", {"size": 30, **HALF}),
    "wide": ("vit", {"size": {"height": 24, "width": 40}, "resample": 3, **IMAGENET}),
    "dinov2": (
        "dinov2",
        {
            "size": {"shortest_edge": 36},
            "crop_size": {"height": 28, "width": 28},
            "do_center_crop": True,
            "resample": 3,
            **IMAGENET,
        },
    ),
    "resnet": (
        "resnet",
        {
            "image_processor_type": "ConvNextImageProcessor",
            "size": 28,
            "crop_pct": 0.77,
            "resample": 3,
            **IMAGENET,
        },
    ),
    "convnext": (
        "convnext",
        {"feature_extractor_type": "ConvNextFeatureExtractor", "size": {"shortest_edge": 28}, **IMAGENET},
    ),
    "large convnext": (
        "convnext",
        {
            "image_processor_type": "ConvNextImageProcessor",
            "size": {"shortest_edge": 384},
            "resample": 3,
            **IMAGENET,
        },
    ),
    "deit": ("deit", {"size": 36, "crop_size": 28, "do_center_crop": True, "resample": 3, **IMAGENET}),
}
WANTED = {
    "vit": ((30, 30), None, "bilinear"),
    "old vit": ((30, 30), None, "bilinear"),
    "wide": ((24, 40), None, "bicubic"),
    "dinov2": ((28, 28), 36, "bicubic"),
    "deit": ((28, 28), 36, "bicubic"),
    "resnet": ((28, 28), 36, "bicubic"),
    "convnext": ((28, 28), 32, "bicubic"),
    "large convnext": ((384, 384), None, "bicubic"),
}


def folder_of(path, kind, settings):
    (path / "config.json").write_text(json.dumps({"model_type": kind}))
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize("case", FILES)
def test_settings(case, tmp_path):
    kind, settings = FILES[case]
    found = Preprocess(**image_processor(folder_of(tmp_path, kind, settings)))
    assert (found.size, found.shortest, found.resample) == WANTED[case]
    assert found.mean == tuple(settings["image_mean"]) and found.std == tuple(settings["image_std"])


def test_other_sizes_cut_off_the_same_share():
    how = Preprocess((28, 28), (0.5,), (0.5,), shortest=36)
    assert how.resized(56) == Preprocess((56, 56), (0.5,), (0.5,), shortest=72)
    assert Preprocess((28, 28), (0.5,), (0.5,)).resized(8).shortest is None


def test_models_that_need_no_file():
    assert Preprocess(**image_processor("efficientnet-lite0")).size == (224, 224)
    dinov2 = Preprocess(**image_processor("dinov2-small-focus"))
    assert (dinov2.size, dinov2.shortest, dinov2.resample) == ((224, 224), 256, "bicubic")
    assert Preprocess(**image_processor("vgg16")).std == (1 / 255,) * 3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"image_mean": None}, "lacks image_mean"),
        ({"size": None}, "lacks size"),
        ({"do_normalize": False}, "do_normalize is false"),
        ({"rescale_factor": 1.0}, "rescale_factor is 1.0"),
        ({"resample": 5}, "resample 5 is not supported"),
    ],
)
def test_refused(change, says, tmp_path):
    settings = {"size": 30, **HALF, **change}
    with pytest.raises(ValueError, match=says):
        image_processor(folder_of(tmp_path, "vit", settings))


def test_without_the_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(FileNotFoundError, match="has no preprocessor_config.json"):
        image_processor(tmp_path)


def test_a_saved_model_keeps_it(tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    folder_of(tmp_path, "vit", FILES["vit"][1])
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "image_size": 32, **sizes}))
    saved = save(scratch(tmp_path, key=jax.random.key(0)), tmp_path / "saved", tokenizer=tmp_path)
    assert image_processor(saved) == image_processor(tmp_path)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", FILES)
def test_pixels_are_those_of_transformers(case, tmp_path):
    from skimage.data import chelsea
    from transformers import (
        BitImageProcessorPil,
        ConvNextImageProcessorPil,
        DeiTImageProcessorPil,
        ViTImageProcessorPil,
    )

    kind, settings = FILES[case]
    theirs = {
        "vit": ViTImageProcessorPil,
        "dinov2": BitImageProcessorPil,
        "deit": DeiTImageProcessorPil,
        "resnet": ConvNextImageProcessorPil,
        "convnext": ConvNextImageProcessorPil,
    }[kind]
    photo = chelsea()[:, :300] if kind == "deit" else chelsea()  # a square: see image_processor
    how = Preprocess(**image_processor(folder_of(tmp_path, kind, settings)))
    ours = how.normalise(how.resize(photo)[None])[0]
    expected = theirs(**settings)(photo, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    np.testing.assert_allclose(ours, expected, atol=1.01 / 255 / min(how.std))
