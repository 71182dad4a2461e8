"""ResNet-12: its sizes, the two ways to convolve, and the same network in torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl.meta.patch_convolution import PatchResNet12
from jtl.models.resnet12 import ResNet12

WIDTHS = (4, 6)


@pytest.fixture(scope="module")
def net():
    module = ResNet12(WIDTHS)
    variables = jax.jit(module.init)(jax.random.key(0), jnp.zeros((2, 9, 8, 1)))
    return module, variables, jax.random.normal(jax.random.key(1), (3, 9, 8, 1))


def test_sizes():
    module = ResNet12()
    found = jax.eval_shape(module.init_with_output, jax.random.key(0), jnp.zeros((2, 84, 84, 3)))
    assert {name: x.shape for name, x in found[0].items()} == {"map": (2, 5, 5, 640), "features": (2, 640)}
    # The 12.4 million of MetaOptNet's: 12 convolutions of 3 x 3, four of 1 x 1, sixteen norms.
    widths, count = (3, 64, 160, 320, 640), 0
    for a, b in zip(widths, widths[1:], strict=False):
        count += 9 * a * b + 2 * 9 * b * b + a * b + 4 * 2 * b
    assert sum(x.size for x in jax.tree.leaves(found[1]["params"])) == count == 12_424_320
    with pytest.raises(ValueError, match="16 x 16 or more"):
        jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 8, 20, 3)))


@pytest.mark.slow
def test_patches_are_the_same_convolution(net):
    module, variables, image = net
    one, other = (kind(WIDTHS).apply(variables, image)["map"] for kind in (ResNet12, PatchResNet12))
    assert one.shape == (3, 2, 2, 6)
    np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parity
def test_resnet12_is_torchs(net):
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    module, variables, image = net
    params = variables["params"]

    def conv(x, name, padding):
        kernel = torch.tensor(np.asarray(params[name]["kernel"])).permute(3, 2, 0, 1)
        return F.batch_norm(F.conv2d(x, kernel, padding=padding), None, None, training=True)

    x = torch.tensor(np.asarray(image)).permute(0, 3, 1, 2)
    for b in range(2):
        shortcut = conv(x, f"short_{b}", 0)
        for i in range(3):
            x = conv(x, f"conv_{b}_{i}", 1)
            x = F.leaky_relu(x + shortcut if i == 2 else x, 0.1)
        x = F.max_pool2d(x, 2)
    found, _ = module.apply(variables, image, use_running_average=False, mutable=["batch_stats"])
    np.testing.assert_allclose(found["map"], x.permute(0, 2, 3, 1), atol=1e-4)
    np.testing.assert_allclose(found["features"], x.mean((2, 3)), atol=1e-4)
