"""``.safetensors`` files (https://github.com/huggingface/safetensors), without torch."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy, which safetensors looks up)
import numpy as np
from safetensors import SafetensorError, safe_open

from jtl.pretrained.formats.tensors import FormatError, Tensors


def read_safetensors(file: Path) -> Tensors:
    """Tensors of one file, each read when asked for; bf16 comes as ``ml_dtypes.bfloat16``.

    Raises:
        FormatError: the file is truncated or corrupted, or holds a number format NumPy has no name for.
    """
    try:
        handle = safe_open(file, framework="np")
        names = list(handle.keys())
    except (SafetensorError, OSError) as error:
        if not Path(file).is_file():
            raise FileNotFoundError(f"No weight file {file}.") from error
        raise FormatError(
            f"{file} ({file.stat().st_size} bytes) is not a complete safetensors file: {error}. "
            "It was cut or damaged: fetch it again."
        ) from error
    return Tensors({name: partial(_read, handle, file, name) for name in names})


def _read(handle, file: Path, name: str) -> np.ndarray:
    try:
        return handle.get_tensor(name)
    except (AttributeError, TypeError, KeyError, SafetensorError) as error:
        stored = handle.get_slice(name).get_dtype()
        raise FormatError(
            f"{file}: tensor {name!r} is stored as {stored}, which is not read here: expected "
            "F64, F32, F16, BF16, an integer or a boolean type."
        ) from error
