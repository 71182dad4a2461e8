"""Torch checkpoints (``.pth``, ``.pt``, ``.bin``), read without torch and without running any code they contain.

A checkpoint is a pickle, and a pickle can name any function for the reader to call. Here only the names that a state
dict needs are accepted; they resolve to inert stand-ins, and any other name raises. There are two layouts: a zip
archive (torch 1.6 and later), and the older sequence of pickles followed by raw storages.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import ml_dtypes
import numpy as np

from jtl.pretrained.formats.tensors import FormatError, Tensors

_MAGIC = 0x1950A86A20F9469CFC6C  # torch/serialization.py, MAGIC_NUMBER of the older layout
_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
    "ComplexFloatStorage": np.complex64,
    "ComplexDoubleStorage": np.complex128,
    "UntypedStorage": np.uint8,
}
_DTYPES = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint64": np.uint64,
    "uint32": np.uint32,
    "uint16": np.uint16,
    "uint8": np.uint8,
    "bool": np.bool_,
    "complex64": np.complex64,
    "complex128": np.complex128,
}
_REBUILD = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3")


class CodeInFile(FormatError):
    """The file names a function or class that weights do not need."""


def read_pth(file: Path) -> Tensors:
    """Return the tensors of a state dict, or of the only state dict in a checkpoint, read on access.

    Raises:
        FileNotFoundError: there is no such file.
        CodeInFile: the pickle names something other than tensors and containers; none of it has run.
        FormatError: the file is truncated, corrupted, of another layout, or holds no single state dict.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"No weight file {file}.")
    try:
        content, storages = (_open_zip if zipfile.is_zipfile(file) else _open_legacy)(file)
    except FormatError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise FormatError(
            f"{file} ({file.stat().st_size} bytes) is not a complete torch checkpoint "
            f"({type(error).__name__}: {error}): fetch it again."
        ) from error
    state = _state_dict(file, content)
    read_storage = lru_cache(maxsize=1)(storages)  # neighbours often share one storage
    return Tensors({name: partial(_read, file, name, view, read_storage) for name, view in state.items()})


# Named tuples, so that no class a pickle can reach lets it set state.
class _DType(NamedTuple):
    dtype: np.dtype


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    offset: int  # in elements, into the storage ``key``


class _View(NamedTuple):
    storage: _Storage
    dtype: np.dtype
    offset: int  # in elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements


class _RebuildTensor:
    """Replaces torch._utils._rebuild_tensor, _v2 and _v3; an instance, so that a pickle cannot alter it."""

    __slots__ = ()

    def __call__(self, storage, offset, shape, strides, *rest):
        dtype = next((part.dtype for part in rest if isinstance(part, _DType)), storage.dtype)
        return _View(storage, dtype, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


class _RebuildParameter:
    """Replaces torch._utils._rebuild_parameter."""

    __slots__ = ()

    def __call__(self, data, *rest):
        return data


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream, file: Path):
        super().__init__(stream, encoding="utf-8")
        self._file = file

    def find_class(self, module: str, name: str):
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch._utils" and name in _REBUILD:
            return _RebuildTensor()
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _RebuildParameter()
        if (module, name) == ("torch", "Size"):
            return tuple
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _DType(np.dtype(_STORAGES[name]))
        if module == "torch" and name in _DTYPES:
            return _DType(np.dtype(_DTYPES[name]))
        raise CodeInFile(
            f"{self._file} names {module}.{name}, which weights do not need and which may run code: "
            "refused, nothing of it has run. If you trust the file, save its weights as .safetensors instead."
        )

    def persistent_load(self, pid):
        kind, dtype, key, _location, _count, *view = pid
        if kind != "storage" or not isinstance(dtype, _DType):
            raise FormatError(f"{self._file}: expected a reference to a storage, found {kind!r}.")
        if view and view[0] is not None:  # older layout: a storage that is a view of another
            return _Storage(str(key), dtype.dtype, int(view[0][1]))
        return _Storage(str(key), dtype.dtype, 0)


def _open_zip(file: Path) -> tuple[object, Callable[[str], bytes]]:
    archive = zipfile.ZipFile(file)
    root = next((name[: -len("data.pkl")] for name in archive.namelist() if name.endswith("/data.pkl")), None)
    if root is None:
        raise FormatError(f"{file}: expected a member data.pkl, found {archive.namelist()[:5]}.")
    if root + "byteorder" in archive.namelist() and archive.read(root + "byteorder") != b"little":
        raise FormatError(f"{file} was written on a big-endian machine, which is not read here.")
    with archive.open(root + "data.pkl") as stream:
        content = _Unpickler(stream, file).load()
    return content, lambda key: archive.read(str(PurePosixPath(root) / "data" / key))


def _open_legacy(file: Path) -> tuple[object, Callable[[str], bytes]]:
    with open(file, "rb") as stream:
        try:
            magic = _Unpickler(stream, file).load()
        except (pickle.UnpicklingError, EOFError, ValueError, IndexError) as error:
            if isinstance(error, FormatError):
                raise
            magic = None
        if magic != _MAGIC:
            raise FormatError(
                f"{file} ({file.stat().st_size} bytes) is not a torch checkpoint, or it was cut: expected "
                "a zip archive or torch's magic number."
            )
        version, system = _Unpickler(stream, file).load(), _Unpickler(stream, file).load()
        if version != 1001 or not system["little_endian"]:
            raise FormatError(f"{file}: expected protocol 1001, little endian, found {version}, {system}.")
        content = _Unpickler(stream, file).load()
        keys = _Unpickler(stream, file).load()
        sizes = {storage.key: storage.dtype.itemsize for storage in _storages(content)}
        places, size = {}, file.stat().st_size
        for key in map(str, keys):
            head = stream.read(8)
            count = struct.unpack("<q", head)[0] if len(head) == 8 else -1
            start, length = stream.tell(), count * sizes.get(key, 0)
            if count < 0 or key not in sizes or start + length > size:
                raise FormatError(f"{file} ends or is damaged within storage {key}: fetch it again.")
            places[key] = (start, length)
            stream.seek(length, 1)

    def read(key: str) -> bytes:
        start, length = places[key]
        with open(file, "rb") as stream:
            stream.seek(start)
            return stream.read(length)

    return content, read


def _storages(content) -> list[_Storage]:
    if isinstance(content, _View):
        return [content.storage]
    if isinstance(content, _Storage):
        return [content]
    if isinstance(content, Mapping):
        content = list(content.values())
    return [s for part in content for s in _storages(part)] if isinstance(content, list | tuple) else []


def _state_dict(file: Path, content) -> Mapping[str, _View]:
    """``content`` if it is a state dict, else the only state dict among its entries."""

    def is_state(value) -> bool:
        return (
            isinstance(value, Mapping) and bool(value) and all(isinstance(v, _View) for v in value.values())
        )

    found = [content] if is_state(content) else []
    if not found and isinstance(content, Mapping):
        found = [value for value in content.values() if is_state(value)]
    if len(found) != 1:
        entries = list(content)[:8] if isinstance(content, Mapping) else type(content).__name__
        raise FormatError(
            f"{file}: expected one state dict (tensor by name), found {len(found)} in {entries}. "
            "Save the wanted one alone, as .safetensors."
        )
    return {str(name): view for name, view in found[0].items()}


def _read(file: Path, name: str, view: _View, read_storage: Callable[[str], bytes]) -> np.ndarray:
    try:
        data = read_storage(view.storage.key)
    except (KeyError, zipfile.BadZipFile, OSError) as error:
        raise FormatError(f"{file}: the storage of tensor {name!r} is missing or damaged: {error}") from error
    size = view.dtype.itemsize
    start = view.storage.offset * view.storage.dtype.itemsize // size + view.offset
    spans = [(n - 1) * s for n, s in zip(view.shape, view.strides, strict=True)]
    empty = 0 in view.shape
    # as_strided trusts its arguments: a view outside its storage would read other memory.
    if min([start, *view.shape, *view.strides]) < 0 or (
        not empty and (start + sum(spans) + 1) * size > len(data)
    ):
        raise FormatError(f"{file}: tensor {name!r} reaches outside its storage of {len(data)} bytes.")
    if empty:
        return np.zeros(view.shape, view.dtype)
    flat = np.frombuffer(data, view.dtype, offset=start * size, count=sum(spans) + 1)
    steps = tuple(s * size for s in view.strides)
    return np.array(np.lib.stride_tricks.as_strided(flat, view.shape, steps, writeable=False))
