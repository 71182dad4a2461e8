"""What the tests of several experiments share."""

import json

import jax
import pytest

from jtl.distill import choose_layers
from jtl.pretrained import load, save, scratch


@pytest.fixture(scope="session")
def short_minilm(tmp_path_factory):
    """A folder with the first two of MiniLM's six layers: real weights that compile and run in a third of the time."""
    model = choose_layers(load("minilm"), (0, 1))
    return str(save(model, tmp_path_factory.mktemp("minilm") / "model", tokenizer="minilm"))


@pytest.fixture(scope="session")
def short_smollm2(tmp_path_factory):
    """A folder with the first three of SmolLM2's thirty layers."""
    model = choose_layers(load("smollm2"), (0, 1, 2), stack="decoder/layer_")
    return str(save(model, tmp_path_factory.mktemp("smollm2") / "model", tokenizer="smollm2"))


@pytest.fixture
def small_trunk(tmp_path):
    """A folder with an EfficientNet-Lite of seven narrow blocks and random weights: it compiles fast."""
    folder = tmp_path / "trunk"
    folder.mkdir()
    sizes = {"width_coefficient": 0.25, "depth_coefficient": 0.1}
    (folder / "config.json").write_text(json.dumps({"model_type": "efficientnet_lite", **sizes}))
    return str(save(scratch(folder, key=jax.random.key(0)), folder / "model"))
