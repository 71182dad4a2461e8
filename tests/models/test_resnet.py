"""ResNet: its published sizes, torchvision's names, batch statistics, and settings that are refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import read
from support import error, from_files

from jtl.model import Mode
from jtl.models import ARCHITECTURES
from jtl.models.resnet import ResNetConfig
from jtl.pretrained import load_with_report
from jtl.pretrained.load import expected
from jtl.tree import flatten

BASIC = dict(layer_type="basic", hidden_sizes=(64, 128, 256, 512))


@pytest.mark.parametrize(
    ("millions", "change"),
    [  # as torchvision's documentation counts them, with 1,000 classes
        (11.7, BASIC | dict(depths=(2, 2, 2, 2))),
        (21.8, BASIC | dict(depths=(3, 4, 6, 3))),
        (25.6, {}),
        (44.5, dict(depths=(3, 4, 23, 3))),
        (60.2, dict(depths=(3, 8, 36, 3))),
    ],
)
def test_published_sizes(millions, change):
    config, architecture = ResNetConfig(**change), ARCHITECTURES["resnet"]
    leaves = expected(architecture.module(config), architecture, config)
    size = sum(leaf.size for path, leaf in leaves.items() if path.startswith("params/"))
    assert round((size + (config.width("pooled") + 1) * 1000) / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_type": "wide"}, "layer_type='wide' is unknown"),
        ({"depths": [1, 2]}, "a width and a depth of at least 1 for each stage"),
        ({"depths": [1, 2, 0, 1]}, "a width and a depth of at least 1 for each stage"),
        ({"hidden_act": "rely"}, "did you mean.*relu"),
        ({"model_type": "regnet"}, "'regnet', expected 'resnet'"),
    ],
)
def test_unsupported_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ResNetConfig.from_hf({"model_type": "resnet"} | change)


def test_batch_statistics():
    """What a forward normalises by, and where the running statistics go, for the first norm by hand."""
    config, weights, inputs, theirs = read("resnet")
    model = from_files("resnet", config, weights)
    before = flatten(model.variables["batch_stats"])
    outputs, state = jax.jit(lambda model: model.run(inputs, Mode(stats="batch")))(model)
    assert error(outputs["map"], theirs["map"]) > 1e-2
    x = jax.lax.conv_general_dilated(
        jnp.asarray(inputs["image"]),
        model.params["embeddings"]["conv"]["kernel"],
        (2, 2),
        ((3, 3), (3, 3)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    after = flatten(state["batch_stats"])
    for name, batch in (("mean", x.mean((0, 1, 2))), ("var", x.var((0, 1, 2)))):
        path = f"embeddings/conv_norm/{name}"
        np.testing.assert_allclose(after[path], 0.9 * before[path] + 0.1 * batch, rtol=1e-4, atol=1e-5)
    assert all((after[path] != before[path]).any() for path in before)


# torchvision's network, written again from its names: https://github.com/pytorch/vision, models/resnet.py.


def torchvision_network(basic, widths, depths, classes):
    import torch
    from torch import nn

    def conv(i, o, k, s=1):
        return nn.Conv2d(i, o, k, s, k // 2, bias=False)

    class Block(nn.Module):
        def __init__(self, i, o, s):
            super().__init__()
            sizes = (
                [(i, o, 3, s), (o, o, 3)]
                if basic
                else [(i, o // 4, 1), (o // 4, o // 4, 3, s), (o // 4, o, 1)]
            )
            self.count = len(sizes)
            for n, size in enumerate(sizes):
                setattr(self, f"conv{n + 1}", conv(*size))
                setattr(self, f"bn{n + 1}", nn.BatchNorm2d(size[1]))
            self.downsample = None
            if s != 1 or i != o:
                self.downsample = nn.Sequential(conv(i, o, 1, s), nn.BatchNorm2d(o))

        def forward(self, x):
            y = x
            for n in range(1, self.count + 1):
                y = getattr(self, f"bn{n}")(getattr(self, f"conv{n}")(y))
                y = y.relu() if n < self.count else y
            return (y + (x if self.downsample is None else self.downsample(x))).relu()

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1, i = conv(3, 8, 7, 2), nn.BatchNorm2d(8), 8
            for n, (o, depth) in enumerate(zip(widths, depths, strict=True)):
                blocks = [Block(i if j == 0 else o, o, 2 if n and j == 0 else 1) for j in range(depth)]
                setattr(self, f"layer{n + 1}", nn.Sequential(*blocks))
                i = o
            self.fc = nn.Linear(i, classes)

        def forward(self, x):
            x = torch.nn.functional.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
            for n in range(4):
                x = getattr(self, f"layer{n + 1}")(x)
            return self.fc(x.mean((2, 3)))

    torch.manual_seed(0)
    network = Network()
    for value in network.state_dict().values():
        if value.is_floating_point():
            value.copy_(
                0.3 + 0.3 * torch.rand(value.shape) if value.ndim == 1 else 0.3 * torch.randn(value.shape)
            )
    return network


@pytest.mark.parity
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("basic", [True, False])
def test_torchvision_files(basic, train, tmp_path):
    """A `.pth` under torchvision's names, in evaluation and, with every gradient, in training."""
    import torch

    widths, depths = (8, 12, 16, 20), (1, 2, 1, 2)
    network = torchvision_network(basic, widths, depths, 5).train(train)
    torch.save(network.state_dict(), tmp_path / "model.pth")
    kind = "basic" if basic else "bottleneck"
    config = dict(model_type="resnet", embedding_size=8, hidden_sizes=widths, depths=depths, layer_type=kind)
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, report = load_with_report(tmp_path)
    assert not report.new and all(key.endswith("num_batches_tracked") for key in report.ignored)
    image = np.random.default_rng(0).normal(size=(4, 67, 80, 3)).astype(np.float32)
    stats = "batch" if train else "running"

    @jax.jit
    def logits(model):
        return model({"image": image}, stats=stats)["logits"]

    ours, pull = jax.vjp(logits, model)
    theirs = network(torch.tensor(image).permute(0, 3, 1, 2))
    assert error(ours, theirs.detach().numpy()) < 1e-4
    (theirs**2 / 2).sum().backward()
    gradient = flatten(pull(ours)[0].variables)
    for path, key in report.used.items():
        if path.startswith("params/") and "/head/" not in path:
            found = (
                ARCHITECTURES["resnet"].tensors(model.config)[path].layout.to_file(np.asarray(gradient[path]))
            )
            reference = network.get_parameter(key).grad.numpy()
            assert np.linalg.norm(found - reference) < 1e-3 * np.linalg.norm(reference) + 1e-3, path
