"""The pyramid on several trunks: shapes, arithmetic by hand, and that nothing but the head is new."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl import heads
from jtl.model import Linen, Model
from jtl.models import ARCHITECTURES
from jtl.models.feature_pyramid import FeaturePyramid, cells, detector, segmenter, stages, with_stages

SMALL = {
    "resnet": {
        "embedding_size": 8,
        "hidden_sizes": (8, 8, 16, 24),
        "depths": (1, 1, 1, 1),
        "layer_type": "basic",
    },
    "convnext": {"hidden_sizes": (8, 8, 16, 24), "depths": (1, 1, 1, 1)},
    "efficientnet_lite": {"width_coefficient": 0.25, "depth_coefficient": 0.1},
}


def trunk(kind):
    """Shapes alone."""
    architecture = ARCHITECTURES[kind]
    config = architecture.config(**SMALL[kind])
    module = architecture.module(config)
    variables = jax.eval_shape(module.init, jax.random.key(0), **architecture.example(config))
    return Model(dict(variables), Linen(module), (), config)


@pytest.mark.parametrize("kind", SMALL)
def test_stages_have_their_strides(kind):
    model = trunk(kind)
    known = stages(model.config)
    finest = 2 if kind == "efficientnet_lite" else 4
    assert sorted(known) == [s for s in (2, 4, 8, 16, 32) if s >= finest]
    image = jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32)
    maps = jax.eval_shape(lambda m, x: m({"image": x})["stages"], with_stages(model, sorted(known)), image)
    assert [x.shape[:3] for x in maps] == [(2, 64 // s, 96 // s) for s in sorted(known)]
    assert with_stages(model, [32, 8]).techniques[-1].paths == (known[8], known[32])


@pytest.mark.parametrize("kind", SMALL)
def test_heads_on_every_trunk(kind):
    model, image = trunk(kind), jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32)
    found = jax.eval_shape(lambda m, key: detector(m, 5, key=key, width=8, depth=1), model, jax.random.key(1))
    outputs = jax.eval_shape(lambda m, x: m({"image": x}), found, image)
    L = 8 * 12 + 4 * 6 + 2 * 3
    wanted = {"class_logits": (2, L, 5), "distances": (2, L, 4), "centerness": (2, L), "cells": (L, 3)}
    assert {name: outputs[name].shape for name in wanted} == wanted
    pixels = jax.eval_shape(lambda m, key: segmenter(m, 5, key=key, width=8), model, jax.random.key(1))
    outputs = jax.eval_shape(lambda m, x: m({"image": x}), pixels, image)
    assert outputs["pixel_logits"].shape == (2, 64, 96, 5)
    for one in (found, pixels):
        assert set(one.params) == {*model.params, "head"} and heads.find(one).on == "stages"


@pytest.fixture(scope="module")
def resnet():
    model = trunk("resnet")
    params = jax.tree.map(lambda x: 0.1 * jnp.ones(x.shape), model.variables)
    return model.replace(variables=params)


def outputs_of(model):
    return jax.jit(lambda model, image: model({"image": image}))(model, jnp.ones((1, 64, 64, 3)))


def test_a_new_detector_finds_nothing_and_is_used_again_by_its_leaves(resnet):
    model = detector(resnet, 5, key=jax.random.key(1), width=8, depth=1)
    outputs = outputs_of(model)
    assert np.asarray(jax.nn.sigmoid(outputs["class_logits"])).max() < 0.02
    strides = np.asarray(outputs["cells"])[:, 2]
    np.testing.assert_allclose(np.asarray(outputs["distances"])[0], np.tile(strides[:, None], 4), rtol=0.2)
    body = {name: leaves for name, leaves in model.params.items() if name != "head"}
    assert all(jax.tree.leaves(jax.tree.map(lambda own, old: own is old, body, resnet.params)))

    again = detector(resnet, 5, key=jax.random.key(2), width=8, depth=1, params=model.params["head"])
    np.testing.assert_array_equal(outputs["class_logits"], outputs_of(again)["class_logits"])


def test_pyramid_by_hand():
    """With unit weights: a map of ones of 2 channels over one of 3s, of 1 channel, doubled by repetition."""
    module = FeaturePyramid(1)
    maps = (jnp.ones((1, 3, 3, 2)), jnp.arange(4.0).reshape(1, 2, 2, 1))
    params = {
        "lateral_0": {"kernel": jnp.ones((1, 1, 2, 1)), "bias": jnp.zeros(1)},
        "lateral_1": {"kernel": 10 * jnp.ones((1, 1, 1, 1)), "bias": jnp.ones(1)},
    }
    middle = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0)  # a 3 x 3 convolution that changes nothing
    params |= {f"smooth_{i}": {"kernel": middle, "bias": jnp.zeros(1)} for i in range(2)}
    fine, coarse = module.apply({"params": params}, maps)
    assert coarse[0, ..., 0].tolist() == [[1, 11], [21, 31]]
    assert fine[0, ..., 0].tolist() == [[3, 3, 13], [3, 3, 13], [23, 23, 33]]  # cut to three rows and columns


def test_cells_lie_in_the_middle():
    found = cells([(2, 3)], (16,))
    assert found.tolist() == [[8, 8, 16], [24, 8, 16], [40, 8, 16], [8, 24, 16], [24, 24, 16], [40, 24, 16]]


def test_refused():
    with pytest.raises(ValueError, match="the model has no map of stride 2; it has"):
        detector(trunk("resnet"), 5, key=jax.random.key(0), strides=(2, 4))
    with pytest.raises(ValueError, match="classes must be at least 1, got 0"):
        detector(trunk("resnet"), 0, key=jax.random.key(0))
    vit = ARCHITECTURES["vit"].config()
    with pytest.raises(ValueError, match="has no stages of known strides"):
        stages(vit)
