import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl import heads
from jtl.wrap import function

B, X, D, C = 12, 5, 6, 3  # rows, inputs, features, classes


def net(params, x):
    return {"features": jnp.tanh(x @ params["body"]["kernel"])}


@pytest.fixture(scope="session")
def batch():
    """Seven source and five target rows, mixed; one row of each is padding, and targets have no label."""
    rng = np.random.default_rng(0)
    domain = np.array([0, 1, 0, 0, 1, 1, 0, 1, 0, 0, 1, 0], np.int32)
    weight = np.ones(B, np.float32)
    weight[[2, 7]] = 0
    return {
        "x": jnp.asarray(rng.normal(size=(B, X)), jnp.float32) + domain[:, None],
        "label": jnp.asarray(np.where(domain == 0, rng.integers(0, C, B), -1), jnp.int32),
        "domain": jnp.asarray(domain),
        "weight": jnp.asarray(weight),
    }


@pytest.fixture(scope="session")
def model():
    """A small body and a linear classifier on its features."""
    kernel = jax.random.normal(jax.random.key(1), (X, D))
    body = function(net, {"body": {"kernel": kernel}})
    return heads.classifier(body, C, key=jax.random.key(2), on="features", width=D)
