"""Weights in ``.onnx`` graphs exported by torch (https://onnx.ai/onnx/intro), read with the package ``onnx``.

The exporter keeps the state dict's names for tensors that the graph uses unchanged. Tensors that it transposed or split
are called ``onnx::MatMul_123``, but the node that reads one is named after its module.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jtl.pretrained.formats.tensors import FormatError, Tensors, required

ANONYMOUS = "onnx::"


def read_onnx(file: Path) -> Tensors:
    """Return the graph's initialisers under the names of torch's state dict, decoded on access.

    The matrix of ``/encoder/layer.0/mlp/fc1/MatMul`` becomes ``encoder.layer.0.mlp.fc1.weight``, (out, in) as in torch.
    The position embeddings of a vision transformer, split into CLS token and patches, are joined again as
    ``embeddings.position_embeddings``.

    Raises:
        ImportError: the package onnx is not installed.
        FileNotFoundError: there is no such file.
        FormatError: the file is truncated or damaged, keeps weights in other files, or has weights whose name no node
            reveals.
    """
    onnx = required("onnx", file)
    if not Path(file).is_file():
        raise FileNotFoundError(f"No weight file {file}.")
    try:
        graph = onnx.load(file, load_external_data=False).graph
    except Exception as error:  # protobuf's, which depends on its implementation
        raise FormatError(
            f"{file} ({Path(file).stat().st_size} bytes) is not a complete ONNX file: {error}. Fetch it again."
        ) from error
    held = {tensor.name: tensor for tensor in graph.initializer}
    if not held:
        raise FormatError(f"{file} ({Path(file).stat().st_size} bytes) holds no weights: a graph cut short?")
    outside = [name for name, tensor in held.items() if tensor.external_data]
    if outside:
        raise FormatError(
            f"{file}: tensor {outside[0]!r} lies in another file, which is not read: save the model whole."
        )
    read = partial(_read, onnx, file)
    readers: dict[str, Callable[[], np.ndarray]] = {
        name: partial(read, tensor) for name, tensor in held.items() if not name.startswith(ANONYMOUS)
    }
    positions: dict[str, dict[str, Any]] = {}
    for node in graph.node:
        module, _, operation = node.name.strip("/").replace("/", ".").rpartition(".")
        for name in node.input:
            if name not in held or not name.startswith(ANONYMOUS):
                continue
            tensor = held.pop(name)
            if node.op_type == "MatMul" and operation == "MatMul" and len(tensor.dims) == 2:
                readers[f"{module}.weight"] = partial(_turned, read, tensor)
            elif node.op_type in ("Concat", "Reshape") and re.fullmatch(r"(.*\.)?embeddings", module):
                positions.setdefault(module, {})[node.op_type] = tensor
            else:
                raise FormatError(
                    f"{file}: no name for the tensor {name!r}, which {node.name or node.op_type!r} reads."
                )
    for module, cut in positions.items():
        if set(cut) != {"Concat", "Reshape"}:
            raise FormatError(f"{file}: of the positions of {module!r} only {sorted(cut)} was found.")
        readers[f"{module}.position_embeddings"] = partial(_joined, read, cut["Concat"], cut["Reshape"])
    return Tensors(readers)


def _read(onnx: Any, file: Path, tensor: Any) -> np.ndarray:
    try:
        return np.array(onnx.numpy_helper.to_array(tensor))
    except (ValueError, TypeError) as error:
        raise FormatError(f"{file}: tensor {tensor.name!r} cannot be read: {error}") from error


def _turned(read: Callable[[Any], np.ndarray], tensor: Any) -> np.ndarray:
    return read(tensor).T


def _joined(read: Callable[[Any], np.ndarray], first: Any, rest: Any) -> np.ndarray:
    return np.concatenate([read(first), read(rest)], 1)
