"""The two files of a PEFT folder: a configuration and named tensors."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jtl._files import write_file
from jtl.errors import InputError

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

Tensors = Mapping[str, np.ndarray]


class AdapterFileError(InputError):
    """A folder that does not hold an adapter, or not one for this model."""


def write(folder: str | os.PathLike, config: Mapping[str, Any], tensors: Tensors) -> Path:
    """Writes both files.

    Raises:
        FileExistsError: ``folder`` is not empty.
    """
    folder = Path(folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty: choose another")
    folder.mkdir(parents=True, exist_ok=True)
    from safetensors.numpy import save

    plain = {key: np.ascontiguousarray(tensor) for key, tensor in tensors.items()}
    write_file(folder / WEIGHTS, save(plain, metadata={"format": "pt"}))
    write_file(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    return folder


def read(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the configuration and the tensors.

    Raises:
        FileNotFoundError: a file is missing.
    """
    from safetensors.numpy import load_file

    return json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
