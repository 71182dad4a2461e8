"""Flow matching: the loss against NumPy, the sampler against a flow that is known, guidance, withheld classes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl.loss import Loss
from jtl.model import remove
from jtl.models.unet import UNetConfig
from jtl.tasks import FlowMatching
from jtl.tasks.flow_matching import noised, sample
from jtl.wrap import function

MEAN, DEVIATION = 0.7, 0.4
CONFIG = UNetConfig(num_classes=3)


def gaussian(params, image, time, label):
    """The velocity between N(0, 1) and N(MEAN, DEVIATION²): E[x₁ - x₀ | x_t]."""
    t = time[:, None, None, None]
    variance = (1 - t) ** 2 + t**2 * DEVIATION**2
    slope = (t * DEVIATION**2 - (1 - t)) / variance
    return {"velocity": MEAN + slope * (image - t * MEAN) + params["w"] * 0}


def linear(params, image, time, label):
    """Something that shows all it read."""
    return {"velocity": params["w"] * image, "read": image, "time": time, "label": label}


def of(net):
    return function(net, {"w": jnp.array(2.0)}).replace(config=CONFIG)


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    image = rng.normal(size=(400, 2, 3, 1)).astype(np.float32)
    return {"image": image, "label": rng.integers(0, 3, 400).astype(np.int32)}


@pytest.mark.parametrize(
    ("method", "power", "order"), [("euler", 1.0, 1), ("heun", 1.0, 2), ("heun", 1.5, 2)]
)
def test_the_sampler_follows_a_gaussian(method, power, order):
    """The flow of Gaussians takes x₀ to μ + σ x₀; the error falls as the order of the method says."""
    noise = np.random.default_rng(0).normal(size=(50, 2, 2, 1)).astype(np.float32)
    label = np.zeros(50, np.int32)

    def error(steps):
        found = sample(of(gaussian), noise, label, steps=steps, method=method, power=power)
        return np.abs(np.asarray(found) - (MEAN + DEVIATION * noise)).max()

    ratio = error(16) / error(32)
    assert 0.8 * 2**order < ratio < 1.6 * 2**order
    assert error(32) < 0.05


def test_guidance_by_hand():
    """One Euler step of a velocity that is the label: none + s (label - none), where none is 3."""
    net = lambda params, image, time, label: {"velocity": 0 * image + label[:, None, None, None]}  # noqa: E731
    noise, label = np.ones((2, 1, 1, 1), np.float32), np.array([0, 2])
    found = sample(of(net), noise, label, steps=1, guidance=2.0, method="euler")
    assert np.asarray(found).ravel().tolist() == [1 + 3 + 2 * (0 - 3), 1 + 3 + 2 * (2 - 3)]
    plain = sample(of(net), noise, label, steps=1, guidance=1.0, method="euler")
    assert np.asarray(plain).ravel().tolist() == [1.0, 3.0]


@pytest.mark.parametrize(("times", "share"), [(None, 0.5), ((0.0, 1.0), 0.728), ((-1.0, 0.5), 0.578)])
def test_the_loss_is_numpys(batch, times, share):
    model = noised(of(linear), times=times, dropped=0.25)
    weight = np.where(np.arange(400) % 3 == 0, 0.0, 1.0 + np.arange(400) % 2).astype(np.float32)
    batch = {**batch, "weight": weight}
    key = jax.random.key(3)
    outputs = model(batch, train=True, key=key)
    target, time = (np.asarray(outputs["flow"][name]) for name in ("target", "time"))
    noise, t = batch["image"] - target, time[:, None, None, None]
    # Unit noise, independent of the image; the line between them; the law of time.
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.05
    assert abs((noise * batch["image"]).mean()) < 0.1
    np.testing.assert_allclose(outputs["read"], (1 - t) * noise + t * batch["image"], atol=1e-6)
    np.testing.assert_array_equal(outputs["time"], time)
    middle = np.mean((time > 0.25) & (time < 0.75))
    assert abs(middle - share) < 0.08
    # A quarter of the classes is withheld, the others are as they were.
    label = np.asarray(outputs["label"])
    withheld = label == 3
    assert 0.17 < withheld.mean() < 0.33
    np.testing.assert_array_equal(label[~withheld], batch["label"][~withheld])

    value, aux = FlowMatching()(model, batch, key)
    errors = ((2 * np.asarray(outputs["read"]) - target) ** 2).mean((1, 2, 3))
    assert float(value) == pytest.approx((weight * errors).sum() / weight.sum(), rel=1e-5)
    assert set(aux.metrics) == {"loss"}


class Velocity(Loss):
    """The mean square of the velocity."""

    def value(self, model, outputs, batch, key):
        """The term."""
        return jnp.square(outputs["velocity"]).mean(), {}


def test_it_adds_up_over_one_forward(batch):
    model, key = noised(of(linear)), jax.random.key(0)
    one = [float(loss(model, batch, key)[0]) for loss in (FlowMatching(), Velocity())]
    both = float((FlowMatching() + 0.5 * Velocity())(model, batch, key)[0])
    assert both == pytest.approx(one[0] + 0.5 * one[1], rel=1e-5)


def test_rows_without_weight_get_no_gradient(batch):
    model, key = noised(of(linear)), jax.random.key(0)
    none = {**batch, "weight": np.zeros(400, np.float32)}
    slope = jax.grad(lambda model: FlowMatching()(model, none, key)[0], allow_int=True)(model)
    assert float(slope.params["w"]) == 0


def test_refused(batch):
    model = noised(of(linear))
    with pytest.raises(ValueError, match="pass key="):
        FlowMatching()(model, batch, None)
    with pytest.raises(KeyError, match="noised"):
        FlowMatching()(remove(model, "noised"), {**batch, "time": np.zeros(400)}, jax.random.key(0))
    with pytest.raises(ValueError, match="dropped is a share"):
        noised(of(linear), dropped=1.0)
    # Outside training nothing is noised.
    outputs = model({**batch, "time": np.zeros(400)})
    np.testing.assert_array_equal(outputs["read"], batch["image"])
