"""Adapters as PEFT's files: what is trained here opens in ``peft``, and the reverse.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors``, whose keys are
``base_model.model.<torch path>.<leaf>``. LoRA, rsLoRA, DoRA and IA3 are exchanged, and the classification head.
Checked against PEFT 0.21 (https://github.com/huggingface/peft).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jtl import heads, tree
from jtl.adapters.dora import DoRA
from jtl.adapters.ia3 import IA3
from jtl.adapters.insert import Adapter, place
from jtl.adapters.lora import LoRA
from jtl.adapters.site import Site, SiteError, find
from jtl.files import write_file
from jtl.model import Model
from jtl.models import ARCHITECTURES
from jtl.models.architecture import Architecture

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class AdapterFileError(ValueError):
    """A folder that is no adapter, or not one of this model."""


@dataclass(frozen=True)
class _Form:
    """How one leaf of one kind of layer is called and laid out in PEFT's files."""

    suffix: str
    to_file: Any
    to_jax: Any


def _forms(method: LoRA | IA3, site: Site) -> dict[str, _Form]:
    """The leaves of ``method`` at ``site``, by our names. Raises SiteError for what PEFT has no form for."""
    transpose = lambda x: x.T  # noqa: E731
    if isinstance(method, IA3):
        axis = 0 if method.on_inputs(site) else 1
        return {"scale": _Form("ia3_l", lambda x: np.expand_dims(x, axis), np.ravel)}
    if site.kind == "embed":
        a, b = "lora_embedding_A", "lora_embedding_B"
        forms = {"a": _Form(a, transpose, transpose), "b": _Form(b, transpose, transpose)}
    elif site.kind == "conv" and len(site.shape) == 4 and site.groups == 1:
        window = site.shape[:-1]
        forms = {
            "a": _Form(
                "lora_A.weight",
                lambda x: x.reshape(*window, -1).transpose(3, 2, 0, 1),
                lambda x: x.transpose(2, 3, 1, 0).reshape(-1, len(x)),
            ),
            "b": _Form("lora_B.weight", lambda x: x.T[..., None, None], lambda x: x[..., 0, 0].T),
        }
    elif site.kind == "dense":
        forms = {
            "a": _Form("lora_A.weight", transpose, transpose),
            "b": _Form("lora_B.weight", transpose, transpose),
        }
    else:
        raise SiteError(
            f"{site.path}: PEFT's files have no form for a layer of kind {site.kind} {site.shape}"
        )
    if isinstance(method, DoRA):
        if site.kind == "embed":
            raise SiteError(f"{site.path}: PEFT normalises DoRA of an embedding by rows, jtl by columns")
        shape = (1, -1, 1, 1) if site.kind == "conv" else (-1,)
        forms["magnitude"] = _Form("lora_magnitude_vector", lambda x: x.reshape(shape), np.ravel)
    return forms


def save(
    model: Model,
    folder: str | os.PathLike,
    *,
    base: str | None = None,
    transformers: Literal[4, 5] = 5,
    name: str | None = None,
) -> Path:
    """Write the adapter of ``model``, and its head, as a folder that ``peft.PeftModel.from_pretrained`` opens.

    Args:
        model: of an architecture in ``jtl.models``, with one adapter.
        folder: absent or empty.
        base: what PEFT calls the base model: a hub id or folder.
        transformers: whose module names to write: version 5 renamed those of ViT, DeiT and DINOv2 in memory.
        name: of the adapter, if there are several.

    Raises:
        ValueError: no adapter, several, or one of a method that PEFT's files do not know here.
        SiteError: a layer that they have no form for.
        FileExistsError: ``folder`` holds something.
    """
    adapter = _only(model, name)
    architecture = _architecture(model)
    method = adapter.method
    if not isinstance(method, (LoRA, DoRA, IA3)):
        raise ValueError(
            f"adapter {adapter.name!r} is {type(method).__name__}; LoRA, DoRA and IA3 can be written"
        )
    if isinstance(method, LoRA) and method.subtracted:
        raise ValueError(
            f"adapter {adapter.name!r} started from {method.start!r}, which changed the base weights: merge it "
            "and save the model"
        )
    head = heads.find(model)
    prefix = architecture.prefix if head else ""
    params = {path: np.asarray(leaf) for path, leaf in tree.flatten(model.params).items()}
    modules = _torch_modules(model, architecture, transformers)
    tensors: dict[str, np.ndarray] = {}
    for site in adapter.sites:
        for leaf, form in _forms(method, site).items():
            key = f"{PREFIX}{prefix}{modules[site.path]}.{form.suffix}"
            tensors[key] = np.ascontiguousarray(form.to_file(params[place(site, adapter.name, leaf)]))
    if head:
        for layer, module in model.config.head.tensors.items():
            tensors[f"{PREFIX}{module}.weight"] = np.ascontiguousarray(params[f"head/{layer}/kernel"].T)
            tensors[f"{PREFIX}{module}.bias"] = params[f"head/{layer}/bias"]
    config = _config(adapter, modules, params, base)
    if head:
        config |= {"task_type": "SEQ_CLS"} if "input_ids" in architecture.example(model.config) else {}
        config["modules_to_save"] = sorted({key.split(".")[0] for key in model.config.head.tensors.values()})
    folder = Path(folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty: choose another")
    folder.mkdir(parents=True, exist_ok=True)
    from safetensors.numpy import save as serialise

    write_file(folder / WEIGHTS, serialise(tensors, metadata={"format": "pt"}))
    write_file(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    return folder


def _config(
    adapter: Adapter, modules: Mapping[str, str], params: Mapping[str, Any], base: str | None
) -> dict:
    method = adapter.method
    names = [modules[site.path] for site in adapter.sites]
    common = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": names,
    }
    if isinstance(method, IA3):
        inputs = [modules[site.path] for site in adapter.sites if method.on_inputs(site)]
        return common | {"peft_type": "IA3", "feedforward_modules": inputs}
    assert isinstance(method, LoRA)
    ranks = [params[place(site, adapter.name, "a")].shape[-1] for site in adapter.sites]
    scales = [method.scale(site, rank) for site, rank in zip(adapter.sites, ranks, strict=True)]
    alphas = [s * (r**0.5 if method.stabilised else r) for s, r in zip(scales, ranks, strict=True)]
    return common | {
        "peft_type": "LORA",
        "r": ranks[0],
        "lora_alpha": alphas[0],
        "lora_dropout": method.dropout,
        "use_rslora": method.stabilised,
        "use_dora": isinstance(method, DoRA),
        "rank_pattern": {re.escape(n): r for n, r in zip(names, ranks, strict=True) if r != ranks[0]},
        "alpha_pattern": {re.escape(n): a for n, a in zip(names, alphas, strict=True) if a != alphas[0]},
        "init_lora_weights": True,
    }


def load(model: Model, folder: str | os.PathLike, *, name: str | None = None) -> Model:
    """``model`` with the adapter of a PEFT folder, and with its head if the folder has one.

    Args:
        model: of the base model that the adapter was trained on; a head is replaced.
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        name: of the adapter here; by default ``lora``, ``dora`` or ``ia3``.

    Raises:
        FileNotFoundError: a file is missing.
        AdapterFileError: a method or option that jtl does not have; a key without PEFT's prefix, of no layer of
            this model, missing or left over; a tensor of another shape.
    """
    folder = Path(folder)
    config = json.loads((folder / CONFIG).read_text())
    from safetensors.numpy import load_file

    tensors = load_file(folder / WEIGHTS)
    architecture = _architecture(model)
    naked = [key for key in tensors if not key.startswith(PREFIX)]
    if naked:
        raise AdapterFileError(
            f"{folder}: {len(naked)} keys lack the prefix {PREFIX!r}, such as {naked[0]!r}; PEFT would pass them over"
        )
    method = _method(config, folder)
    paths = {module: path for path, module in _torch_modules(model, architecture, 4).items()}
    found: dict[str, dict[str, np.ndarray]] = {}
    modules: dict[str, str] = {}  # the file's own name of each layer
    head: dict[str, np.ndarray] = {}
    for key, tensor in tensors.items():
        own = architecture.canonical(key.removeprefix(PREFIX))
        layer = re.fullmatch(r"(.+?)\.((?:lora|ia3)_\w+(?:\.weight)?)", own)
        if layer and layer[1] in paths:
            found.setdefault(paths[layer[1]], {})[layer[2]] = tensor
            modules[paths[layer[1]]] = key.removeprefix(PREFIX).removesuffix(f".{layer[2]}")
        elif not layer and own.rpartition(".")[0] in model.config.head.tensors.values():
            head[own] = tensor
        else:
            close = tree.near_misses(layer[1] if layer else own, paths)
            raise AdapterFileError(f"{folder}: {key!r} belongs to no layer of this model; near: {close}")
    if not found:
        raise AdapterFileError(f"{folder}: no adapter in it, for none of its keys names a layer")
    sites = find(model, "|".join(map(re.escape, found)))
    kind = type(method).__name__.lower()
    adapter_name = name or kind
    if isinstance(method, LoRA):
        method = _with_patterns(method, config, sites, found, modules)
    if isinstance(method, IA3):
        inputs = [site.path for site in sites if found[site.path]["ia3_l"].shape[0] == 1]
        method = IA3("|".join(map(re.escape, inputs)) or "(?!)")
    leaves: dict[str, Array] = {}
    for site in sites:
        forms = _forms(method, site)
        wanted = {form.suffix for form in forms.values()}
        if wanted != set(found[site.path]):
            raise AdapterFileError(
                f"{folder}: {site.path} needs {sorted(wanted)}, found {sorted(found[site.path])}"
            )
        for leaf, form in forms.items():
            leaves[place(site, adapter_name, leaf)] = jnp.asarray(form.to_jax(found[site.path][form.suffix]))
        _check_shapes(folder, method, site, {leaf: leaves[place(site, adapter_name, leaf)] for leaf in forms})
    if head:
        model = _with_head(model, head, folder)
    return model.with_technique(Adapter(adapter_name, method, sites), tree.nest(leaves))


def _method(config: Mapping[str, Any], folder: Path) -> LoRA | IA3:
    kind = config.get("peft_type")
    if kind == "IA3":
        return IA3()
    if kind != "LORA":
        raise AdapterFileError(f"{folder / CONFIG}: peft_type is {kind!r}; LORA and IA3 can be read")
    for option in ("lora_bias", "layer_replication", "alora_invocation_tokens", "trainable_token_indices"):
        if config.get(option):
            raise AdapterFileError(f"{folder / CONFIG}: {option}={config[option]!r} is not supported")
    if config.get("bias", "none") != "none":
        raise AdapterFileError(f"{folder / CONFIG}: bias={config['bias']!r} is not supported; 'none' is")
    cls = DoRA if config.get("use_dora") else LoRA
    dropout = float(config.get("lora_dropout", 0.0))
    return cls(config["r"], float(config["lora_alpha"]), bool(config.get("use_rslora")), dropout)


def _with_patterns(
    method: LoRA,
    config: Mapping[str, Any],
    sites: tuple[Site, ...],
    found: Mapping[str, Mapping[str, np.ndarray]],
    modules: Mapping[str, str],
) -> LoRA:
    """The method with the alpha that PEFT's ``alpha_pattern`` gives each layer."""

    def alpha(site: Site) -> float:
        for pattern, own in (config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", modules[site.path]):
                return float(own)
        return float(config["lora_alpha"])

    def rank(site: Site) -> int:
        own = found[site.path]
        return len(own.get("lora_A.weight", own.get("lora_embedding_A", ())))

    alphas = tuple((re.escape(site.path), alpha(site)) for site in sites)
    ranks = tuple((re.escape(site.path), rank(site)) for site in sites)
    same = lambda rules: rules[0][1] if len({own for _, own in rules}) == 1 else rules  # noqa: E731
    return type(method)(same(ranks), same(alphas), method.stabilised, method.dropout)


def _check_shapes(folder: Path, method: Any, site: Site, leaves: Mapping[str, Array]) -> None:
    expected: dict[str, tuple[int, ...]] = {"magnitude": (site.columns,)}
    if "a" in leaves:
        rank = leaves["a"].shape[-1]
        expected |= {"a": (site.rows, rank), "b": (rank, site.columns)}
    if isinstance(method, IA3):
        expected["scale"] = (site.rows if method.on_inputs(site) else site.columns,)
    for leaf, array in leaves.items():
        if array.shape != expected[leaf]:
            raise AdapterFileError(
                f"{folder}: {site.path}/{leaf} has shape {array.shape}, expected {expected[leaf]}: "
                "it is of another model"
            )


def _with_head(model: Model, tensors: Mapping[str, np.ndarray], folder: Path) -> Model:
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


def _only(model: Model, name: str | None) -> Adapter:
    there = [t for t in model.techniques if isinstance(t, Adapter) and name in (None, t.name)]
    if len(there) != 1:
        raise ValueError(
            f"expected one adapter{f' called {name!r}' if name else ''}, found {[t.name for t in there]}: name one"
        )
    return there[0]


def _architecture(model: Model) -> Architecture:
    name = getattr(model.config, "model_type", None)
    if name not in ARCHITECTURES:
        raise ValueError(
            "PEFT's files name the layers of jtl.models architectures alone; this model is another"
        )
    return ARCHITECTURES[name]


def _torch_modules(model: Model, architecture: Architecture, transformers: int) -> dict[str, str]:
    """Torch's module path of each of our layers, without the task prefix."""
    modules = {}
    for path, tensor in architecture.tensors(model.config).items():
        layer, _, leaf = path.removeprefix("params/").rpartition("/")
        if leaf in ("kernel", "embedding"):
            modules[layer] = tensor.key.removesuffix(".weight")
    if transformers == 5:
        for pattern, replacement in architecture.in_memory:
            modules = {layer: re.sub(pattern, replacement, module) for layer, module in modules.items()}
    return modules
