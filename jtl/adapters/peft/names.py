"""Torch's names of the modules of our models, and which of them a file contains."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jtl import tree
from jtl.adapters.peft.files import AdapterFileError, Tensors
from jtl.errors import InputError
from jtl.model import Model
from jtl.models import ARCHITECTURES
from jtl.models.architecture import Architecture

WEIGHTED = ("kernel", "embedding")  # the leaves that adapters of weights can adapt
NORMS = ("scale",)


def architecture(model: Model) -> Architecture:
    """Returns the architecture of ``model``.

    Raises:
        ValueError: it is not one of ``jtl.models``.
    """
    name = getattr(model.config, "model_type", None)
    if name not in ARCHITECTURES:
        raise InputError(
            "PEFT's files name the layers of jtl.models architectures alone; this model is another"
        )
    return ARCHITECTURES[name]


def modules(model: Model, leaves: tuple[str, ...], transformers: int) -> dict[str, str]:
    """Returns torch's path of each of our layers that owns one of ``leaves``, without the task prefix."""
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


def canonical(model: Model, tensors: Tensors, folder: Path) -> dict[str, str]:
    """Returns the keys of a file by their spelling in ``jtl.models``.

    Raises:
        AdapterFileError: two keys have the same spelling.
    """
    keys: dict[str, str] = {}
    for key in tensors:
        own = architecture(model).canonical(key)
        if own in keys:
            raise AdapterFileError(
                f"{folder}: {keys[own]!r} and {key!r} are one tensor: leave one of them out"
            )
        keys[own] = key
    return keys


def by_layer(
    model: Model,
    folder: Path,
    config: Mapping[str, Any],
    tensors: Tensors,
    suffix: str,
    leaves: tuple[str, ...],
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, str]]:
    """Returns the tensors of a file by our layer and their suffix, and the file's own name of each such layer.

    Args:
        model: the base model.
        folder: for messages.
        config: of the adapter.
        tensors: by key without PEFT's prefix.
        suffix: a regular expression of what follows a module's path.
        leaves: see ``modules``.

    Raises:
        AdapterFileError: a key belongs to no layer, keys mix several spellings of layer names, or a layer that
            ``target_modules`` names has no key.
    """
    paths = {module: path for path, module in modules(model, leaves, 4).items()}
    found: dict[str, dict[str, np.ndarray]] = {}
    spelled: dict[str, str] = {}
    for own, key in canonical(model, tensors, folder).items():
        match = re.fullmatch(rf"(.+?)\.({suffix})", own)
        if not match or match[1] not in paths:
            close = tree.near_misses(match[1] if match else own, paths)
            raise AdapterFileError(f"{folder}: {key!r} belongs to no layer of this model; near: {close}")
        path = paths[match[1]]
        found.setdefault(path, {})[match[2]] = tensors[key]
        spelled[path] = key.removesuffix(f".{match[2]}")
    if not found:
        raise AdapterFileError(f"{folder}: no adapter in it, for none of its keys names a layer")
    names = set(spelled.values())
    there = next((whole for whole in _spellings(model, leaves) if names <= whole), None)
    if there is None:
        raise AdapterFileError(
            f"{folder}: its keys spell the names of layers in several ways: {sorted(names)}"
        )
    missing = sorted(module for module in there - names if _targeted(config, module))
    if missing:
        raise AdapterFileError(
            f"{folder}: no tensors for {len(missing)} of the layers that target_modules names, such as {missing[0]!r}"
        )
    return found, spelled


def _spellings(model: Model, leaves: tuple[str, ...]) -> Iterator[set[str]]:
    """What a file may call the layers: in transformers 4 or 5, inside a task model or the encoder alone."""
    for transformers in (4, 5):
        for task in (architecture(model).prefix, ""):
            yield {task + module for module in modules(model, leaves, transformers).values()}


def _targeted(config: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT adapts ``module``: mirrors its ``check_target_module_exists``."""
    targets = config.get("target_modules") or ()
    saved = config.get("modules_to_save") or ()
    if _meets(config.get("exclude_modules"), module) or not _meets(targets, module):
        return False
    if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in saved):
        return False
    layers = config.get("layers_to_transform")
    if layers in (None, []) or isinstance(targets, str) or module in targets:
        return True
    patterns = config.get("layers_pattern") or ()
    starts = [rf"(?:^|.*?\.){own}" for own in ([patterns] if isinstance(patterns, str) else patterns)]
    found = (re.match(rf"{start}\.(\d+)\.", module) for start in starts or [r".*?\.[^.]*"])
    index = next((int(match[1]) for match in found if match), None)
    return index in ([layers] if isinstance(layers, int) else layers)


def _meets(names: str | Sequence[str] | None, module: str) -> bool:
    """Whether ``names`` match: a string is a regex of the whole name; a list holds ends of names."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names or ())
