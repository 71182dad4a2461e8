"""Readers of common weight formats, as mappings from tensor name to NumPy array. None of them runs code from a file."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from jtl.pretrained.formats.ctranslate2 import is_ctranslate2, read_ctranslate2
from jtl.pretrained.formats.gguf import read_gguf
from jtl.pretrained.formats.keras import read_keras
from jtl.pretrained.formats.npz import read_npz
from jtl.pretrained.formats.onnx import read_onnx
from jtl.pretrained.formats.pth import CodeInFile, read_pth
from jtl.pretrained.formats.safetensors import read_safetensors
from jtl.pretrained.formats.tensors import FormatError, Tensors

__all__ = [
    "CodeInFile", "FormatError", "Tensors", "read_ctranslate2", "read_gguf", "read_keras", "read_npz", "read_onnx",
    "read_pth", "read_safetensors", "read_tensors",
]  # fmt: skip


def _read_bin(file: Path) -> Tensors:
    """Read a ``.bin`` file, which may be torch's or CTranslate2's."""
    return read_ctranslate2(file) if is_ctranslate2(file) else read_pth(file)


_READERS = {
    ".safetensors": read_safetensors,
    ".gguf": read_gguf,
    ".npz": read_npz,
    ".pth": read_pth,
    ".pt": read_pth,
    ".bin": _read_bin,
    ".h5": read_keras,
    ".onnx": read_onnx,
}
# Hugging Face's names come first, safetensors before pickles.
_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def read_tensors(path: Path) -> Tensors:
    """Return the tensors of a weight file, of an index of shards, or of the weight file in a folder.

    Raises:
        FileNotFoundError: there is no such file, or no weight file in the folder.
        FormatError: there are several candidates, or the file is damaged, unknown or refused.
    """
    path = Path(path)
    file = _find(path) if path.is_dir() else path
    if file.name.endswith(".index.json"):
        return _read_shards(file)
    if file.suffix not in _READERS:
        raise FormatError(f"{file}: unknown weight format; expected one of {', '.join(_READERS)}.")
    return _READERS[file.suffix](file)


def _find(folder: Path) -> Path:
    for name in _FILES:
        if (folder / name).is_file():
            return folder / name
    for suffix in _READERS:
        files = sorted(file for file in folder.glob(f"*{suffix}") if file.name != "training_args.bin")
        if len(files) > 1:
            names = [file.name for file in files]
            raise FormatError(f"{folder} holds several weight files, {names}: name one of them instead.")
        if files:
            return files[0]
    raise FileNotFoundError(
        f"No weight file in {folder}: expected {_FILES[0]} (or another {', '.join(_READERS)}), "
        f"found {sorted(file.name for file in folder.iterdir())}."
    )


def _read_shards(index: Path) -> Tensors:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(
            f"{index} is not an index of shards (expected a `weight_map`): {error!r}"
        ) from error
    shards = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise FormatError(f"{index}: shard {shard!r} lies outside the model's folder: refused.")
        if not (index.parent / shard).is_file():
            raise FileNotFoundError(f"{index} names shard {shard}, which is not in {index.parent}.")
        shards[shard] = read_tensors(index.parent / shard)
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise FormatError(f"{index}: tensor {name!r} should be in {shard}, which does not hold it.")
    return Tensors({name: partial(shards[shard].__getitem__, name) for name, shard in weight_map.items()})
