"""``finetune`` for real, as short as ``--quick`` makes it."""

import json

import jax
import pytest
from short_runs import figures, means

from experiments.finetune import Finetune
from experiments.finetune import run as finetune
from jtl.pretrained import save, scratch

pytestmark = pytest.mark.slow
IMAGES = {"model": "efficientnet-lite0", "data": "uci_digits", "image_size": 32}


def test_finetune(tmp_path):
    result = finetune(Finetune(out=tmp_path, quick=True, save=True))
    accuracy = result.summary["accuracy"]
    assert list(accuracy) == ["majority", "probe", "full"]
    assert min(accuracy["full"]["mean"], accuracy["probe"]["mean"]) > accuracy["majority"]["mean"]
    assert {"learning_curves", "confusion", "features_before_and_after"} <= figures(tmp_path)
    assert json.loads((tmp_path / "result.json").read_text())["summary"] == json.loads(
        json.dumps(result.summary)
    )
    assert "Surest errors" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "model" / "model.safetensors").exists()
    assert any((tmp_path / "events").iterdir())
    with pytest.raises(FileExistsError, match="already holds a run"):
        finetune(Finetune(out=tmp_path, quick=True))
    again = finetune(Finetune(out=tmp_path, quick=True, save=True, resume=True))
    assert again.summary["accuracy"] == accuracy


@pytest.mark.parametrize("technique", ["scratch", "lp_ft", "gradual", "lora"])
def test_techniques_on_images(technique, tmp_path):
    result = finetune(Finetune(out=tmp_path, quick=True, technique=technique, **IMAGES))
    accuracy = means(result, "accuracy")
    assert accuracy[technique] > accuracy["majority"] + 0.05
    assert technique != "lp_ft" or accuracy["lp_ft"] > accuracy["probe"] - 0.1  # whose head it begins with
    assert {"confusion", "surest_errors"} <= figures(tmp_path)


def test_a_vision_transformer_and_what_it_saves(tmp_path):
    """A folder with a ViT, a small one of random weights: its own preprocessing is used, saved and used again."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    base = tmp_path / "vit"
    base.mkdir()
    (base / "config.json").write_text(
        json.dumps({"model_type": "vit", "image_size": 16, "patch_size": 4, **sizes})
    )
    half = [0.5] * 3
    (base / "preprocessor_config.json").write_text(
        json.dumps({"size": {"height": 16, "width": 16}, "image_mean": half, "image_std": half})
    )
    whole = save(scratch(base, key=jax.random.key(0)), tmp_path / "whole", tokenizer=base)
    for model, out in ((whole, tmp_path / "first"), (tmp_path / "first" / "model", tmp_path / "second")):
        config = Finetune(
            out=out, quick=True, model=str(model), data="uci_digits", learning_rate=3e-3, save=True
        )
        result = finetune(config)
    # Of ten classes, from random weights; the second run starts from what the first saved.
    assert result.summary["accuracy"]["full"]["mean"] > 0.4
