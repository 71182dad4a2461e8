"""CLIP: against committed outputs of `transformers`, and what must hold by construction."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import read
from support import error, from_files, outputs, shapes

from experiments.models.random_models import batch, build, files, run, settings
from jtl import adapters, finetune, heads
from jtl.model import cast
from jtl.models import ARCHITECTURES
from jtl.models.clip import vision_tower
from jtl.models.clip_config import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from jtl.pretrained import load, load_with_report, save
from jtl.tree import flatten


@pytest.fixture(scope="module")
def reference():
    config, weights, inputs, theirs = read("clip")
    return from_files("clip", config, weights), inputs, theirs


@jax.jit
def forward(model, inputs):
    return model(inputs)


def test_committed_outputs(reference):
    model, inputs, theirs = reference
    assert model.config.vision.num_hidden_layers != model.config.text.num_hidden_layers
    for name, value in outputs(model, inputs, theirs).items():
        assert error(value, theirs[name]) < 1e-4, name


def test_either_tower_alone(reference):
    model, inputs, theirs = reference
    image = {"image": inputs["image"]}
    texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    seen, read_ = forward(model, image), forward(model, texts)
    assert set(seen) == {"image_sequence", "pooled", "image_embeds", "features"}
    assert set(read_) == {"text_sequence", "text_embeds", "features"}
    for found, name in ((seen, "image_embeds"), (read_, "text_embeds")):
        assert error(found[name], theirs[name]) < 1e-4
        np.testing.assert_array_equal(found["features"], found[name])
        np.testing.assert_allclose(jnp.linalg.norm(found[name], axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(seen["pooled"], theirs["image_sequence"][:, 1:].mean(1), atol=1e-4)
    with pytest.raises(ValueError, match="needs image or input_ids"):
        model({})


def test_a_text_ends_at_its_token(reference):
    """What stands behind the first end-of-text token changes nothing, even without a mask: attention is causal."""
    model, inputs, theirs = reference
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    ends = mask.sum(1)
    behind = np.where(mask == 1, ids, 7).astype(np.int32)
    behind[np.arange(len(ids)), np.minimum(ends, ids.shape[1] - 1)] = np.where(
        ends < ids.shape[1], 22, ids[:, -1]
    )
    assert (behind != ids).any()
    assert error(forward(model, {"input_ids": behind})["text_embeds"], theirs["text_embeds"]) < 1e-4


def test_name_map_and_config():
    for seed in range(4):
        written = settings("clip", np.random.default_rng(seed)) | {"model_type": "clip"}
        for kinds in (["CLIPModel"], ["CLIPForImageClassification"]):
            config = CLIPConfig.from_hf(written | {"architectures": kinds})
            assert config.towers == ("both" if kinds == ["CLIPModel"] else "vision")
            tensors = ARCHITECTURES["clip"].tensors(config)
            assert set(tensors) == set(shapes(ARCHITECTURES["clip"], config))
            assert len({tensor.key for tensor in tensors.values()}) == len(tensors)
            assert CLIPConfig.from_hf(config.to_hf() | {"architectures": kinds}) == config
            assert hash(config) == hash(dataclasses.replace(config))
            json.dumps(config.to_hf())
    assert CLIPConfig.from_hf({}) == CLIPConfig()  # ViT-B/32


def test_an_old_spelling_of_the_towers():
    config = CLIPConfig.from_hf({"text_config_dict": {"hidden_size": 8}, "text_config": {"hidden_size": 16}})
    assert config.text == CLIPTextConfig(hidden_size=8) and config.vision == CLIPVisionConfig()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_config": {"hidden_size": 10, "num_attention_heads": 3}}, "not a multiple"),
        ({"vision_config": {"hidden_act": "gelo"}}, "did you mean.*gelu"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "expected 'clip_vision_model'"),
        ({"text_config": {"eos_token_id": [1, 2]}}, "expected one id"),
        ({"model_type": "siglip"}, "'siglip', expected 'clip'"),
    ],
)
def test_unsupported_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        CLIPConfig.from_hf({"model_type": "clip"} | change)


def test_inputs_that_do_not_fit(reference):
    model, inputs, _ = reference
    with pytest.raises(ValueError, match="length 12 exceeds max_position_embeddings=11"):
        model({"input_ids": np.ones((1, 12), np.int32)})
    with pytest.raises(ValueError, match="image: shape"):
        model({"image": np.zeros((1, 1, 9, inputs["image"].shape[-1]), np.float32)})


def test_bfloat16(reference):
    model, inputs, theirs = reference
    found = forward(cast(model, jnp.bfloat16), inputs)
    assert max(error(found[name], theirs[name]) for name in ("image_embeds", "text_embeds")) < 0.1


def test_what_the_techniques_find(reference, key):
    model, inputs, _ = reference
    depth = flatten(finetune.depths(heads.classifier(model, 3, key=key)))
    by = {
        path: depth[path]
        for path in depth
        if path.endswith(("attention/query/kernel", "logit_scale", "out/kernel"))
    }
    assert by == {
        "vision/encoder/layer_0/attention/query/kernel": 1,
        "vision/encoder/layer_1/attention/query/kernel": 2,
        "text/encoder/layer_0/attention/query/kernel": 2,
        "logit_scale": 2,
        "head/out/kernel": 3,
    }
    assert depth["vision/embeddings/position"] == 0 and depth["text/embeddings/word/embedding"] == 1
    assert depth["vision/norm/scale"] == depth["text/norm/scale"] == depth["image_projection/kernel"] == 2
    adapted = adapters.lora(model, rank=2, where="(vision|text)/.*/(query|value)", key=key)
    np.testing.assert_array_equal(
        forward(adapted, inputs)["logits_per_image"], forward(model, inputs)["logits_per_image"]
    )
    moved = adapted.with_params(jax.tree.map(lambda x: x + 0.1, adapted.params))
    merged = forward(adapters.merge(moved), inputs)["logits_per_image"]
    assert error(merged, np.asarray(forward(moved, inputs)["logits_per_image"])) < 1e-4


def test_saved_folders(reference, tmp_path, key):
    """Both towers, with a head of jtl's own; and the tower of images, as the class of the task in transformers."""
    model, inputs, _ = reference
    image = {"image": inputs["image"]}
    both, tower = (heads.classifier(m, 3, key=key) for m in (model, vision_tower(model)))
    for name, original in (("both", both), ("tower", tower)):
        back, report = load_with_report(save(original, tmp_path / name))
        assert back.config == original.config and not report.ignored and not report.new
        np.testing.assert_array_equal(forward(back, image)["logits"], forward(original, image)["logits"])
    np.testing.assert_array_equal(forward(both, image)["logits"], forward(tower, image)["logits"])
    with pytest.raises(ValueError, match="its tower of images alone"):
        tower(inputs)
    with pytest.raises(ValueError, match="takes a bare CLIP"):
        vision_tower(both)


@pytest.mark.parity
@pytest.mark.parametrize("seed", range(8))
def test_outputs_live(seed):
    rng = np.random.default_rng(seed)
    config = settings("clip", rng)
    torch_model = build("clip", config)
    written, weights = files(torch_model)
    inputs = batch("clip", written, rng, padded=seed % 2 > 0)
    theirs = run("clip", torch_model, inputs)
    for output, value in outputs(from_files("clip", written, weights), inputs, theirs).items():
        assert error(value, theirs[output]) < 1e-4, (output, config)


@pytest.mark.parity
def test_transformers_opens_what_is_saved(reference, tmp_path, key):
    import torch
    import transformers

    model, inputs, theirs = reference
    back, info = transformers.AutoModel.from_pretrained(
        save(model, tmp_path / "both"), output_loading_info=True
    )
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, value in run("clip", back.eval(), inputs).items():
        assert error(value, theirs[name]) < 1e-5, name
    rng = np.random.default_rng(0)
    side = model.config.vision.image_size
    image = rng.normal(size=(2, side, side, model.config.vision.num_channels)).astype(np.float32)
    tower = heads.classifier(vision_tower(model), 3, key=key)
    kind = transformers.AutoModelForImageClassification
    back, info = kind.from_pretrained(save(tower, tmp_path / "tower"), output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        logits = back.eval()(torch.tensor(image.transpose(0, 3, 1, 2))).logits.numpy()
    assert type(back).__name__ == "CLIPForImageClassification"
    assert error(forward(tower, {"image": image})["logits"], logits) < 1e-4


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of PEFT and transformers
def test_peft_opens_adapters(reference, tmp_path, key):
    import transformers
    from peft import PeftModel

    model, inputs, _ = reference
    adapted = adapters.lora(model, rank=2, where="(vision|text)/.*/(query|value)", key=key)
    moved = jax.tree_util.tree_map_with_path(
        lambda path, x: x + 0.05 * ("lora" in jax.tree_util.keystr(path)), adapted.params
    )
    adapted = adapted.with_params(moved)
    adapters.peft.save(adapted, tmp_path / "adapter")
    base = transformers.AutoModel.from_pretrained(save(model, tmp_path / "base"))
    theirs = run(
        "clip", PeftModel.from_pretrained(base, tmp_path / "adapter").eval().base_model.model, inputs
    )
    assert error(forward(adapted, inputs)["logits_per_image"], theirs["logits_per_image"]) < 1e-4
    assert error(forward(model, inputs)["logits_per_image"], theirs["logits_per_image"]) > 1e-3


@pytest.mark.parity
def test_transformers_files_of_the_task(tmp_path):
    """CLIPForImageClassification as transformers saves it, read and given back."""
    import torch
    import transformers

    config = transformers.CLIPConfig(**settings("clip", np.random.default_rng(1)), num_labels=3)
    theirs = transformers.CLIPForImageClassification(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    model = load(tmp_path / "theirs")
    side, channels = model.config.vision.image_size, model.config.vision.num_channels
    image = np.random.default_rng(0).normal(size=(2, side, side, channels)).astype(np.float32)
    with torch.no_grad():
        logits = theirs(torch.tensor(image.transpose(0, 3, 1, 2))).logits.numpy()
    assert error(forward(model, {"image": image})["logits"], logits) < 1e-4
