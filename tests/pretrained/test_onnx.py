"""ONNX graphs as torch exports them: small ones that are written here, and DINOv2 inside a model of saliency."""

import sys

import jax
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from jtl import tree
from jtl.pretrained import load, load_with_report, resolve, save
from jtl.pretrained.formats import FormatError, read_onnx, read_tensors

ROOT = "/encoder/layer.0/attention/attention"


def graph(rng):
    """Weights, and nodes that read them, in the order and under the names of torch's exporter."""
    weights = {
        "embeddings.patch.bias": rng.normal(size=4),
        "onnx::Concat_9": rng.normal(size=(1, 1, 4)),
        "onnx::Reshape_10": rng.normal(size=(1, 9, 4)),
        "onnx::MatMul_11": rng.normal(size=(4, 4)),
        "onnx::MatMul_12": rng.normal(size=(4, 6)),
        "onnx::MatMul_13": rng.normal(size=(4, 4)),
    }
    nodes = [
        ("Add", "/embeddings/Add", ["x", "embeddings.patch.bias"]),
        ("Reshape", "/embeddings/Reshape_1", ["onnx::Reshape_10", "shape"]),
        ("Concat", "/embeddings/Concat_6", ["onnx::Concat_9", "y"]),
        ("MatMul", f"{ROOT}/key/MatMul", ["x", "onnx::MatMul_13"]),  # keys come first, as in the exporter
        ("MatMul", f"{ROOT}/query/MatMul", ["x", "onnx::MatMul_11"]),
        ("MatMul", f"{ROOT}/MatMul", ["q", "k"]),
        ("MatMul", "/encoder/layer.0/mlp/fc1/MatMul", ["x", "onnx::MatMul_12"]),
    ]
    return {name: value.astype(np.float32) for name, value in weights.items()}, nodes


def write(file, weights, nodes):
    made = [helper.make_node(kind, inputs, [f"{name}_out"], name=name) for kind, name, inputs in nodes]
    initial = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "z")]
    model = helper.make_model(helper.make_graph(made, "graph", ends[:1], ends[1:], initial))
    file.write_bytes(model.SerializeToString())
    return file


def test_names(tmp_path):
    weights, nodes = graph(np.random.default_rng(0))
    found = read_tensors(write(tmp_path / "x.onnx", weights, nodes))
    expected = {
        "embeddings.patch.bias": weights["embeddings.patch.bias"],
        f"{ROOT[1:].replace('/', '.')}.key.weight": weights["onnx::MatMul_13"].T,
        f"{ROOT[1:].replace('/', '.')}.query.weight": weights["onnx::MatMul_11"].T,
        "encoder.layer.0.mlp.fc1.weight": weights["onnx::MatMul_12"].T,
        "embeddings.position_embeddings": np.concatenate(
            [weights[f"onnx::{n}"] for n in ("Concat_9", "Reshape_10")], 1
        ),
    }
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


def test_weights_that_no_node_names(tmp_path):
    weights, nodes = graph(np.random.default_rng(0))
    nameless = [(kind, "" if "fc1" in name else name, inputs) for kind, name, inputs in nodes]
    with pytest.raises(FormatError, match="no name for the tensor 'onnx::MatMul_12', which 'MatMul' reads"):
        read_onnx(write(tmp_path / "x.onnx", weights, nameless))
    other = [("Mul" if "fc1" in name else kind, name, inputs) for kind, name, inputs in nodes]
    with pytest.raises(
        FormatError, match="no name for the tensor 'onnx::MatMul_12', which '/encoder/layer.0/mlp"
    ):
        read_onnx(write(tmp_path / "x.onnx", weights, other))
    with pytest.raises(FormatError, match=r"of the positions of 'embeddings' only \['Reshape'\] was found"):
        read_onnx(write(tmp_path / "x.onnx", weights, [node for node in nodes if node[0] != "Concat"]))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_cut_file(tmp_path, share):
    file = write(tmp_path / "x.onnx", *graph(np.random.default_rng(0)))
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(FormatError, match="not a complete ONNX file|holds no weights"):
        read_onnx(file)


def test_other_files(tmp_path, monkeypatch):
    file = write(tmp_path / "x.onnx", *graph(np.random.default_rng(0)))
    model = onnx.load(file)
    onnx.save(model, tmp_path / "y.onnx", save_as_external_data=True, size_threshold=0, location="y.data")
    with pytest.raises(
        FormatError, match="tensor 'embeddings.patch.bias' lies in another file, which is not read"
    ):
        read_onnx(tmp_path / "y.onnx")
    with pytest.raises(FileNotFoundError, match="No weight file"):
        read_onnx(tmp_path / "none.onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"onnx, which is not installed: pip install 'jtl\[formats\]'"):
        read_onnx(file)


# --- DINOv2 ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dinov2():
    return load_with_report("dinov2-small-focus")


def normalised(pixels):
    image = pixels / 255 - np.float32([0.485, 0.456, 0.406])
    return np.float32(image / np.float32([0.229, 0.224, 0.225]))


def test_dinov2_is_whole(dinov2, tmp_path):
    model, report = dinov2
    assert len(report.used) == 222 and not report.new
    assert all(name.startswith("decoder.") for name in report.ignored) and len(report.ignored) == 20
    assert tree.size(model.params) == 22_056_576 - 384  # those of facebook/dinov2-small but its mask token
    back, again = load_with_report(save(model, tmp_path / "saved"))
    assert back.config == model.config and not again.ignored
    before, after = tree.flatten(model.params), tree.flatten(back.params)
    assert all(np.array_equal(before[path], after[path]) for path in before)


def test_dinov2_tells_textures_apart(dinov2):
    """Of two pieces of each photograph, the nearest by cosine is the other piece, in seven of eight cases at least."""
    from skimage import data

    model, _ = dinov2
    photographs = [data.chelsea(), data.coffee(), data.rocket(), data.astronaut()]
    pieces = [photo[:196, :196] for photo in photographs] + [photo[60:256, 140:336] for photo in photographs]
    image = normalised(np.stack(pieces))
    features = np.asarray(jax.jit(lambda model: model({"image": image})["features"])(model))
    features = features / np.linalg.norm(features, axis=1, keepdims=True)
    nearest = (features @ features.T - 2 * np.eye(8)).argmax(1)
    assert (nearest == (np.arange(8) + 4) % 8).sum() >= 7


@pytest.mark.parity
def test_dinov2_is_what_onnxruntime_computes(dinov2, tmp_path):
    """The states behind three layers and the last norm, whose outputs are added to those of the graph."""
    import onnxruntime

    (file,) = resolve("dinov2-small-focus").glob("*.onnx")
    graph = onnx.load(file)
    ends = {
        "encoder/layer_0": "/backbone/encoder/layer.0/Add_1_output_0",
        "encoder/layer_5": "/backbone/encoder/layer.5/Add_1_output_0",
        "encoder/layer_11": "/backbone/encoder/layer.11/Add_1_output_0",
        "sequence": "/backbone/layernorm/Add_1_output_0",
    }
    for name in ends.values():
        graph.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    image = normalised(np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3)))
    theirs = session.run(list(ends.values()), {"input_image": image.transpose(0, 3, 1, 2)})
    taps = tuple(name for name in ends if name.startswith("encoder"))
    found = jax.jit(lambda model: model({"image": image}, taps=taps))(load("dinov2-small-focus"))
    for name, value in zip(ends, theirs, strict=True):
        ours = np.asarray(found["taps"][name] if name in taps else found[name])
        assert np.abs(ours - value).max() < 1e-4 * np.abs(value).max(), name
