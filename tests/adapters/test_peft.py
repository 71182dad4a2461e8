"""PEFT's files, checked against the real PEFT: the same logits from the same folder, in both directions."""

import json
import shutil

import chex
import jax
import numpy as np
import pytest

from jtl import adapters, heads, pretrained, tree
from jtl.adapters import SiteError, peft
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
    "vera": (adapters.vera, {"rank": 5, "initial": 20.0}),
    "adalora": (adapters.adalora, {"rank": 4, "alpha": 6.0}),
}
NEW = ("vera", "adalora")  # on two architectures, for time's sake
CASES = [
    (name, method) for name in MODELS for method in METHODS if method not in NEW or name in ("bert", "vit")
]
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
@pytest.mark.parametrize("name, method", CASES)
def test_ours_opens_in_peft_and_comes_back(name, method, tmp_path):
    from peft import PeftModel

    base = torch_model(name, tmp_path / "base")
    ours = pretrained.load(str(tmp_path / "base"))
    insert, options = METHODS[method]
    adapted = stirred(insert(ours, where=WHERE, key=jax.random.key(0), **options))
    peft.save(adapted, tmp_path / "adapter", base=str(tmp_path / "base"))

    batch = batch_of(name)
    expected = adapted(batch)["logits"]
    if method in NEW:
        assert np.abs(expected - ours(batch)["logits"]).max() > 1e-2
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    np.testing.assert_allclose(torch_logits(theirs, batch), expected, atol=1e-4, rtol=1e-4)
    back = peft.load(pretrained.load(str(tmp_path / "base")), tmp_path / "adapter")
    np.testing.assert_allclose(back(batch)["logits"], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("name, method", [case for case in CASES if case[1] != "patterns"])
def test_theirs_opens_here(name, method, tmp_path):
    import torch
    from peft import AdaLoraConfig, IA3Config, LoraConfig, TaskType, VeraConfig, get_peft_model

    base = torch_model(name, tmp_path / "base")
    query, value, output = {
        "distilbert": ("q_lin", "v_lin", "lin2"),
        "vit": ("q_proj", "v_proj", "fc2"),
        "dinov2": ("q_proj", "v_proj", "fc2"),
    }.get(name, ("query", "value", "output.dense"))
    targets = [query, value, output]
    kind = TaskType.SEQ_CLS if "input_ids" in batch_of(name) else None
    common = {
        "target_modules": targets,
        "task_type": kind,
        "modules_to_save": None if kind else ["classifier"],
    }
    if method == "ia3":
        config = IA3Config(feedforward_modules=[output], **common)
    elif method == "vera":
        config = VeraConfig(r=5, **common)
    elif method == "adalora":
        config = AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6, total_step=10, **common)
    else:
        config = LoraConfig(
            r=4, lora_alpha=6, use_dora=method == "dora", use_rslora=method == "rslora", rank_pattern={query: 2},
            **common,
        )  # fmt: skip
    theirs = get_peft_model(base, config)
    for path, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, mean=float("ia3" in path or "magnitude" in path), std=0.2)
    theirs.save_pretrained(str(tmp_path / "adapter"))
    batch = batch_of(name)
    ours = peft.load(pretrained.load(str(tmp_path / "base")), tmp_path / "adapter")
    np.testing.assert_allclose(ours(batch)["logits"], torch_logits(theirs, batch), atol=1e-4, rtol=1e-4)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")  # of its own files too
def test_pruned_ranks_both_ways(tmp_path):
    """PEFT cuts pruned values out of its files and keeps the scale; one layer here has none left."""
    import torch
    from peft import AdaLoraConfig, PeftModel, TaskType, get_peft_model

    batch = batch_of("bert")
    config = AdaLoraConfig(
        init_r=3, lora_alpha=6, total_step=10, target_modules=["query", "value"], task_type=TaskType.SEQ_CLS
    )
    theirs = get_peft_model(torch_model("bert", tmp_path / "base"), config)
    layer = "bert.encoder.layer.{}.attention.self.{}.lora_E.default"
    pattern = {
        layer.format(0, "query"): [False, True, True],
        layer.format(0, "value"): [True, False, False],
        layer.format(1, "query"): [False, False, False],
        layer.format(1, "value"): [True, True, True],
    }
    with torch.no_grad():
        for path, parameter in theirs.base_model.model.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5)
            if path in pattern:
                parameter *= torch.tensor(pattern[path])[:, None]
    expected = torch_logits(theirs, batch)
    theirs.peft_config["default"].rank_pattern = pattern
    theirs.save_pretrained(str(tmp_path / "adapter"))

    ours = peft.load(pretrained.load(str(tmp_path / "base")), tmp_path / "adapter")
    ranks = [leaf.size for path, leaf in tree.flatten(ours.params).items() if path.endswith("/lambda")]
    assert ranks == [2, 1, 0, 3]
    np.testing.assert_allclose(ours(batch)["logits"], expected, atol=1e-4, rtol=1e-4)
    peft.save(ours, tmp_path / "again")
    again = PeftModel.from_pretrained(torch_model("bert", tmp_path / "base"), str(tmp_path / "again"))
    np.testing.assert_allclose(torch_logits(again, batch), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parity
def test_adalora_of_a_convolution(tmp_path):
    from peft import PeftModel

    base = torch_model("vit", tmp_path / "base")
    ours = pretrained.load(str(tmp_path / "base"))
    adapted = stirred(
        adapters.adalora(ours, rank=4, alpha=800.0, where="embeddings/patch", key=jax.random.key(0))
    )
    batch, folder = batch_of("vit"), peft.save(adapted, tmp_path / "adapter")
    assert np.abs(adapted(batch)["logits"] - ours(batch)["logits"]).max() > 1e-2
    theirs = PeftModel.from_pretrained(base, str(folder))
    np.testing.assert_allclose(torch_logits(theirs, batch), adapted(batch)["logits"], atol=1e-4, rtol=1e-4)
    back = peft.load(ours, folder)
    np.testing.assert_allclose(back(batch)["logits"], adapted(batch)["logits"], atol=1e-5, rtol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["bert", "vit", "distilbert"])
def test_norms_both_ways(name, tmp_path):
    import torch
    from peft import LNTuningConfig, PeftModel, TaskType, get_peft_model

    batch = batch_of(name)
    targets = {"bert": ["LayerNorm"], "vit": ["layernorm_before", "layernorm_after"]}.get(
        name, ["sa_layer_norm", "output_layer_norm"]
    )
    kind = TaskType.SEQ_CLS if "input_ids" in batch else None
    config = LNTuningConfig(
        target_modules=targets, task_type=kind, modules_to_save=None if kind else ["classifier"]
    )
    theirs = get_peft_model(torch_model(name, tmp_path / "base"), config)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    base = pretrained.load(str(tmp_path / "base"))
    ours = peft.load(base, tmp_path / "theirs")
    np.testing.assert_allclose(ours(batch)["logits"], torch_logits(theirs, batch), atol=1e-4, rtol=1e-4)
    assert ours.techniques == base.techniques  # no adapter: they are the model's own

    # Ours: all norms, and with them another head.
    def noise(path, leaf):
        own = "norm" in path or path.startswith("head")
        return leaf + 0.2 * jax.random.normal(tree.fold_path(jax.random.key(7), path), leaf.shape) * own

    tuned = base.with_params(tree.map_with_path(noise, base.params))
    folder = peft.save(tuned, tmp_path / "ours", norms=".*norm")
    again = PeftModel.from_pretrained(torch_model(name, tmp_path / "base"), str(folder))
    np.testing.assert_allclose(torch_logits(again, batch), tuned(batch)["logits"], atol=1e-4, rtol=1e-4)
    back = peft.load(base, folder)
    np.testing.assert_array_equal(back(batch)["logits"], tuned(batch)["logits"])


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


def without_a_layer(tensors):
    return {key: value for key, value in tensors.items() if "layer.5" not in key}


def without(part):
    return lambda tensors: {key: value for key, value in tensors.items() if part not in key}


def with_one_more(key):
    return lambda tensors: {**tensors, f"base_model.model.bert.{key}": np.zeros(1, np.float32)}


def cut(part):
    def change(tensors):
        return {
            key: np.ascontiguousarray(value[..., :100]) if part in key else value
            for key, value in tensors.items()
        }

    return change


QUERY = "encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(
    "method, config, keys, message",
    [
        ("lora", {}, without_prefix, "keys lack the prefix 'base_model.model.'"),
        ("lora", {}, without_one, r"needs \['lora_A.weight', 'lora_B.weight'\], found \['lora_A.weight'\]"),
        ("lora", {}, of_another_layer, "'.*layer.7.*' belongs to no layer of this model"),
        ("lora", {}, of_another_width, r"query/a has shape \(100, 8\), expected \(384, 8\)"),
        (
            "lora",
            {},
            without_a_layer,
            "no tensors for 2 of the layers .*, such as 'bert.encoder.layer.5.*query'",
        ),
        (
            "lora",
            {"peft_type": "LOHA"},
            None,
            "peft_type is 'LOHA'; LORA, IA3, VERA, ADALORA and LN_TUNING can",
        ),
        ("lora", {"bias": "all"}, None, "bias='all' is not supported"),
        ("vera", {}, without_prefix, "keys lack the prefix"),
        ("vera", {}, without("vera_lambda_d"), r"needs \['vera_lambda_b', 'vera_lambda_d'\], found"),
        (
            "vera",
            {},
            without("vera_A"),
            r"VeRA needs .* found \['base_model.vera_B'\]: save it with save_proj",
        ),
        ("vera", {}, cut("vera_A"), r"vera_A transposed has shape \(100, 8\), expected \(384, 8\)"),
        ("vera", {}, cut("vera_lambda_b"), r"query/b has shape \(100,\), expected \(384,\)"),
        ("vera", {"r": 7}, None, r"query/d has shape \(8,\), expected \(7,\)"),
        ("vera", {}, with_one_more(f"{QUERY}.vera_lambda_x"), r"found .*'vera_lambda_x'"),
        ("adalora", {}, without_prefix, "keys lack the prefix 'base_model.model.'"),
        (
            "adalora",
            {},
            without("lora_E"),
            r"needs \['lora_A', 'lora_B', 'lora_E'\], found \['lora_A', 'lora_B'\]",
        ),
        ("adalora", {}, without_a_layer, "no tensors for 2 of the layers"),
        ("adalora", {}, cut("lora_A"), r"query/p has shape \(100, 8\), expected \(384, 8\)"),
        (
            "adalora",
            {},
            with_one_more(f"{QUERY}.lora_F"),
            r"found \['lora_A', 'lora_B', 'lora_E', 'lora_F'\]",
        ),
        ("adalora", {"bias": "all"}, None, "bias='all' is not supported"),
        ("norms", {}, without_prefix, "keys lack the prefix 'base_model.model.'"),
        (
            "norms",
            {},
            without("LayerNorm.ln_tuning_layers.bias"),
            r"needs \['ln_t.*bias', 'ln_t.*'\], found \['ln",
        ),
        ("norms", {}, without_a_layer, "no tensors for 2 of the layers"),
        ("norms", {}, cut("LayerNorm"), r"norm/(bias|scale) has shape \(100,\), expected \(384,\)"),
        (
            "norms",
            {},
            with_one_more("encoder.norm.ln_tuning_layers.bias"),
            "belongs to no layer of this model",
        ),
    ],
)
def test_files_that_do_not_fit(minilm, files, tmp_path, method, config, keys, message):
    folder = shutil.copytree(files[method], tmp_path / "a")
    with pytest.raises(AdapterFileError, match=message):
        peft.load(minilm, rewrite(folder, config, keys))


@pytest.fixture(scope="module")
def files(minilm, tmp_path_factory):
    """A folder of each method."""
    root = tmp_path_factory.mktemp("files")
    folders = {"norms": peft.save(minilm, root / "norms", norms=".*norm")}
    for method in ("lora", "vera", "adalora"):
        model = METHODS[method][0](minilm, rank=8, key=jax.random.key(0))
        folders[method] = peft.save(model, root / method)
    return folders


@pytest.mark.parametrize("method", ["lora", "vera", "adalora"])
def test_a_folder_gives_back_the_very_model(minilm, files, method):
    model = METHODS[method][0](minilm, rank=8, key=jax.random.key(0))
    back = peft.load(minilm, files[method])
    chex.assert_trees_all_equal(back, model)
    assert back.techniques == model.techniques


def test_what_cannot_be_written(minilm, tmp_path):
    with pytest.raises(ValueError, match="adapter 'loha' is LoHa; LoRA, DoRA, IA3, VeRA and AdaLoRA can be"):
        peft.save(adapters.loha(minilm, key=jax.random.key(0)), tmp_path / "a")
    with pytest.raises(ValueError, match="started from 'olora', .* merge it"):
        peft.save(adapters.lora(minilm, key=jax.random.key(0), start="olora"), tmp_path / "a")
    with pytest.raises(ValueError, match=r"expected one adapter, found \[\]"):
        peft.save(minilm, tmp_path / "a")
    with pytest.raises(tree.RuleError, match="norms='nrm' meets no norm; there are 'embeddings/norm'"):
        peft.save(minilm, tmp_path / "a", norms="nrm")
    for method in (adapters.lora, adapters.bottleneck):
        adapted = method(minilm, key=jax.random.key(0))
        with pytest.raises(ValueError, match=rf"norms alone, and .* the adapters \['{method.__name__}'\]"):
            peft.save(adapted, tmp_path / "a", norms=".*norm")
    both = [adapters.lora(minilm, key=jax.random.key(i)) for i in range(2)]
    served = adapters.serve(both, own=".*/lora/.*")
    with pytest.raises(ValueError, match="serves many adapters 'lora': jtl.adapters.pick one to write"):
        peft.save(served, tmp_path / "a")
    for method in (adapters.vera, adapters.adalora):
        embedded = method(minilm, rank=2, where="embeddings/word", key=jax.random.key(0))
        with pytest.raises(SiteError, match="embeddings/word: PEFT's files have no form for .* kind embed"):
            peft.save(embedded, tmp_path / "a")
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
