"""GGUF files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), dequantised by the package ``gguf``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from jtl.pretrained.formats.tensors import FormatError, Tensors, mapped


@dataclass(frozen=True)
class Gguf:
    """The content of a file.

    Attributes:
        metadata: the value of every key.
        tensors: the file's own tensor records, by name.
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, Any]


def open_gguf(file: Path) -> Gguf:
    """Open a file; tensors are read on access. The last file stays cached, because parsing is slow.

    Raises:
        FileNotFoundError: there is no such file.
        FormatError: the file is truncated, corrupted or not a GGUF file.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"No weight file {file}.")
    status = file.stat()
    return _open(file, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1)
def _open(file: Path, size: int, changed: int) -> Gguf:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except Exception as error:  # a damaged file can raise anything
        raise FormatError(
            f"{file} ({size} bytes) is not a complete GGUF file ({type(error).__name__}: {error}): fetch it again."
        ) from error
    return Gguf(metadata, {tensor.name: tensor for tensor in reader.tensors})


def read_gguf(file: Path) -> Tensors:
    """Return the tensors of a file by name, in float32, dequantised on access.

    llama.cpp permutes the rows of Llama's query and key projections, so that the pairs rotated by rotary position
    embeddings are neighbours. Here they are in the order of Hugging Face's files.

    Raises:
        FileNotFoundError: there is no such file.
        FormatError: see ``open_gguf``; or a quantisation type is unknown, or the number of heads is missing.
    """
    found = open_gguf(file)
    heads: dict[str, int] = {}
    if found.metadata.get("general.architecture") == "llama":
        for name, key in (("q", "llama.attention.head_count"), ("k", "llama.attention.head_count_kv")):
            heads[name] = found.metadata.get(key, found.metadata.get("llama.attention.head_count"))
            if not isinstance(heads[name], int):
                raise FormatError(f"{file}: expected one number at {key}, found {heads[name]!r}.")
    return Tensors({name: partial(_read, file, tensor, heads) for name, tensor in found.tensors.items()})


def _read(file: Path, tensor: Any, heads: Mapping[str, int]) -> np.ndarray:
    from gguf import dequantize

    try:
        blocks = mapped(file, tensor.data.dtype, tensor.data.shape, int(tensor.data_offset))
        array = np.array(dequantize(blocks, tensor.tensor_type), np.float32)
    except NotImplementedError as error:
        raise FormatError(
            f"{file}: tensor {tensor.name!r} is of type {tensor.tensor_type.name}, which is not read."
        ) from error
    reordered = re.fullmatch(r"blk\.\d+\.attn_([qk])\.(weight|bias)", tensor.name)
    if reordered and heads:
        pairs = array.reshape(heads[reordered[1]], -1, 2, *array.shape[1:])
        array = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(array.shape)
    return array
