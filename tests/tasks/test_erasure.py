"""Erasure and occlusion against models that say themselves what they look at."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl.tasks import erasure, occlusion
from jtl.wrap import function


def counting(params, input_ids, attention_mask):
    """Class 1 by the sum of the tokens' weights that are seen."""
    total = jnp.sum(params["weight"][input_ids] * attention_mask, 1)
    return {"logits": jnp.stack([jnp.zeros_like(total), total], -1)}


@pytest.mark.parametrize("shift", [0.0, -10.0])
def test_of_a_sum_of_tokens(shift):
    """With one weight a token, hiding it takes that weight from the difference of the logits."""
    weight = np.array([0.0, 2.0, -1.0, 0.5], np.float32)
    model = function(counting, {"weight": jnp.asarray(weight + shift * (np.arange(4) == 3))})
    batch = {
        "input_ids": np.array([[1, 2, 3, 0], [1, 1, 3, 3]]),
        "attention_mask": np.array([[1, 1, 1, 0], [1] * 4]),
    }
    found = np.asarray(jax.jit(erasure)(model, batch))
    weights = np.asarray(model.params["weight"])[batch["input_ids"]] * batch["attention_mask"]
    total = weights.sum(1, keepdims=True)
    sign = np.where(total > 0, 1, -1)  # of the predicted class
    expected = -np.logaddexp(0, -sign * total) + np.logaddexp(0, -sign * (total - weights))
    np.testing.assert_allclose(found, np.where(batch["attention_mask"] > 0, expected, 0), atol=1e-5)
    assert found[0, 3] == 0 and (sign == (1 if shift == 0 else -1)).all()


def test_of_a_square_of_an_image():
    """A model that looks at one pixel loses exactly where the square covers it."""

    def one_pixel(params, image):
        seen = image[:, 3, 5, 0]
        return {"logits": jnp.stack([jnp.zeros_like(seen), params["w"] * seen], -1)}

    model = function(one_pixel, {"w": jnp.array(2.0)})
    image = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype(np.float32)
    image[:, 3, 5, 0] = 1.5, -0.5
    found = np.asarray(jax.jit(lambda m, b: occlusion(m, b, patch=2))(model, {"image": image}))
    assert found.shape == (2, 7, 7)
    covers = np.zeros((7, 7), bool)
    covers[2:4, 4:6] = True
    whole = [-np.log1p(np.exp(-3.0)), -np.log1p(np.exp(-1.0))]
    for own, said in zip(found, whole, strict=True):
        np.testing.assert_allclose(own[covers], said - np.log(0.5), atol=1e-5)
        np.testing.assert_array_equal(own[~covers], 0)
    with pytest.raises(ValueError, match="patch must be 1 to 8"):
        occlusion(model, {"image": image}, patch=9)
