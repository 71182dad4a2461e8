"""``.safetensors`` files (https://github.com/huggingface/safetensors), read without torch."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jtl.pretrained.formats.tensors import FormatError, Tensors, mapped

TYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def read_safetensors(file: Path) -> Tensors:
    """Return the tensors of one file, memory-mapped on access; bf16 becomes ``ml_dtypes.bfloat16``.

    Raises:
        FileNotFoundError: there is no such file.
        FormatError: the file is truncated or corrupted, or holds a number format that is not read here.
    """
    file = Path(file)
    try:
        with safe_open(file, framework="np"):  # this checks sizes and offsets, down to the last byte
            pass
    except (SafetensorError, OSError) as error:
        if not file.is_file():
            raise FileNotFoundError(f"No weight file {file}.") from error
        raise FormatError(
            f"{file} ({file.stat().st_size} bytes) is not a complete safetensors file: {error}. "
            "It was cut or damaged: fetch it again."
        ) from error
    with open(file, "rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return Tensors({name: partial(_map, file, 8 + length, name, entry) for name, entry in header.items()})


def _map(file: Path, start: int, name: str, entry: Mapping[str, Any]) -> np.ndarray:
    if entry["dtype"] not in TYPES:
        raise FormatError(
            f"{file}: tensor {name!r} is stored as {entry['dtype']}, which is not read here: expected "
            "F64, F32, F16, BF16, an integer or a boolean type."
        )
    return mapped(file, TYPES[entry["dtype"]], tuple(entry["shape"]), start + entry["data_offsets"][0])
