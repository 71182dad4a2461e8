"""Keras' weight files: small ones that are written here as Keras 3 lays them out."""

import json
import sys

import h5py
import numpy as np
import pytest

from jtl.pretrained import WeightsError, load_with_report
from jtl.pretrained.formats import FormatError, read_keras, read_tensors
from jtl.tree import flatten

CONFIG = dict(model_type="vgg", depths=[1, 2], hidden_sizes=[4, 5])


def arrays(rng):
    """Kernel and bias of each layer, by its place in a subclassed model and its name."""
    sizes = {
        ("block1/layers/conv2d", "block1_conv1"): (3, 3, 3, 4),
        ("block2/layers/conv2d", "block2_conv1"): (3, 3, 4, 5),
        ("block2/layers/conv2d_1", "block2_conv2"): (3, 3, 5, 5),
        ("side", "conv2d_7"): (1, 1, 5, 1),
    }
    return {
        layer: [rng.normal(size=s).astype(np.float32) for s in (size, size[-1:])]
        for layer, size in sizes.items()
    }


def write(file, layers):
    with h5py.File(file, "w") as content:
        for (path, name), values in layers.items():
            group = content.create_group(f"{path}/vars")
            group.attrs["name"] = name
            for i, value in enumerate(values):
                group[str(i)] = value
        content.create_group("block2/layers/max_pooling2d/vars").attrs["name"] = "max_pooling2d"
    return file


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_tensors_and_a_model(folder):
    layers = arrays(np.random.default_rng(0))
    file = write(folder / "model.weights.h5", layers)
    found = read_tensors(folder)
    assert set(found) == {f"{name}/{part}" for _, name in layers for part in ("kernel", "bias")}
    for (_, name), (kernel, bias) in layers.items():
        np.testing.assert_array_equal(found[f"{name}/kernel"], kernel.transpose(3, 2, 0, 1))
        np.testing.assert_array_equal(found[f"{name}/bias"], bias)
    model, report = load_with_report(folder)
    assert report.ignored == ("conv2d_7/kernel", "conv2d_7/bias") and not report.new
    leaves = flatten(model.params)
    for (path, _), (kernel, bias) in list(layers.items())[:-1]:
        stage, layer = int(path[5]) - 1, int(path.endswith("_1"))
        ours = f"encoder/stage_{stage}/layer_{layer}/conv"
        np.testing.assert_array_equal(leaves[f"{ours}/kernel"], kernel)
        np.testing.assert_array_equal(leaves[f"{ours}/bias"], bias)
    assert list(read_keras(file)) == list(found)


def test_other_layers(tmp_path):
    """A dense layer is turned round, others are given as they are, two of one name by their paths."""
    rng = np.random.default_rng(0)
    kernel, scale, first, second = (rng.normal(size=s) for s in ((3, 4), (3,), (2, 2), (5,)))
    layers = {
        ("layers/dense_1", "classifier"): [kernel],
        ("layers/layer_normalization", "norm"): [scale, scale + 1],
        ("one/layers/embedding", "table"): [first],
        ("two/layers/embedding", "table"): [second],
    }
    found = read_keras(write(tmp_path / "x.h5", layers))
    np.testing.assert_array_equal(found["classifier/kernel"], kernel.T)
    np.testing.assert_array_equal(found["norm/1"], scale + 1)
    np.testing.assert_array_equal(found["one/layers/embedding/0"], first)
    np.testing.assert_array_equal(found["two/layers/embedding/0"], second)
    assert len(found) == 5


def test_a_layer_that_does_not_fit(folder):
    layers = arrays(np.random.default_rng(0))
    layers["block2/layers/conv2d", "block2_conv1"][0] = np.zeros((3, 3, 4, 6), np.float32)
    layers["extra", "dense"] = [np.zeros((2, 2))]
    write(folder / "model.weights.h5", layers)
    with pytest.raises(
        WeightsError, match=r"(?s)of shape \(5, 4, 3, 3\), found \(6, 4, 3, 3\).*dense/kernel"
    ):
        load_with_report(folder)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
def test_a_cut_file(folder, share):
    file = write(folder / "model.weights.h5", arrays(np.random.default_rng(0)))
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(FormatError, match="is not a complete HDF5 file.*Fetch it again"):
        load_with_report(folder)


def test_other_files(tmp_path):
    with h5py.File(tmp_path / "old.h5", "w") as content:  # as Keras 2 laid them out
        content["block1_conv1/block1_conv1/kernel:0"] = np.zeros((3, 3, 3, 4))
    with pytest.raises(
        FormatError, match="expected arrays in groups `vars`, as Keras 3 writes them, found 'block1"
    ):
        read_keras(tmp_path / "old.h5")
    with pytest.raises(FileNotFoundError, match="No weight file"):
        read_keras(tmp_path / "none.h5")


def test_links_out_of_the_file_are_not_followed(tmp_path):
    secret = write(tmp_path / "secret.h5", arrays(np.random.default_rng(0)))
    file = write(tmp_path / "x.h5", {("a", "dense"): [np.zeros((2, 2))]})
    with h5py.File(file, "a") as content:
        content["b"] = h5py.ExternalLink(secret.name, "/block1")
    assert list(read_keras(file)) == ["dense/kernel"]


def test_without_h5py(folder, monkeypatch):
    write(folder / "model.weights.h5", arrays(np.random.default_rng(0)))
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"h5py, which is not installed: pip install 'jtl\[formats\]'"):
        load_with_report(folder)
