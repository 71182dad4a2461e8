"""PEFT's files, checked against the real PEFT: the same logits from the same folder, in both directions."""

import json

import jax
import numpy as np
import pytest

from jtl import adapters, heads, pretrained, tree
from jtl.adapters import peft
from jtl.adapters.peft import AdapterFileError

# PEFT and transformers deprecate each other's names.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

TEXT = dict(
    vocab_size=60,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=40,
    num_labels=3,
)
IMAGE = dict(
    hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40, image_size=12, patch_size=4,
    num_labels=3,
)  # fmt: skip
DISTIL = dict(vocab_size=60, dim=24, n_layers=2, n_heads=3, hidden_dim=40, num_labels=3)
MODELS = {
    "bert": ("BertConfig", "BertForSequenceClassification", TEXT),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", TEXT),
    "distilbert": ("DistilBertConfig", "DistilBertForSequenceClassification", DISTIL),
    "vit": ("ViTConfig", "ViTForImageClassification", IMAGE),
    "dinov2": ("Dinov2Config", "Dinov2ForImageClassification", {**IMAGE, "mlp_ratio": 2}),
}
METHODS = {
    "lora": (adapters.lora, {"rank": 3}),
    "rslora": (adapters.lora, {"rank": 3, "alpha": 5.0, "stabilised": True}),
    "patterns": (
        adapters.lora,
        {"rank": ((".*query", 2), (".*", 4)), "alpha": ((".*value", 3.0), (".*", 8.0))},
    ),
    "dora": (adapters.dora, {"rank": 3}),
    "ia3": (adapters.ia3, {}),
}
WHERE = ".*/(query|value|mlp/output)"


def torch_model(name, folder):
    import torch
    import transformers

    config, cls, settings = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, cls)(getattr(transformers, config)(**settings)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return model


def batch_of(name):
    rng = np.random.default_rng(0)
    if MODELS[name][2] is TEXT or name == "distilbert":
        mask = np.ones((2, 7), np.int32)
        mask[1, 5:] = 0
        return {"input_ids": rng.integers(3, 60, (2, 7)).astype(np.int32), "attention_mask": mask}
    return {"image": rng.normal(size=(2, 12, 12, 3)).astype(np.float32)}


def torch_logits(model, batch):
    import torch

    if "image" in batch:
        inputs = {"pixel_values": torch.tensor(batch["image"].transpose(0, 3, 1, 2))}
    else:
        inputs = {field: torch.tensor(value).long() for field, value in batch.items()}
    with torch.no_grad():
        return model.eval()(**inputs).logits.numpy()


def stirred(model):
    def noise(path, leaf):
        key = tree.fold_path(jax.random.key(7), path)
        adapter = any(f"/{name}/" in path for name in METHODS)
        return leaf + 0.2 * jax.random.normal(key, leaf.shape) if adapter else leaf

    return model.with_params(tree.map_with_path(noise, model.params))


@pytest.mark.parity
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_ours_opens_in_peft_and_comes_back(name, method, tmp_path):
    from peft import PeftModel

    base = torch_model(name, tmp_path / "base")
    ours = pretrained.load(str(tmp_path / "base"))
    insert, options = METHODS[method]
    adapted = stirred(insert(ours, where=WHERE, key=jax.random.key(0), **options))
    peft.save(adapted, tmp_path / "adapter", base=str(tmp_path / "base"))

    batch = batch_of(name)
    expected = adapted(batch)["logits"]
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    np.testing.assert_allclose(torch_logits(theirs, batch), expected, atol=1e-4, rtol=1e-4)
    back = peft.load(pretrained.load(str(tmp_path / "base")), tmp_path / "adapter")
    np.testing.assert_allclose(back(batch)["logits"], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "ia3"])
@pytest.mark.parametrize("name", MODELS)
def test_theirs_opens_here(name, method, tmp_path):
    import torch
    from peft import IA3Config, LoraConfig, TaskType, get_peft_model

    base = torch_model(name, tmp_path / "base")
    query, value, output = {
        "distilbert": ("q_lin", "v_lin", "lin2"),
        "vit": ("q_proj", "v_proj", "fc2"),
        "dinov2": ("q_proj", "v_proj", "fc2"),
    }.get(name, ("query", "value", "output.dense"))
    targets = [query, value, output]
    kind = TaskType.SEQ_CLS if "input_ids" in batch_of(name) else None
    saved = None if kind else ["classifier"]
    if method == "ia3":
        config = IA3Config(
            target_modules=targets, feedforward_modules=[output], task_type=kind, modules_to_save=saved
        )
    else:
        config = LoraConfig(
            r=4, lora_alpha=6, target_modules=targets, task_type=kind, modules_to_save=saved,
            use_dora=method == "dora", use_rslora=method == "rslora", rank_pattern={query: 2},
        )  # fmt: skip
    theirs = get_peft_model(base, config)
    for path, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, mean=float("ia3" in path or "magnitude" in path), std=0.2)
    theirs.save_pretrained(str(tmp_path / "adapter"))
    batch = batch_of(name)
    ours = peft.load(pretrained.load(str(tmp_path / "base")), tmp_path / "adapter")
    np.testing.assert_allclose(ours(batch)["logits"], torch_logits(theirs, batch), atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def minilm():
    return heads.classifier(pretrained.load("minilm"), 2, key=jax.random.key(0))


def rewrite(folder, change_config=None, change_keys=None):
    from safetensors.numpy import load_file, save_file

    config = json.loads((folder / peft.CONFIG).read_text())
    tensors = load_file(folder / peft.WEIGHTS)
    if change_config:
        config |= change_config
    if change_keys:
        tensors = change_keys(tensors)
    (folder / peft.CONFIG).write_text(json.dumps(config))
    save_file(tensors, folder / peft.WEIGHTS)
    return folder


def without_prefix(tensors):
    return {key.removeprefix("base_model.model."): value for key, value in tensors.items()}


def without_one(tensors):
    del tensors[next(key for key in tensors if "lora_B" in key)]
    return tensors


def of_another_layer(tensors):
    return {key.replace("layer.5", "layer.7"): value for key, value in tensors.items()}


def of_another_width(tensors):
    return {
        key: np.ascontiguousarray(value[:, :100]) if "lora_A" in key else value
        for key, value in tensors.items()
    }


@pytest.mark.parametrize(
    "config, keys, message",
    [
        ({}, without_prefix, "keys lack the prefix 'base_model.model.'"),
        ({}, without_one, r"needs \['lora_A.weight', 'lora_B.weight'\], found \['lora_A.weight'\]"),
        ({}, of_another_layer, "'.*layer.7.*' belongs to no layer of this model"),
        ({}, of_another_width, r"query/a has shape \(100, 8\), expected \(384, 8\)"),
        ({"peft_type": "LOHA"}, None, "peft_type is 'LOHA'; LORA and IA3 can be read"),
        ({"bias": "all"}, None, "bias='all' is not supported"),
    ],
)
def test_files_that_do_not_fit(minilm, tmp_path, config, keys, message):
    peft.save(adapters.lora(minilm, key=jax.random.key(0)), tmp_path / "a")
    with pytest.raises(AdapterFileError, match=message):
        peft.load(minilm, rewrite(tmp_path / "a", config, keys))


def test_what_cannot_be_written(minilm, tmp_path):
    with pytest.raises(ValueError, match="adapter 'loha' is LoHa; LoRA, DoRA and IA3 can be written"):
        peft.save(adapters.loha(minilm, key=jax.random.key(0)), tmp_path / "a")
    with pytest.raises(ValueError, match="started from 'olora', .* merge it"):
        peft.save(adapters.lora(minilm, key=jax.random.key(0), start="olora"), tmp_path / "a")
    with pytest.raises(ValueError, match=r"expected one adapter, found \[\]"):
        peft.save(minilm, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_older_names(tmp_path):
    """transformers 4 names the modules of ViT as the files do."""
    pytest.importorskip("torch")
    torch_model("vit", tmp_path / "base")
    model = adapters.lora(pretrained.load(str(tmp_path / "base")), key=jax.random.key(0))
    from safetensors.numpy import load_file

    for version, module in (
        (4, "vit.encoder.layer.0.attention.attention.query"),
        (5, "vit.layers.0.attention.q_proj"),
    ):
        folder = peft.save(model, tmp_path / str(version), transformers=version)
        assert f"base_model.model.{module}.lora_A.weight" in load_file(folder / peft.WEIGHTS)
        back = peft.load(pretrained.load(str(tmp_path / "base")), folder)
        np.testing.assert_array_equal(
            back.params["encoder"]["layer_0"]["attention"]["query"]["lora"]["a"],
            model.params["encoder"]["layer_0"]["attention"]["query"]["lora"]["a"],
        )
