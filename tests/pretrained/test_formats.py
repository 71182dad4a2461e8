"""Weight files: what is written is read, and what is damaged or hostile is named and refused."""

import json
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jtl.pretrained.formats import CodeInFile, FormatError, read_npz, read_pth, read_safetensors, read_tensors
from jtl.pretrained.sources import resolve

DATA = Path(__file__).parent / "data"
sys.path.insert(0, str(Path(__file__).parent))


def tensors():
    rng = np.random.default_rng(0)
    return {
        "a.weight": rng.normal(size=(3, 4)).astype(np.float32),
        "a.half": rng.normal(size=(2,)).astype(np.float16),
        "a.bfloat": rng.normal(size=(2, 3)).astype(ml_dtypes.bfloat16),
        "a.steps": np.array(3, np.int64),
    }


def assert_equal(found, expected):
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
        np.testing.assert_array_equal(found[name], array)


# --- safetensors -------------------------------------------------------------------------------------


def test_safetensors(tmp_path):
    save_file(tensors(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_equal(read_tensors(tmp_path), tensors())


def shard(folder, **changes):
    names = sorted(tensors())
    for i, name in enumerate(names):
        save_file({name: tensors()[name]}, folder / f"model-{i}.safetensors")
    index = {name: f"model-{i}.safetensors" for i, name in enumerate(names)} | changes
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def test_shards_give_what_one_file_gives(tmp_path):
    shard(tmp_path)
    assert_equal(read_tensors(tmp_path), tensors())


def test_a_missing_shard_is_named(tmp_path):
    shard(tmp_path)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-1\.safetensors"):
        read_tensors(tmp_path)


def test_an_index_that_lies_is_caught(tmp_path):
    shard(tmp_path, **{"a.weight": "model-0.safetensors"})
    with pytest.raises(FormatError, match=r"'a\.weight' should be in model-0\.safetensors"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("place", ["../model-0.safetensors", "/model-0.safetensors"])
def test_a_shard_outside_the_folder_is_refused(tmp_path, place):
    shard(tmp_path, **{"a.weight": place})
    with pytest.raises(FormatError, match="outside the model's folder"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_truncated_safetensors(tmp_path, keep):
    file = tmp_path / "model.safetensors"
    save_file(tensors(), file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(FormatError, match=r"model\.safetensors .*not a complete safetensors file"):
        read_safetensors(file)


def test_a_truncated_shard_is_named(tmp_path):
    shard(tmp_path)
    file = tmp_path / "model-2.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(
        FormatError, match=r"model-2\.safetensors .*not a complete safetensors file.*fetch it again"
    ):
        read_tensors(tmp_path)


def test_a_file_that_shrinks_after_it_was_opened(tmp_path):
    save_file({"a": np.ones(5000, np.float32)}, tmp_path / "x.safetensors")
    found = read_safetensors(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(FormatError, match="has become shorter"):
        found["a"]


def test_number_format_without_a_numpy_name(tmp_path):
    save_file({"eight": np.ones(3, ml_dtypes.float8_e4m3fn)}, tmp_path / "x.safetensors")
    with pytest.raises(FormatError, match="tensor 'eight' is stored as F8_E4M3"):
        read_safetensors(tmp_path / "x.safetensors")["eight"]


# --- npz ---------------------------------------------------------------------------------------------


def test_npz(tmp_path):
    plain = {name: array for name, array in tensors().items() if name != "a.bfloat"}
    np.savez(tmp_path / "model.npz", **plain)
    assert_equal(read_tensors(tmp_path), plain)


def test_npz_of_objects_is_refused(tmp_path):
    np.savez(tmp_path / "x.npz", bad=np.array([{"code": 1}], dtype=object))
    with pytest.raises(FormatError, match=r"x\.npz: array 'bad' cannot be read.*allow_pickle=False"):
        read_npz(tmp_path / "x.npz")["bad"]


def test_damaged_npz(tmp_path):
    file = tmp_path / "x.npz"
    np.savez(file, a=np.arange(1000))
    whole = file.read_bytes()
    file.write_bytes(whole[:500])
    with pytest.raises(FormatError, match=r"x\.npz is not a complete"):
        read_npz(file)
    file.write_bytes(whole[:500] + bytes([whole[500] ^ 1]) + whole[501:])
    with pytest.raises(FormatError, match=r"x\.npz: array 'a' cannot be read"):
        read_npz(file)["a"]


# --- pth ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth"])
def test_pth_equals_what_torch_saved(name):
    found, expected = read_pth(DATA / name), np.load(DATA / "state.npz")
    widened = {k: v.astype(np.float32) if k == "bfloat16" else v for k, v in found.items()}
    assert found["bfloat16"].dtype == ml_dtypes.bfloat16
    assert_equal(widened, dict(expected))


@pytest.mark.parity
@pytest.mark.parametrize("modern", [True, False])
def test_pth_equals_torch_live(tmp_path, modern):
    import torch
    from make_reference import arrays, state

    for content in (state(), {"model": state(), "epoch": 3}, OrderedDict(state())):
        torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=modern)
        found = read_pth(tmp_path / "x.pth")
        widened = {k: v.astype(np.float32) if k == "bfloat16" else v for k, v in found.items()}
        assert_equal(widened, arrays(state()))


@pytest.mark.parity
def test_pth_of_a_module_and_of_new_types(tmp_path):
    import torch

    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    torch.save(module.state_dict(), tmp_path / "x.bin")
    assert_equal(read_tensors(tmp_path), {k: v.numpy() for k, v in module.state_dict().items()})
    torch.save({"u": torch.arange(5).to(torch.uint16)}, tmp_path / "y.pth")
    assert_equal(read_pth(tmp_path / "y.pth"), {"u": np.arange(5, dtype=np.uint16)})


def test_the_real_efficientnet_file():
    found = read_tensors(resolve("efficientnet-lite0"))
    assert len(found) == 296
    assert found["_conv_stem.weight"].shape == (32, 3, 3, 3) and found["_fc.weight"].shape == (1000, 1280)
    for name, array in found.items():
        assert np.isfinite(array).all() and (not name.endswith("running_var") or (array >= 0).all()), name


@pytest.mark.parity
def test_the_real_efficientnet_file_equals_torch():
    import torch

    folder = resolve("efficientnet-lite0")
    file = next(folder.glob("*.pth"))
    assert_equal(read_pth(file), {k: v.numpy() for k, v in torch.load(file, weights_only=True).items()})


class Payload:
    """Unpickling this the ordinary way would create a file."""

    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return (open, (str(self.victim), "w"))


def as_zip(file, content):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/data/0", bytes(16))


def as_legacy(file, content):
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    head = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, system)]
    file.write_bytes(b"".join([*head, content, pickle.dumps([], 2)]))


@pytest.mark.parametrize("write", [as_zip, as_legacy])
def test_code_in_a_pth_is_named_and_does_not_run(tmp_path, write):
    victim = tmp_path / "victim"
    content = pickle.dumps({"weight": Payload(victim)}, 2)
    write(tmp_path / "x.pth", content)
    with pytest.raises(CodeInFile, match=r"x\.pth names (io|builtins|_io)\.open, which weights do not need"):
        read_pth(tmp_path / "x.pth")
    assert not victim.exists()
    pickle.loads(content)["weight"].close()  # the payload is real
    assert victim.exists()


@pytest.mark.parametrize(
    "name",
    ["os system", "builtins eval", "torch load", "torch.hub load", "numpy.core.multiarray _reconstruct"],
)
def test_only_the_allow_list_resolves(tmp_path, name):
    module, attribute = name.split()
    as_zip(tmp_path / "x.pth", f"\x80\x02c{module}\n{attribute}\nq\x00.".encode("latin-1"))
    with pytest.raises(CodeInFile, match=f"names {module}.{attribute}, "):
        read_pth(tmp_path / "x.pth")


def test_code_where_torch_has_its_magic_number(tmp_path):
    victim = tmp_path / "victim"
    (tmp_path / "x.pth").write_bytes(pickle.dumps(Payload(victim), 2))
    with pytest.raises(CodeInFile):
        read_pth(tmp_path / "x.pth")
    assert not victim.exists()


@pytest.mark.parametrize(
    "shape, strides, offset", [((5,), (1,), 0), ((2, 2), (3, 1), 0), ((1,), (1,), 4), ((1,), (1,), -1)]
)
def test_a_view_outside_its_storage_reads_no_foreign_memory(tmp_path, shape, strides, offset):
    def call(out):  # {"w": _rebuild_tensor_v2(storage of 4 floats, offset, shape, strides, False, None)}
        out.append(b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n(")
        out.append(
            b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
        )
        for value in (offset, shape, strides, False, None):
            out.append(pickle.dumps(value, 2)[2:-1])
        out.append(b"tRs.")
        return b"".join(out)

    as_zip(tmp_path / "x.pth", call([]))
    with pytest.raises(FormatError, match="tensor 'w' reaches outside its storage of 16 bytes"):
        read_pth(tmp_path / "x.pth")["w"]


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth"])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.95])
def test_truncated_pth(tmp_path, name, fraction):
    whole = (DATA / name).read_bytes()
    file = tmp_path / "x.pth"
    file.write_bytes(whole[: int(fraction * len(whole))])
    with pytest.raises(FormatError, match=r"x\.pth"):
        dict(read_pth(file))


def test_flipped_bits_in_a_zip_are_caught(tmp_path):
    whole = bytearray((DATA / "zip.pth").read_bytes())
    values = np.load(DATA / "state.npz")["float32"].tobytes()
    whole[whole.index(values)] ^= 1
    (tmp_path / "x.pth").write_bytes(whole)
    with pytest.raises(FormatError, match="tensor 'float32' is missing or damaged"):
        read_pth(tmp_path / "x.pth")["float32"]


def test_damaged_legacy_never_escapes_as_another_error(tmp_path):
    whole = (DATA / "legacy.pth").read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.integers(0, len(whole), 100):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.integers(8)
        (tmp_path / "x.pth").write_bytes(damaged)
        try:
            dict(read_pth(tmp_path / "x.pth"))  # a changed value is not detectable in this layout
        except FormatError as error:
            assert "x.pth" in str(error)


def test_a_checkpoint_of_two_models_is_ambiguous(tmp_path):
    as_legacy(tmp_path / "x.pth", pickle.dumps({"epoch": 3, "lr": 0.1}, 2))
    with pytest.raises(FormatError, match=r"one state dict .*found 0 in \['epoch', 'lr'\]"):
        read_pth(tmp_path / "x.pth")


# --- choosing the file -------------------------------------------------------------------------------


def test_folder_without_weights(tmp_path):
    (tmp_path / "readme.md").write_text("")
    with pytest.raises(FileNotFoundError, match=r"expected model\.safetensors.*found \['readme\.md'\]"):
        read_tensors(tmp_path)


def test_folder_with_several_candidates(tmp_path):
    for name in "ab":
        save_file(tensors(), tmp_path / f"{name}.safetensors")
    with pytest.raises(FormatError, match=r"\['a\.safetensors', 'b\.safetensors'\]: name one"):
        read_tensors(tmp_path)


def test_safetensors_before_pickles(tmp_path):
    save_file(tensors(), tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(struct.pack("<q", 0))
    assert_equal(read_tensors(tmp_path), tensors())
