"""What the tests of several experiments share."""

import json

import jax
import pytest

from jtl.pretrained import save, scratch


@pytest.fixture
def small_trunk(tmp_path):
    """A folder with an EfficientNet-Lite of seven narrow blocks and random weights: it compiles fast."""
    folder = tmp_path / "trunk"
    folder.mkdir()
    sizes = {"width_coefficient": 0.25, "depth_coefficient": 0.1}
    (folder / "config.json").write_text(json.dumps({"model_type": "efficientnet_lite", **sizes}))
    return str(save(scratch(folder, key=jax.random.key(0)), folder / "model"))
