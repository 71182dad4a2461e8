"""``model.bin`` files of CTranslate2 (https://github.com/OpenNMT/CTranslate2, version 6), read without that library.

Layout, little-endian: the version; name and revision of the model kind; the variables, each with name, shape, type,
size and bytes; the aliases. Names are preceded by their length and end with a zero byte.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np

from jtl.pretrained.formats.tensors import FormatError, Tensors, mapped

VERSION = 6
TYPES = {
    0: np.dtype(np.float32),
    1: np.dtype(np.int8),
    2: np.dtype(np.int16),
    3: np.dtype(np.int32),
    4: np.dtype(np.float16),
    5: np.dtype(ml_dtypes.bfloat16),
}
# One matrix holds the rows of several projections.
FUSED = {
    "self_attention/linear_0": ("q_proj", "k_proj", "v_proj"),
    "self_attention/linear_1": ("out_proj",),
    "attention/linear_0": ("q_proj",),
    "attention/linear_1": ("k_proj", "v_proj"),
    "attention/linear_2": ("out_proj",),
}


@dataclass(frozen=True)
class CTranslate2:
    """The content of a file.

    Attributes:
        kind: name of the model kind, such as ``"WhisperSpec"``.
        variables: every variable by name, mapped from the file; those of rank 0 are settings.
        offsets: byte offset of each variable in the file.
    """

    kind: str
    variables: Mapping[str, np.ndarray]
    offsets: Mapping[str, int]


def is_ctranslate2(file: Path) -> bool:
    """Return whether a ``.bin`` file begins like this format rather than like torch's zip archive or pickle."""
    with open(file, "rb") as stream:
        version = stream.read(4)
    return len(version) == 4 and 1 <= version[0] <= VERSION and not any(version[1:])


def open_ctranslate2(file: Path) -> CTranslate2:
    """Open a file; only names and shapes are read at once, and arrays are memory-mapped.

    Raises:
        FileNotFoundError: there is no such file.
        FormatError: the version or a type is unknown, or the file is truncated.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"No weight file {file}.")
    content = np.memmap(file, np.uint8, "r")
    place = 0

    def take(size: int) -> np.ndarray:
        nonlocal place
        place += size
        if place > len(content):
            raise FormatError(
                f"{file} ({len(content)} bytes) is not a complete CTranslate2 file: it was cut: fetch it again."
            )
        return content[place - size : place]

    def number(kind: str) -> int:
        return struct.unpack(f"<{kind}", take(struct.calcsize(kind)).tobytes())[0]

    def name() -> str:
        return take(number("H")).tobytes().rstrip(b"\0").decode()

    if (version := number("I")) != VERSION:
        raise FormatError(f"{file}: expected version {VERSION} of CTranslate2's format, found {version}.")
    kind, _ = name(), number("I")
    variables, offsets = {}, {}
    for _ in range(number("I")):
        variable = name()
        shape = [number("I") for _ in range(number("B"))]
        code, size = number("B"), number("I")
        if code not in TYPES or size != TYPES[code].itemsize * np.prod(shape, dtype=int):
            raise FormatError(
                f"{file}: variable {variable!r} of shape {shape} has type {code} and {size} bytes, which do not fit; "
                f"types are {', '.join(f'{code}: {dtype}' for code, dtype in TYPES.items())}."
            )
        offsets[variable] = place
        variables[variable] = take(size).view(TYPES[code]).reshape(shape)
    for _ in range(2 * number("I")):
        name()  # an alias and its target, read only to check that the file is complete
    return CTranslate2(kind, variables, offsets)


def read_ctranslate2(file: Path) -> Tensors:
    """Return the tensors of a file by name, mapped on access, with fused projections split.

    ``.../self_attention/linear_0/weight`` becomes ``.../self_attention/q_proj/weight``, ``k_proj`` and ``v_proj``. The
    keys' bias, which is zero in Whisper, is left out. Aliases (second names of variables) are not read.

    Raises:
        FileNotFoundError: there is no such file.
        FormatError: see ``open_ctranslate2``; or the weights are quantised to integers, or keys have a bias.
    """
    found, readers = open_ctranslate2(file), {}
    for name, array in found.variables.items():
        if array.ndim == 0:
            continue
        if array.dtype.kind == "i":
            raise FormatError(
                f"{file}: tensor {name!r} is quantised ({array.dtype}), which is not read: convert the model with "
                "`--quantization float16`."
            )
        fused = re.fullmatch(r"(.*?(self_attention|attention))/(linear_\d)/(weight|bias)", name)
        projections = FUSED[f"{fused[2]}/{fused[3]}"] if fused else (None,)
        for i, (projection, rows) in enumerate(
            zip(projections, np.split(array, len(projections)), strict=True)
        ):
            if fused and (projection, fused[4]) == ("k_proj", "bias"):
                if rows.any():
                    raise FormatError(f"{file}: the keys of {name!r} have a bias, which Whisper's have not.")
                continue
            key = f"{fused[1]}/{projection}/{fused[4]}" if fused else name
            place = found.offsets[name] + i * rows.nbytes
            readers[key] = partial(mapped, file, rows.dtype, rows.shape, place)
    return Tensors(readers)
