"""The classification head, which PEFT saves whole beside an adapter (``modules_to_save``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jtl import heads
from jtl.adapters.peft import names
from jtl.adapters.peft.files import AdapterFileError, Tensors
from jtl.model import Model


def write(model: Model, prefix: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The head's tensors, their keys after ``prefix``, and what the configuration says of it; nothing without one."""
    if heads.find(model) is None:
        return {}, {}
    tensors: dict[str, np.ndarray] = {}
    for layer, module in model.config.head.tensors.items():
        leaves = model.params["head"][layer]
        tensors[f"{prefix}{module}.weight"] = np.asarray(leaves["kernel"]).T
        tensors[f"{prefix}{module}.bias"] = np.asarray(leaves["bias"])
    saved = {key.split(".")[0] for key in model.config.head.tensors.values()}
    config: dict[str, Any] = {"modules_to_save": sorted(saved)}
    if "input_ids" in names.architecture(model).example(model.config):
        config["task_type"] = "SEQ_CLS"
    return tensors, config


def split(model: Model, tensors: Tensors) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The tensors of the head, by the names of ``jtl.models``, and all others."""
    own = names.architecture(model)
    modules = set(model.config.head.tensors.values())
    of_head = {key for key in tensors if own.canonical(key).rpartition(".")[0] in modules}
    head = {own.canonical(key): tensors[key] for key in tensors if key in of_head}
    return head, {key: tensor for key, tensor in tensors.items() if key not in of_head}


def read(model: Model, tensors: Tensors, folder: Path) -> Model:
    """``model`` with the head of ``tensors``; as it is if there are none."""
    if not tensors:
        return model
    layers: dict[str, dict[str, Array]] = {}
    for layer, module in model.config.head.tensors.items():
        if f"{module}.weight" not in tensors or f"{module}.bias" not in tensors:
            raise AdapterFileError(f"{folder}: the head lacks {module}.weight or {module}.bias")
        layers[layer] = {
            "kernel": jnp.asarray(tensors[f"{module}.weight"].T),
            "bias": jnp.asarray(tensors[f"{module}.bias"]),
        }
    module = heads.standard(model.config, layers["out"]["bias"].shape[0])
    return heads.attach(model, module, on=model.config.head.on, params=layers)
