"""Adapters of weights in PEFT's files: the leaves beside each layer, and VeRA's shared pair."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jtl import tree
from jtl.adapters.insert import Adapter, check_free, place
from jtl.adapters.lora import LoRA
from jtl.adapters.peft import names
from jtl.adapters.peft.files import AdapterFileError, Tensors
from jtl.adapters.peft.forms import EXCHANGED, forms
from jtl.adapters.peft.methods import from_config, to_config
from jtl.adapters.site import find
from jtl.adapters.vera import VeRA
from jtl.errors import InputError
from jtl.model import Model
from jtl.models.architecture import PLAIN

SHARED = {"shared_a": "base_model.vera_A", "shared_b": "base_model.vera_B"}
SUFFIX = r"(?:lora|ia3|vera)_\w+(?:\.weight)?"


def write(
    model: Model, name: str | None, prefix: str, task: str, transformers: int
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns the tensors and the configuration of the adapter called ``name``, or of the only one.

    Args:
        model: with the adapter.
        name: of the adapter.
        prefix: of the keys.
        task: torch's prefix of the encoder inside a task model, or an empty string.
        transformers: see ``jtl.adapters.peft.save``.

    Raises:
        ValueError: there is not exactly one such adapter, or it cannot be written.
        SiteError: PEFT has no form for a layer.
    """
    adapter = _only(model, name)
    method = adapter.method
    if not isinstance(method, EXCHANGED):
        raise InputError(
            f"adapter {adapter.name!r} is {type(method).__name__}; LoRA, DoRA, IA3, VeRA and AdaLoRA can be written"
        )
    if adapter.served:
        raise InputError(f"the model serves many adapters {adapter.name!r}: jtl.adapters.pick one to write")
    if isinstance(method, LoRA) and method.subtracted:
        raise InputError(
            f"adapter {adapter.name!r} started from {method.start!r}, which changed the base weights: merge it "
            "and save the model"
        )
    params = {path: np.asarray(leaf) for path, leaf in tree.flatten(model.params).items()}
    modules = names.modules(model, names.WEIGHTED, transformers)
    tensors: dict[str, np.ndarray] = {}
    ranks: list[int] = []
    for site in adapter.sites:
        for leaf, form in forms(method, site).items():
            array = params[place(site, adapter.name, leaf)]
            tensors[f"{prefix}{task}{modules[site.path]}.{form.suffix}"] = form.to_file(array)
            if form.axes == "mr":
                ranks.append(array.shape[-1])
    if isinstance(method, VeRA):
        shared = model.variables[adapter.name]
        tensors |= {key: np.asarray(shared[leaf]).T for leaf, key in SHARED.items()}
    of_torch = names.architecture(model).tensors(model.config)
    kernels = [of_torch[f"params/{place(site)}"] for site in adapter.sites if site.kind == "dense"]
    return tensors, to_config(
        adapter,
        [task + modules[site.path] for site in adapter.sites],
        ranks,
        transposed=any(kernel.layout == PLAIN for kernel in kernels),
    )


def read(
    model: Model, config: Mapping[str, Any], tensors: Tensors, shared: Tensors, name: str | None, folder: Path
) -> Model:
    """Returns ``model`` with the adapter of ``tensors``.

    Args:
        model: the base model.
        config: of the file.
        tensors: by key without PEFT's prefix.
        shared: VeRA's pair, by full key.
        name: of the adapter; by default that of its method.
        folder: for messages.

    Raises:
        AdapterFileError: the file does not fit the model.
    """
    found, modules = names.by_layer(model, folder, config, tensors, SUFFIX, names.WEIGHTED)
    sites = find(model, "|".join(map(re.escape, found)))
    method = from_config(config, folder, sites, found, modules)
    name = name or type(method).__name__.lower()
    check_free(model, name, sites)
    leaves: dict[str, Array] = {}
    for site in sites:
        own = forms(method, site)
        wanted = sorted(form.suffix for form in own.values())
        if wanted != sorted(found[site.path]):
            raise AdapterFileError(f"{folder}: {site.path} needs {wanted}, found {sorted(found[site.path])}")
        sizes = {"m": site.rows, "n": site.columns}
        if isinstance(method, VeRA):
            sizes["r"] = method.rank
        for leaf, form in own.items():
            tensor = found[site.path][form.suffix]
            try:
                array = form.to_jax(tensor)
            except ValueError as error:
                raise AdapterFileError(
                    f"{folder}: {form.suffix} at {site.path} has shape {tensor.shape}, which does not fit a "
                    f"{site.kind} layer of shape {site.shape}: it is of another model or configuration"
                ) from error
            expected = tuple(
                sizes.setdefault(axis, size) for axis, size in zip(form.axes, array.shape, strict=False)
            )
            if array.shape != expected or len(expected) != len(form.axes):
                raise AdapterFileError(
                    f"{folder}: {site.path}/{leaf} has shape {array.shape}, expected {expected}: "
                    "it is of another model"
                )
            leaves[place(site, name, leaf)] = jnp.asarray(array)
    if isinstance(method, VeRA):
        pair = _pair(method, shared, (max(s.rows for s in sites), max(s.columns for s in sites)), folder)
        model = model.replace(variables={**model.variables, name: pair})
    return model.with_technique(Adapter(name, method, sites), tree.nest(leaves))


def _pair(method: VeRA, shared: Tensors, largest: tuple[int, int], folder: Path) -> dict[str, Array]:
    """VeRA's A and B; raises AdapterFileError if they are absent or too small for the layers."""
    if set(shared) != set(SHARED.values()):
        raise AdapterFileError(
            f"{folder}: VeRA needs {sorted(SHARED.values())}, found {sorted(shared)}: save it with "
            "save_projection=True, for torch drew them"
        )
    pair = {leaf: jnp.asarray(shared[key].T) for leaf, key in SHARED.items()}
    (m, n), r = largest, method.rank
    for leaf, needed in (("shared_a", (m, r)), ("shared_b", (r, n))):
        rows, columns = pair[leaf].shape
        if rows < needed[0] or columns < needed[1] or r not in (rows, columns):
            raise AdapterFileError(
                f"{folder}: {SHARED[leaf]} transposed has shape {pair[leaf].shape}, expected {needed}: it is of "
                "another model"
            )
    return pair


def _only(model: Model, name: str | None) -> Adapter:
    there = [t for t in model.techniques if isinstance(t, Adapter) and name in (None, t.name)]
    if len(there) != 1:
        raise InputError(
            f"expected one adapter{f' called {name!r}' if name else ''}, found {[t.name for t in there]}: name one"
        )
    return there[0]
