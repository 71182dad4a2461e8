"""What torch calls the modules of our models, and which of them a file is about."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jtl import tree
from jtl.adapters.peft.files import AdapterFileError, Tensors
from jtl.model import Model
from jtl.models import ARCHITECTURES
from jtl.models.architecture import Architecture

WEIGHTED = ("kernel", "embedding")  # the leaves that make a layer one for adapters of weights
NORMS = ("scale",)


def architecture(model: Model) -> Architecture:
    """The architecture of ``model``; ValueError if it is not one of ``jtl.models``."""
    name = getattr(model.config, "model_type", None)
    if name not in ARCHITECTURES:
        raise ValueError(
            "PEFT's files name the layers of jtl.models architectures alone; this model is another"
        )
    return ARCHITECTURES[name]


def modules(model: Model, leaves: tuple[str, ...], transformers: int) -> dict[str, str]:
    """Torch's path of each of our layers that owns one of ``leaves``, without the task prefix."""
    own = architecture(model)
    found = {}
    for path, tensor in own.tensors(model.config).items():
        layer, _, leaf = path.removeprefix("params/").rpartition("/")
        if leaf in leaves:
            found[layer] = tensor.key.removesuffix(".weight")
    if transformers == 5:
        for pattern, replacement in own.in_memory:
            found = {layer: re.sub(pattern, replacement, module) for layer, module in found.items()}
    return found


def by_layer(
    model: Model,
    folder: Path,
    config: Mapping[str, Any],
    tensors: Tensors,
    suffix: str,
    leaves: tuple[str, ...],
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, str]]:
    """The tensors of a file by our layer and their suffix, and the file's own name of each such layer.

    Args:
        model: the base.
        folder: for messages.
        config: of the adapter.
        tensors: without PEFT's prefix.
        suffix: a regular expression of what follows a module's path.
        leaves: see ``modules``.

    Raises AdapterFileError for a key of no layer, and for a layer that ``target_modules`` names and no key does.
    """
    paths = {module: path for path, module in modules(model, leaves, 4).items()}
    found: dict[str, dict[str, np.ndarray]] = {}
    spelled: dict[str, str] = {}
    for key, tensor in tensors.items():
        own = architecture(model).canonical(key)
        match = re.fullmatch(rf"(.+?)\.({suffix})", own)
        if not match or match[1] not in paths:
            close = tree.near_misses(match[1] if match else own, paths)
            raise AdapterFileError(f"{folder}: {key!r} belongs to no layer of this model; near: {close}")
        path = paths[match[1]]
        found.setdefault(path, {})[match[2]] = tensor
        spelled[path] = key.removesuffix(f".{match[2]}")
    if not found:
        raise AdapterFileError(f"{folder}: no adapter in it, for none of its keys names a layer")
    missing = _missing(model, config, leaves, set(spelled.values()))
    if missing:
        raise AdapterFileError(
            f"{folder}: no tensors for {len(missing)} of the layers that target_modules names, such as {missing[0]!r}"
        )
    return found, spelled


def _missing(model: Model, config: Mapping[str, Any], leaves: tuple[str, ...], found: set[str]) -> list[str]:
    """The layers that ``target_modules`` names and that are not among ``found``, as PEFT matches them."""
    targets = config.get("target_modules")
    if targets == "all-linear" or config.get("layers_to_transform") or config.get("exclude_modules"):
        return []

    def targeted(module: str) -> bool:
        if isinstance(targets, str):
            return re.fullmatch(targets, module) is not None
        return any(module == target or module.endswith(f".{target}") for target in targets or ())

    prefix = architecture(model).prefix
    for transformers in (4, 5):
        for task in (prefix, ""):
            there = {task + module for module in modules(model, leaves, transformers).values()}
            if found <= there:  # so this is the file's spelling
                return sorted(module for module in there - found if targeted(module))
    return []
