"""Erasure against texts in which one token alone decides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl.tasks import erasure
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
