"""EfficientNet-Lite: real weights name real photographs, and every number agrees with torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jtl import tree
from jtl.models.efficientnet_lite import (
    VARIANTS,
    Block,
    BlockSpec,
    EfficientNetLite,
    EfficientNetLiteConfig,
    round_channels,
    tensors,
)
from jtl.models.imagenet import imagenet_classes
from jtl.models.parts.depthwise import depthwise_conv
from jtl.pretrained.load import load_with_report


@pytest.fixture(scope="module")
def lite0():
    return load_with_report("efficientnet-lite0")


def photograph(pixels: np.ndarray, config: EfficientNetLiteConfig) -> np.ndarray:
    """Central crop, bicubic resize and normalisation, as `EfficientNetLiteConfig` documents them."""
    from PIL import Image

    image = Image.fromarray(pixels)
    size = config.image_size
    side = int(size / (size + config.crop_padding) * min(image.size))
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box), np.float32)
    mean, std = np.float32(config.image_mean), np.float32(config.image_std)
    return (pixels / 255 - mean[None, None]) / std[None, None]


def test_names_real_photographs(lite0):
    from skimage import data
    from sklearn.datasets import load_sample_image

    model, report = lite0
    assert len(report.used) == 247 and not report.new  # 296 tensors less 49 batch counters
    assert len(report.ignored) == 49 and all(name.endswith("num_batches_tracked") for name in report.ignored)
    photos = {
        "cat": data.chelsea(),
        "coffee": data.coffee(),
        "rocket": data.rocket(),
        "camera": np.repeat(data.camera()[..., None], 3, -1),
        "palace": load_sample_image("china.jpg"),
        "flower": load_sample_image("flower.jpg"),
    }
    image = jnp.stack([photograph(pixels, model.config) for pixels in photos.values()])
    logits = jax.jit(lambda model, image: model({"image": image})["logits"])(model, image)
    best = dict(zip(photos, [imagenet_classes()[i] for i in np.argmax(logits, -1)], strict=True))
    assert best["cat"] in {"tabby", "tiger cat", "Egyptian cat"}
    # ImageNet has no tower of the Forbidden City, no dahlia and no rocket; these are its nearest classes. The
    # camera of scikit-image is mostly the tripod it stands on.
    del best["cat"]
    assert best == {
        "coffee": "espresso",
        "rocket": "missile",
        "camera": "tripod",
        "palace": "palace",
        "flower": "daisy",
    }


def test_outputs(lite0):
    model, _ = lite0
    out = jax.jit(lambda model, x: model({"image": x}, taps=("layer_3",)))(model, jnp.zeros((2, 96, 64, 3)))
    assert out["map"].shape == (2, 3, 2, 1280)
    assert out["logits"].shape == (2, 1000)
    assert out["taps"]["layer_3"].shape == (2, 12, 8, 40)
    np.testing.assert_allclose(out["pooled"], np.mean(out["map"], (1, 2)), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(out["features"], out["pooled"])


def test_grey_image_is_refused(lite0):
    with pytest.raises(ValueError, match=r"expected shape \(B, H, W, 3\), found \(2, 32, 32, 1\)"):
        lite0[0]({"image": jnp.zeros((2, 32, 32, 1))})


@pytest.mark.parametrize("name", VARIANTS)
def test_name_map_covers_every_variable(name):
    config = VARIANTS[name]
    module = EfficientNetLite(config)
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3))))
    assert set(tree.flatten(variables)) == set(tensors(config))
    assert EfficientNetLiteConfig.from_hf(config.to_hf()) == config


def test_published_sizes():
    """Million parameters with the classifier: the release's table says 4.7, 5.4, 6.1, 8.2, 13.0."""
    millions = {}
    for name, config in VARIANTS.items():
        module = EfficientNetLite(config)
        params = jax.eval_shape(lambda m=module: m.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3))))[
            "params"
        ]
        size = sum(leaf.size for leaf in jax.tree.leaves(params)) + 1280 * 1000 + 1000
        millions[name] = round(size / 1e6, 1)
    assert list(millions.values()) == [4.7, 5.4, 6.1, 8.2, 13.0]


def test_round_channels():
    assert [round_channels(c) for c in (3, 24, 26.4, 28.8, 33.6, 11.9)] == [8, 24, 24, 32, 32, 16]


def test_config_errors():
    with pytest.raises(ValueError, match="must be positive"):
        EfficientNetLiteConfig(width_coefficient=0.0)
    with pytest.raises(ValueError, match="model_type is 'vit'"):
        EfficientNetLiteConfig.from_hf({"model_type": "vit"})


@pytest.mark.parametrize("size,stride,k", [(8, 1, 3), (8, 2, 5), (7, 2, 3), (5, 2, 5), (2, 2, 5), (1, 1, 5)])
def test_depthwise_is_the_grouped_convolution(size, stride, k):
    """Value, both gradients and the gradients of those, against XLA's own grouped convolution."""
    rng = np.random.default_rng(size)
    image = jnp.float32(rng.normal(size=(2, size, size + 1, 6)))
    kernel = jnp.float32(rng.normal(size=(k, k, 1, 6)))
    dims = lax.conv_dimension_numbers(image.shape, kernel.shape, ("NHWC", "HWIO", "NHWC"))
    options = dict(dimension_numbers=dims, feature_group_count=6)

    def run(conv):
        def pulled(x, w):
            y, pull = jax.vjp(lambda x, w: conv(x, w, (stride, stride), "SAME", **options), x, w)
            return y, *pull(jnp.cos(y))

        def norm(x, w):
            return sum(jnp.sum(part**2) for part in pulled(x, w))

        return jax.jit(lambda x, w: (*pulled(x, w), *jax.grad(norm, (0, 1))(x, w)))(image, kernel)

    for ours, theirs in zip(run(depthwise_conv), run(lax.conv_general_dilated), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5 * np.abs(theirs).max())


def test_depthwise_refuses_other_convolutions():
    with pytest.raises(ValueError, match="2 groups, 4 channels in"):
        depthwise_conv(
            jnp.zeros((1, 4, 4, 4)), jnp.zeros((3, 3, 1, 4)), (1, 1), "SAME", feature_group_count=2
        )


def test_stochastic_depth_skips_whole_examples():
    block = Block(BlockSpec(8, 8, 3, 1, 1), EfficientNetLiteConfig(), drop=0.5)
    image = jax.random.normal(jax.random.key(1), (64, 4, 4, 8))
    variables = jax.jit(block.init)(jax.random.key(0), image)
    run = jax.jit(
        lambda train: block.apply(variables, image, train=train, rngs={"dropout": jax.random.key(2)}),
        static_argnums=0,
    )
    branch, trained = run(False) - image, run(True) - image
    kept = np.any(trained != 0, (1, 2, 3))
    assert 16 < kept.sum() < 48
    np.testing.assert_allclose(trained[kept], 2 * branch[kept], rtol=1e-4, atol=1e-5)


# Parity with torch: the network written again from the paper's table and the release's description.


def torch_network(config):
    import torch
    from torch import nn
    from torch.nn import functional as F

    class SameConv(nn.Conv2d):
        def forward(self, x):
            pads = []
            for length in (x.shape[3], x.shape[2]):
                k, s = self.kernel_size[0], self.stride[0]
                total = max((-(-length // s) - 1) * s + k - length, 0)
                pads += [total // 2, total - total // 2]
            return F.conv2d(F.pad(x, pads), self.weight, None, self.stride, groups=self.groups)

    def conv(i, o, k=1, s=1, groups=1):
        return SameConv(i, o, k, s, groups=groups, bias=False)

    def norm(channels):
        return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)

    class Bottleneck(nn.Module):
        def __init__(self, i, o, k, s, e):
            super().__init__()
            if e > 1:
                self._expand_conv, self._bn0 = conv(i, i * e), norm(i * e)
            self._depthwise_conv, self._bn1 = conv(i * e, i * e, k, s, i * e), norm(i * e)
            self._project_conv, self._bn2 = conv(i * e, o), norm(o)
            self.skip = s == 1 and i == o

        def forward(self, x):
            y = x
            if hasattr(self, "_expand_conv"):
                y = F.relu6(self._bn0(self._expand_conv(y)))
            y = F.relu6(self._bn1(self._depthwise_conv(y)))
            y = self._bn2(self._project_conv(y))
            return x + y if self.skip else y

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self._conv_stem, self._bn0 = conv(3, 32, 3, 2), norm(32)
            shapes = [(1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80)]
            shapes += [(3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320)]
            i, blocks = 32, []
            for n, (repeats, k, s, e, o) in enumerate(shapes):
                scaled = o * config.width_coefficient
                o = int(scaled + 4) // 8 * 8
                o = o + 8 if o < 0.9 * scaled else o
                repeats = repeats if n in (0, 6) else int(np.ceil(repeats * config.depth_coefficient))
                for r in range(repeats):
                    blocks.append(Bottleneck(i, o, k, s if r == 0 else 1, e))
                    i = o
            self._blocks = nn.ModuleList(blocks)
            self._conv_head, self._bn1 = conv(i, 1280), norm(1280)
            self._fc = nn.Linear(1280, 1000)

        def forward(self, x):
            x = F.relu6(self._bn0(self._conv_stem(x)))
            for block in self._blocks:
                x = block(x)
            x = F.relu6(self._bn1(self._conv_head(x)))
            return x, self._fc(x.mean((2, 3)))

    torch.manual_seed(0)
    return Network()


def relative(ours, theirs):
    theirs = theirs.detach().numpy()
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


def from_torch(network, config):
    state = {key: value.numpy().copy() for key, value in network.state_dict().items()}
    return tree.nest(
        {path: jnp.asarray(t.layout.to_jax(state[t.key])) for path, t in tensors(config).items()}
    )


@pytest.mark.parity
@pytest.mark.parametrize("size", [224, 97])
def test_parity_of_the_real_weights(lite0, size):
    torch = pytest.importorskip("torch")
    model, _ = lite0
    network = torch_network(model.config)
    head = {"params/head/out/kernel": "_fc.weight", "params/head/out/bias": "_fc.bias"}
    ours = tree.flatten(model.variables)
    state = {t.key: t.layout.to_file(np.asarray(ours[path])) for path, t in tensors(model.config).items()}
    state |= {key: np.asarray(ours[path]).T for path, key in head.items()}
    state = {key: torch.tensor(np.ascontiguousarray(value)) for key, value in state.items()}
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert not unexpected and all(key.endswith("num_batches_tracked") for key in missing)
    network.eval()
    image = jax.random.normal(jax.random.key(0), (2, size, size, 3))
    with torch.no_grad():
        feature_map, logits = network(torch.tensor(np.asarray(image)).permute(0, 3, 1, 2))
    out = jax.jit(lambda model, x: model({"image": x}))(model, image)
    assert relative(out["map"], feature_map.permute(0, 2, 3, 1)) < 1e-4
    assert relative(out["logits"], logits) < 1e-4


@pytest.mark.parity
def test_parity_with_batch_statistics():
    """Training mode, in float64: outputs, every gradient and the running statistics.

    torch puts the unbiased variance of the batch into the running one, Flax the biased: n / (n - 1) apart.
    """
    torch = pytest.importorskip("torch")
    config = EfficientNetLiteConfig(width_coefficient=1.2, depth_coefficient=0.5)  # ten blocks
    network = torch_network(config).train().double()
    with jax.enable_x64(True):
        variables = from_torch(network, config)
        image = jax.random.normal(jax.random.key(0), (4, 32, 32, 3), "float64")

        @jax.jit
        def run(params):
            module, trained = EfficientNetLite(config), {**variables, "params": params}
            out, state = module.apply(trained, image, use_running_average=False, mutable=["batch_stats"])
            return out["map"], state["batch_stats"]

        ours, pull, stats = jax.vjp(run, variables["params"], has_aux=True)
        stats = jax.tree.map(np.asarray, stats)
        gradient = tree.flatten(jax.tree.map(np.asarray, jax.jit(pull)(ours)[0]))
    theirs, _ = network(torch.tensor(np.asarray(image)).permute(0, 3, 1, 2))
    (theirs**2 / 2).sum().backward()
    assert relative(ours, theirs.permute(0, 2, 3, 1)) < 1e-7

    state = network.state_dict()
    pairs = {
        path.split("/", 1)[1]: t for path, t in tensors(config).items() if path.startswith("batch_stats")
    }
    n = {"last_norm": 4, "layer_0/depthwise_norm": 4 * 16 * 16}
    for path, value in tree.flatten(stats).items():
        found = state[pairs[path].key].numpy()
        if path.endswith("mean"):
            np.testing.assert_allclose(value, found, atol=1e-8)
        elif count := n.get(path.removesuffix("/var")):
            np.testing.assert_allclose(value, 0.99 + (found - 0.99) * (count - 1) / count, rtol=1e-7)
            assert np.abs(value - found).max() > 1e-7  # the correction is not vacuous
    for path, t in tensors(config).items():
        if path.startswith("params/"):
            found = t.layout.to_jax(network.get_parameter(t.key).grad.numpy())
            error = np.linalg.norm(gradient[path.removeprefix("params/")] - found)
            assert error < 1e-6 * np.linalg.norm(found) + 1e-9, path  # some are zero by normalisation
