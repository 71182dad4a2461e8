"""LN tuning in PEFT's files: the scales and shifts of the model's own norms; no adapter is involved.

Zhao et al. 2023, "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning",
https://arxiv.org/abs/2312.11420.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jtl import tree
from jtl.adapters.peft import names
from jtl.adapters.peft.files import AdapterFileError, Tensors
from jtl.errors import InputError
from jtl.heads import Head
from jtl.model import Cast, Model

LEAVES = {"ln_tuning_layers.weight": "scale", "ln_tuning_layers.bias": "bias"}
SUFFIX = r"ln_tuning_layers\.\w+"


def write(
    model: Model, where: str, prefix: str, task: str, transformers: int
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns the tensors and the configuration of the norms whose whole path matches ``where``; see ``layers.write``.

    Raises:
        RuleError: no norm matches.
        ValueError: the model has an adapter, which this file would not hold, or norms with running statistics.
    """
    others = [getattr(t, "name", t) for t in model.techniques if not isinstance(t, (Head, Cast))]
    if others:
        raise InputError(
            f"norms={where!r} writes norms alone, and the model has the adapters {others} too: save them by "
            "themselves, or merge them first"
        )
    if "batch_stats" in model.variables:
        raise InputError("this model's norms have running statistics, for which PEFT's LN tuning has no form")
    modules = names.modules(model, names.NORMS, transformers)
    met = {path: module for path, module in modules.items() if re.fullmatch(where, path)}
    if not met:
        close = tree.near_misses(where, modules) or list(modules)[:3]
        raise tree.RuleError(f"norms={where!r} meets no norm; there are {', '.join(map(repr, close))}")
    params = tree.flatten(model.params)
    tensors = {
        f"{prefix}{task}{module}.{suffix}": np.asarray(params[f"{path}/{leaf}"])
        for path, module in met.items()
        for suffix, leaf in LEAVES.items()
        if f"{path}/{leaf}" in params
    }
    config = {"peft_type": "LN_TUNING", "target_modules": [task + module for module in met.values()]}
    return tensors, {**config, "inference_mode": True}


def read(model: Model, config: Mapping[str, Any], tensors: Tensors, folder: Path) -> Model:
    """Returns ``model`` with the norms of ``tensors``, whose keys have no prefix.

    Raises:
        AdapterFileError: a leaf of a norm is missing, left over or of another shape.
    """
    found, _ = names.by_layer(model, folder, config, tensors, SUFFIX, names.NORMS)
    params = tree.flatten(model.params)
    leaves: dict[str, Array] = {}
    for path, own in found.items():
        wanted = sorted(suffix for suffix, leaf in LEAVES.items() if f"{path}/{leaf}" in params)
        if wanted != sorted(own):
            raise AdapterFileError(f"{folder}: {path} needs {wanted}, found {sorted(own)}")
        for suffix, array in own.items():
            old = params[f"{path}/{LEAVES[suffix]}"]
            if array.shape != old.shape:
                raise AdapterFileError(
                    f"{folder}: {path}/{LEAVES[suffix]} has shape {array.shape}, expected {old.shape}: it is of "
                    "another model"
                )
            leaves[f"{path}/{LEAVES[suffix]}"] = jnp.asarray(array, old.dtype)
    return model.with_params(tree.overlay(model.params, tree.nest(leaves), replace=True))
