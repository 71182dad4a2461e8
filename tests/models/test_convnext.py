"""ConvNeXt: its published sizes, stochastic depth, the norm of responses, and settings that are refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl.models import ARCHITECTURES
from jtl.models.convnext import ConvNext, ConvNextConfig, ConvNextV2Config, ResponseNorm
from jtl.pretrained.load import expected

ATTO = dict(depths=(2, 2, 6, 2), hidden_sizes=(40, 80, 160, 320))


@pytest.mark.parametrize(
    ("millions", "config"),
    [  # the papers' tables, with 1,000 classes
        (28.6, ConvNextConfig()),
        (88.6, ConvNextConfig(depths=(3, 3, 27, 3), hidden_sizes=(128, 256, 512, 1024))),
        (3.7, ConvNextV2Config(**ATTO)),
        (28.6, ConvNextV2Config()),
    ],
)
def test_published_sizes(millions, config):
    architecture = ARCHITECTURES[config.model_type]
    leaves = expected(architecture.module(config), architecture, config)
    size = sum(leaf.size for leaf in leaves.values()) + (config.width("pooled") + 1) * 1000
    assert round(size / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": [1, 2]}, "a width and a depth of at least 1 for each of num_stages=4"),
        ({"num_stages": 3}, "for each of num_stages=3"),
        ({"hidden_act": "gelo"}, "did you mean.*gelu"),
        ({"model_type": "swin"}, "'swin', expected 'convnext"),
    ],
)
def test_unsupported_settings_are_refused(change, message):
    for config in (ConvNextConfig, ConvNextV2Config):
        with pytest.raises(ValueError, match=message):
            config.from_hf({"model_type": config.model_type} | change)


def test_an_image_of_which_nothing_is_left():
    config = ConvNextConfig(num_stages=3, hidden_sizes=(4, 4, 4), depths=(1, 1, 1), patch_size=(4, 2))
    module = ConvNext(config)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 16, 8, 3))))
    assert shapes["params"]["embeddings"]["patch"]["kernel"].shape == (4, 2, 3, 4)
    with pytest.raises(ValueError, match=r"found \(1, 15, 8, 3\), with H and W of at least 16 and 8"):
        jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 15, 8, 3))))


def test_stochastic_depth_skips_whole_examples_more_often_in_later_blocks():
    config = ConvNextConfig(num_stages=1, hidden_sizes=(4,), depths=(2,), layer_scale_init_value=1.0)
    config = dataclasses.replace(config, drop_path_rate=0.5)
    assert config.drop_rates() == ((0.0, 0.5),)
    assert ConvNextConfig(drop_path_rate=0.17).drop_rates()[2][:2] == pytest.approx((0.06, 0.07))
    module, image = ConvNext(config), jax.random.normal(jax.random.key(0), (64, 8, 8, 3))
    variables = jax.jit(module.init)(jax.random.key(1), image)
    rngs = {"dropout": jax.random.key(2)}
    run = jax.jit(lambda v: module.apply(v, image, train=True, rngs=rngs, capture_intermediates=True))
    stages = run(variables)[1]["intermediates"]
    first, second = (stages["encoder"]["stage_0"][f"block_{i}"]["__call__"][0] for i in (0, 1))
    assert not np.array_equal(first, stages["embeddings"]["__call__"][0])
    skipped = (second == first).all((1, 2, 3))
    assert 16 < skipped.sum() < 48 and not (second == first).all((1, 2))[~skipped].any()


def test_response_norm():
    """Its formula on a channel that dominates, and a finite gradient where a channel is dead."""
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    x[..., 1] *= 3
    x[..., 2] = 0
    rng = np.random.default_rng(1)
    params = {name: rng.normal(size=(1, 1, 1, 5)).astype(np.float32) for name in ("scale", "bias")}
    norms = np.linalg.norm(x.reshape(2, 12, 5), axis=1)
    relative = (norms / norms.mean(1, keepdims=True))[:, None, None]
    formula = params["scale"] * x * relative + params["bias"] + x
    apply = jax.jit(lambda x: ResponseNorm().apply({"params": params}, x))
    np.testing.assert_allclose(apply(x), formula, rtol=1e-4, atol=1e-5)
    gradient = jax.grad(lambda x: jnp.square(apply(x)).sum())(jnp.asarray(x))
    assert np.isfinite(gradient).all() and (gradient[..., 2] != 0).all()
