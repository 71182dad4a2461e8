"""PEFT's files that do not fit the model, and models that have no such file."""

import json
import shutil

import chex
import jax
import numpy as np
import pytest
from numpy_encoder import small
from peft_models import METHODS, torch_model

from jtl import adapters, heads, pretrained, tree
from jtl.adapters import SiteError, peft
from jtl.adapters.peft import AdapterFileError


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
    return lambda tensors: {**tensors, f"base_model.model.{key}": np.zeros(1, np.float32)}


def cut(part):
    def change(tensors):
        return {
            key: np.ascontiguousarray(value[..., :100]) if part in key else value
            for key, value in tensors.items()
        }

    return change


def half_without_task(tensors):
    return {key.replace("bert.", "") if "layer.5" in key else key: value for key, value in tensors.items()}


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
        ("lora", {"kasa_config": {"beta": 1e-4}}, None, "kasa_config={'beta': 0.0001} is not supported"),
        (
            "lora",
            {"init_lora_weights": "pissa_niter_16"},
            None,
            "init_lora_weights='pissa_niter_16' may have",
        ),
        ("lora", {"init_lora_weights": "LoftQ"}, None, "init_lora_weights='LoftQ' .* or merge_and_unload"),
        (
            "lora",
            {},
            with_one_more("classifier.scale"),
            r"head needs \['classifier.bias', 'classifier.weight'\], found .*'classifier.scale'",
        ),
        ("lora", {}, without("classifier.bias"), r"head needs .*, found \['classifier.weight'\]"),
        ("lora", {}, without("classifier"), r"head needs .*, found \[\]; to keep the model's own head"),
        ("lora", {"modules_to_save": None}, without("classifier"), r"head needs .*, found \[\]"),
        ("lora", {"task_type": None}, without("classifier"), r"head needs .*, found \[\]"),
        ("lora", {}, cut("classifier.weight"), r"classifier has weights \(2, 100\) .* expected \(2, 384\)"),
        (
            "lora",
            {},
            with_one_more("bert.classifier.bias"),
            "'classifier.bias' and 'bert.classifier.bias' are one tensor|'bert.* and 'classifier.bias' are",
        ),
        (
            "lora",
            {},
            with_one_more(f"{QUERY}.lora_A.weight"),
            f"'(bert.)?{QUERY}.lora_A.weight' and '(bert.)?{QUERY}.lora_A.weight' are one tensor",
        ),
        ("lora", {}, half_without_task, "its keys spell the names of layers in several ways"),
        (
            "lora",
            {"target_modules": ["query", "value"], "layers_to_transform": [4, 5]},
            without_a_layer,
            "no tensors for 2 of the layers",
        ),
        (
            "lora",
            {"target_modules": ["query", "value"], "exclude_modules": [QUERY]},
            without_a_layer,
            "no tensors for 2 of the layers",
        ),
        ("ia3", {"feedforward_modules": None}, None, "feedforward_modules is missing"),
        (
            "ia3",
            {"feedforward_modules": ["value"]},
            None,
            r"ia3_l at .*/value has shape \(384, 1\), which does not fit a dense layer",
        ),
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
        ("vera", {}, with_one_more(f"bert.{QUERY}.vera_lambda_x"), r"found .*'vera_lambda_x'"),
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
            with_one_more(f"bert.{QUERY}.lora_F"),
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
            with_one_more("bert.encoder.norm.ln_tuning_layers.bias"),
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
    for method in ("lora", "vera", "adalora", "ia3"):
        folders[method] = peft.save(adapted(minilm, method), root / method)
    return folders


def adapted(model, method):
    options = {} if method == "ia3" else {"rank": 8}
    return METHODS[method][0](model, key=jax.random.key(0), **options)


@pytest.mark.parametrize("method", ["lora", "vera", "adalora"])
def test_a_folder_gives_back_the_very_model(minilm, files, method):
    model = adapted(minilm, method)
    back = peft.load(minilm, files[method])
    chex.assert_trees_all_equal(back, model)
    assert back.techniques == model.techniques


@pytest.mark.parametrize(
    "config, part",
    [
        ({"target_modules": ["query", "value"], "layers_to_transform": [0, 1, 2, 3, 4]}, "layer.5"),
        ({"target_modules": ["query", "value"], "exclude_modules": r".*\.5\..*"}, "layer.5"),
        ({"modules_to_save": None, "task_type": None}, "classifier"),
    ],
)
def test_what_a_file_may_lack(minilm, files, tmp_path, config, part):
    """The layers that the configuration leaves out, and a head that it does not name."""
    folder = rewrite(shutil.copytree(files["lora"], tmp_path / "a"), config, without(part))
    back = tree.flatten(peft.load(minilm, folder).params)
    left_out = [path for path in tree.flatten(adapted(minilm, "lora").params) if path not in back]
    assert all("layer_5" in path for path in left_out) and len(left_out) == (4 if part == "layer.5" else 0)


@pytest.mark.slow
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
    for method, options in (
        (adapters.vera, {"rank": 2}),
        (adapters.adalora, {"rank": 2}),
        (adapters.ia3, {}),
    ):
        embedded = method(minilm, where="embeddings/word", key=jax.random.key(0), **options)
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


def test_old_and_new_names_of_one_tensor(tmp_path):
    model = small("vit")
    folders = [
        peft.save(
            adapters.lora(model, rank=2, key=jax.random.key(0)), tmp_path / str(version), transformers=version
        )
        for version in (4, 5)
    ]
    from safetensors.numpy import load_file

    newer = load_file(folders[1] / peft.WEIGHTS)
    rewrite(folders[0], change_keys=lambda older: {**older, **newer})
    with pytest.raises(
        AdapterFileError, match="'.*query.lora_A.weight' are one tensor|'.*q_proj.* are one tensor"
    ):
        peft.load(model, folders[0])


@pytest.mark.slow
def test_ia3_of_a_depthwise_convolution(tmp_path):
    """It has a factor for each channel, as every convolution has in PEFT's files."""
    model = small("efficientnet_lite")
    (layer,) = adapters.find(model, "layer_1/depthwise")
    assert layer.groups == 96
    scaled = adapters.ia3(model, where=layer.path, key=jax.random.key(0))
    twice = lambda path, leaf: 2 * leaf if "/ia3/" in path else leaf  # noqa: E731
    scaled = scaled.with_params(tree.map_with_path(twice, scaled.params))
    folder = peft.save(scaled, tmp_path / "a")
    from safetensors.numpy import load_file

    (array,) = load_file(folder / peft.WEIGHTS).values()
    assert array.shape == (1, layer.columns, 1, 1) and (array == 2).all()
    chex.assert_trees_all_equal(peft.load(model, folder).params["layer_1"], scaled.params["layer_1"])
