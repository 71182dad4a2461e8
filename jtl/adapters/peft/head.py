"""The classification head, which PEFT saves whole beside an adapter (``modules_to_save``)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jtl import heads
from jtl.adapters.peft import names
from jtl.adapters.peft.files import AdapterFileError, Tensors
from jtl.errors import InputError
from jtl.model import Model

NAMES = {"weight": "weights", "bias": "biases"}


def write(model: Model, prefix: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns the head's tensors, with keys after ``prefix``, and its configuration; both empty without a head.

    Raises:
        ValueError: the head has another output than PEFT's files hold.
    """
    head = heads.find(model)
    if head is None:
        return {}, {}
    if head.output != model.config.head.output:
        raise InputError(
            f"PEFT's files hold a head that gives {model.config.head.output!r}, and this one gives {head.output!r}: "
            "save the adapter of the model without its head, or jtl.adapters.merge and jtl.save the whole"
        )
    tensors: dict[str, np.ndarray] = {}
    for layer, module in model.config.head.tensors.items():
        leaves = model.params["head"][layer]
        tensors[f"{prefix}{module}.weight"] = np.asarray(leaves["kernel"]).T
        if model.config.head.bias:
            tensors[f"{prefix}{module}.bias"] = np.asarray(leaves["bias"])
    saved = {key.split(".")[0] for key in model.config.head.tensors.values()}
    config: dict[str, Any] = {"modules_to_save": sorted(saved)}
    if "input_ids" in names.architecture(model).example(model.config):
        config["task_type"] = "SEQ_CLS"
    return tensors, config


def split(
    model: Model, tensors: Tensors, folder: Path
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Splits the tensors into those of the head, by their names in ``jtl.models``, and all others.

    Raises:
        AdapterFileError: a tensor appears under two names.
    """
    modules = set(model.config.head.tensors.values())
    keys = names.canonical(model, tensors, folder)
    head = {own: tensors[key] for own, key in keys.items() if own.rpartition(".")[0] in modules}
    return head, {key: tensors[key] for own, key in keys.items() if own not in head}


def read(model: Model, config: Mapping[str, Any], tensors: Tensors, folder: Path) -> Model:
    """Returns ``model`` with the head of ``tensors``, or unchanged if there are none and ``config`` names none.

    Raises:
        AdapterFileError: a tensor is missing, left over or of another shape.
    """
    spec = model.config.head
    if not tensors and not _named(model, config):
        return model
    leaves = [*NAMES] if spec.bias else ["weight"]
    wanted = {f"{module}.{leaf}" for module in spec.tensors.values() for leaf in leaves}
    if wanted != set(tensors):
        raise AdapterFileError(
            f"{folder}: the head needs {sorted(wanted)}, found {sorted(tensors)}; to keep the model's own head, take "
            "it out of both files (modules_to_save and task_type of the configuration)"
        )
    width = model.config.width(spec.on)
    inner = spec.width or width
    layers: dict[str, dict[str, Array]] = {}
    for layer, module in spec.tensors.items():
        found = {leaf: tensors[f"{module}.{leaf}"] for leaf in leaves}
        inputs = inner if layer == "out" and spec.hidden else width
        outputs = len(found["weight"]) if layer == "out" else inner
        for leaf, shape in zip(leaves, ((outputs, inputs), (outputs,)), strict=False):
            if found[leaf].shape != shape:
                raise AdapterFileError(
                    f"{folder}: {module} has {NAMES[leaf]} {found[leaf].shape} in place of the expected {shape}: it is "
                    "of another model"
                )
        layers[layer] = {"kernel": jnp.asarray(found["weight"].T)}
        layers[layer] |= {"bias": jnp.asarray(found["bias"])} if spec.bias else {}
    module = heads.standard(model.config, layers["out"]["kernel"].shape[1])
    return heads.attach(model, module, on=spec.on, params=layers)


def _named(model: Model, config: Mapping[str, Any]) -> bool:
    """Whether ``config`` says that the head is saved; PEFT matches the ends of module names."""
    saved = config.get("modules_to_save") or (
        ("classifier", "score") if config.get("task_type") == "SEQ_CLS" else ()
    )
    modules = model.config.head.tensors.values()
    return any(re.search(rf"{re.escape(name)}(\.|$)", module) for name in saved for module in modules)
