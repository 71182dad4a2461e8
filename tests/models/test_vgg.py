"""VGG: the real trunk finds edges, and every number agrees with NumPy and torch."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import error

from jtl import adapters, finetune, heads
from jtl.model import linen
from jtl.models import ARCHITECTURES
from jtl.models.vgg import DEPTHS, VGG, VGGConfig, adaptive
from jtl.pretrained import image_processor, load, load_with_report, resolve, save
from jtl.pretrained.formats import read_tensors
from jtl.pretrained.load import expected
from jtl.tree import flatten

TINY = VGGConfig(depths=(1, 2), hidden_sizes=(4, 5), num_channels=3)
SIDES = tuple(f"encoder/stage_{i}" for i in range(5))  # what HED looks at


@pytest.fixture(scope="module")
def vgg16():
    return load_with_report("vgg16")


@jax.jit
def forward(model, batch):
    return model(batch)


def tiny(config=TINY, seed=0):
    module, image = VGG(config), jnp.zeros((1, 8, 8, config.num_channels))
    model = linen(module, jax.jit(module.init)(jax.random.key(seed), image)).replace(config=config)
    keys = iter(jax.random.split(jax.random.key(seed), 100))
    return model.with_params(
        jax.tree.map(lambda x: 0.5 * jax.random.normal(next(keys), x.shape), model.params)
    )


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_outputs_in_numpy(order):
    model = tiny(VGGConfig(**{**vars(TINY), "channel_order": order}))
    image = np.random.default_rng(0).normal(size=(2, 9, 14, 3)).astype(np.float32)
    taps = ("encoder/stage_0/layer_0", "encoder/stage_1/layer_0", "encoder/stage_1")
    found = jax.jit(lambda model: model({"image": image}, taps=taps))(model)
    x = image[..., ::-1] if order == "bgr" else image
    for tap, name in (("stage_0/layer_0",) * 2, ("stage_1/layer_0",) * 2, ("stage_1", "stage_1/layer_1")):
        layer = model.params["encoder"][name[:7]][name[8:]]["conv"]
        if name == "stage_1/layer_0":
            x = pool(x)
        x = convolve(x, *map(np.asarray, (layer["kernel"], layer["bias"])))
        np.testing.assert_allclose(found["taps"][f"encoder/{tap}"], x, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["map"], pool(x), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["features"], pool(x).mean((1, 2)), rtol=1e-4, atol=1e-5)


def convolve(x, kernel, bias):
    """A 3 x 3 convolution with zeros around, and ReLU, by its definition."""
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    h, w = x.shape[1] - 2, x.shape[2] - 2
    places = [(i, j) for i in range(3) for j in range(3)]
    return np.maximum(bias + sum(x[:, i : i + h, j : j + w] @ kernel[i, j] for i, j in places), 0)


def pool(x):
    h, w = x.shape[1] // 2, x.shape[2] // 2
    return x[:, : 2 * h, : 2 * w].reshape(len(x), h, 2, w, 2, -1).max((2, 4))


@pytest.mark.parametrize("name", DEPTHS)
def test_published_sizes(name):
    config, architecture = VGGConfig(depths=DEPTHS[name], fully_connected=4096), ARCHITECTURES["vgg"]
    leaves = expected(architecture.module(config), architecture, config)
    assert set(architecture.tensors(config)) == set(leaves)
    size = sum(leaf.size for leaf in leaves.values()) + 4097 * 1000
    millions = {"vgg11": 133, "vgg13": 133, "vgg16": 138, "vgg19": 144}  # table 2 of the paper
    assert round(size / 1e6) == millions[name]
    assert VGGConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": [1, 2]}, "a width and a depth of at least 1 for each stage"),
        ({"channel_order": "gbr"}, "channel_order='gbr' is unknown"),
        ({"batch_norm": True}, "batch_norm=True is not supported"),
        ({"model_type": "resnet"}, "'resnet', expected 'vgg'"),
    ],
)
def test_unsupported_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        VGGConfig.from_hf({"model_type": "vgg"} | change)


def test_images_that_do_not_fit():
    for shape in ((1, 8, 8, 1), (1, 3, 8, 3)):
        with pytest.raises(ValueError, match=r"expected shape \(B, H, W, 3\).*at least 4"):
            tiny()({"image": jnp.zeros(shape)})


def test_what_the_techniques_find(key, tmp_path):
    model = heads.classifier(tiny(VGGConfig(**{**vars(TINY), "fully_connected": 6})), 3, key=key)
    depth = flatten(finetune.depths(model))
    layers = ("encoder/stage_0/layer_0", "encoder/stage_1/layer_0", "encoder/stage_1/layer_1")
    assert [depth[f"{layer}/conv/kernel"] for layer in layers] == [0, 1, 2]
    assert depth["fully_connected/dense_1/kernel"] == 2 and depth["head/out/kernel"] == 3
    image = np.random.default_rng(0).normal(size=(2, 12, 16, 3)).astype(np.float32)
    adapted = adapters.lora(model, rank=2, where="encoder/.*/conv|fully_connected/dense_0", key=key)
    before = forward(model, {"image": image})["logits"]
    np.testing.assert_array_equal(forward(adapted, {"image": image})["logits"], before)
    moved = adapted.with_params(jax.tree.map(lambda x: x + 0.1, adapted.params))
    merged = forward(adapters.merge(moved), {"image": image})["logits"]
    assert error(merged, np.asarray(forward(moved, {"image": image})["logits"])) < 1e-4
    back = load(save(model, tmp_path / "saved"))
    assert back.config == model.config
    np.testing.assert_array_equal(forward(back, {"image": image})["logits"], before)


def test_the_real_trunk_finds_the_edge_of_a_disc(vgg16, tmp_path):
    """Under the side outputs that lie beside it in the file, on an image that neither channel order nor mean suits."""
    model, report = vgg16
    assert len(report.used) == 26 and len(report.ignored) == 12 and not report.new
    wanted = image_processor("vgg16")
    rows, columns = np.mgrid[:96, :96] - 48
    radius = np.hypot(rows, columns)
    pixels = np.where(radius[..., None] < 28, [40, 90, 160], [90, 150, 70]).astype(np.float32)
    image = (pixels / 255 - np.float32(wanted["mean"])) / np.float32(wanted["std"])
    sides = jax.jit(lambda model: model({"image": image[None]}, taps=SIDES)["taps"])(model)
    file = read_tensors(resolve("vgg16"))
    maps = []
    for i, side in enumerate(SIDES):
        name = f"conv2d_{i}" if i else "conv2d"
        side = (
            jnp.einsum("bhwc,oc->bhwo", sides[side], file[f"{name}/kernel"][:, :, 0, 0])
            + file[f"{name}/bias"][0]
        )
        maps.append(jax.image.resize(side, (1, 96, 96, 1), "bilinear"))
    fused = jnp.concatenate(maps, -1) @ file["conv2d_5/kernel"][0, :, 0, 0] + file["conv2d_5/bias"][0]
    edges = np.asarray(jax.nn.sigmoid(fused[0]))
    on, off = edges[abs(radius - 28) < 1].mean(), edges[(abs(radius - 28) > 8) & (radius < 44)].mean()
    assert on > 0.5 and off < 0.1, (on, off)


def test_a_saved_folder_of_the_real_trunk(vgg16, tmp_path):
    model, _ = vgg16
    back, report = load_with_report(save(model, tmp_path / "saved"))
    assert not report.ignored and back.config == model.config
    before, after = flatten(model.params), flatten(back.params)
    assert all(np.array_equal(before[path], after[path]) for path in before)


# Parity with torch: the network written again from the paper's table.


def torch_taps(weights, image, depths):
    """Every layer's output, and the last map, of pairs of kernel and bias in torch's layout."""
    import torch
    from torch.nn import functional as F

    x, taps, pairs = torch.tensor(image).permute(0, 3, 1, 2), {}, iter(weights)
    for i, depth in enumerate(depths):
        for j in range(depth):
            kernel, bias = next(pairs)
            x = F.conv2d(x, torch.tensor(kernel), torch.tensor(bias), padding=1).relu()
            taps[f"encoder/stage_{i}/layer_{j}"] = x.permute(0, 2, 3, 1).numpy()
        x = F.max_pool2d(x, 2)
    return taps | {"map": x.permute(0, 2, 3, 1).numpy()}


@pytest.mark.parity
@pytest.mark.parametrize("size", [(64, 64), (97, 75)])
def test_parity_of_the_real_weights(vgg16, size):
    """The file is read by h5py, in its own layout, and the image is turned to BGR by hand."""
    import h5py

    model, _ = vgg16
    pixels = np.random.default_rng(0).integers(0, 256, (2, *size, 3))
    wanted = image_processor("vgg16")
    image = ((pixels / 255 - wanted["mean"]) / wanted["std"]).astype(np.float32)
    bgr = (pixels[..., ::-1] - np.array([104.00699, 116.66877, 122.67892])).astype(np.float32)
    weights = []
    with h5py.File(next(resolve("vgg16").glob("*.h5"))) as file:
        for i, depth in enumerate(model.config.depths):
            for j in range(depth):
                layer = file[f"block{i + 1}/layers/conv2d{f'_{j}' if j else ''}/vars"]
                weights.append((layer["0"][()].transpose(3, 2, 0, 1), layer["1"][()]))
    theirs = torch_taps(weights, bgr, model.config.depths)
    taps = tuple(name for name in theirs if name != "map")
    found = jax.jit(lambda model: model({"image": image}, taps=taps))(model)
    for name, value in theirs.items():
        assert error(found["taps"][name] if name in taps else found[name], value) < 1e-4, name


@pytest.mark.parity
@pytest.mark.parametrize("seed", range(4))
def test_torchvision_files(seed, tmp_path):
    """A `.pth` under torchvision's names, with its fully connected layers and classifier."""
    import torch
    from torch import nn

    rng = np.random.default_rng(seed)
    depths = tuple(int(n) for n in rng.integers(1, 4, 3))
    widths = tuple(int(n) for n in rng.integers(3, 7, 3))
    layers, i = [], 3
    for o, depth in zip(widths, depths, strict=True):
        for _ in range(depth):
            layers += [nn.Conv2d(i, o, 3, padding=1), nn.ReLU()]
            i = o
        layers.append(nn.MaxPool2d(2))
    features, hidden = nn.Sequential(*layers), int(rng.integers(5, 9))
    classifier = nn.Sequential(nn.Linear(i * 49, hidden), nn.ReLU(), nn.Dropout(), nn.Linear(hidden, hidden), nn.ReLU(),
                               nn.Dropout(), nn.Linear(hidden, 4))  # fmt: skip
    network = nn.ModuleDict({"features": features, "classifier": classifier}).eval()
    torch.manual_seed(seed)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    torch.save(network.state_dict(), tmp_path / "vgg.pth")
    settings = dict(model_type="vgg", depths=depths, hidden_sizes=widths, fully_connected=hidden)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    model, report = load_with_report(tmp_path)
    assert not report.ignored and not report.new
    size = [int(n) for n in rng.integers(8, 90, 2)]
    image = rng.normal(size=(2, *size, 3)).astype(np.float32)
    with torch.no_grad():
        last = features(torch.tensor(image).permute(0, 3, 1, 2))
        logits = classifier(nn.AdaptiveAvgPool2d((7, 7))(last).flatten(1))
    found = forward(model, {"image": image})
    assert error(found["map"], last.permute(0, 2, 3, 1).numpy()) < 1e-4
    assert error(found["logits"], logits.numpy()) < 1e-4


@pytest.mark.parametrize(("old", "new"), [(7, 7), (14, 7), (1, 7), (10, 7), (3, 2)])
def test_adaptive(old, new):
    values = np.random.default_rng(0).normal(size=old)
    windows = [values[i * old // new : int(np.ceil((i + 1) * old / new))].mean() for i in range(new)]
    np.testing.assert_allclose(adaptive(old, new) @ values, windows, rtol=1e-5)
