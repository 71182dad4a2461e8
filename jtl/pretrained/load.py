"""Load a pretrained model from its files, accounting for every tensor of the files and every leaf of the model."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding
from jaxtyping import Array

from jtl import heads, tree
from jtl.errors import InputError
from jtl.model import Linen, Model, arguments
from jtl.models import ARCHITECTURES
from jtl.models.architecture import LINEAR, PLAIN, Architecture, HeadSpec, Tensor
from jtl.pretrained.formats import Tensors, read_tensors
from jtl.pretrained.sources import UnknownModelError, read_config, resolve
from jtl.sharding import REPLICATE, REPLICATED, layout


class WeightsError(InputError):
    """Weights and model do not fit: a tensor is missing, left over or of another shape."""


@dataclass(frozen=True)
class Report:
    """What happened to every tensor of the files and every leaf of the model.

    Attributes:
        source: the folder that was read.
        used: for the path of each loaded leaf, the name of its tensor.
        ignored: names of tensors that the architecture does not need.
        new: paths of leaves that the files lack and that were initialised.
    """

    source: Path
    used: Mapping[str, str]
    ignored: tuple[str, ...]
    new: tuple[str, ...]

    def __str__(self) -> str:
        counts = f"{len(self.used)} used, {len(self.ignored)} ignored, {len(self.new)} new"
        details = [f"  - {key}" for key in self.ignored] + [f"  + {path}" for path in self.new]
        return "\n".join([f"{self.source}: {counts}", *details])


def load(
    name: str | os.PathLike,
    *,
    revision: str | None = None,
    dtype: Any = jnp.float32,
    key: Array | None = None,
    mesh: Mesh | None = None,
    sharding: tree.Rules = REPLICATED,
) -> Model:
    """Return a pretrained model, with its classification or question-answering head if the files have one.

    Each leaf is moved to its devices as soon as it is read, the largest first, so host memory never holds more than one
    leaf (of safetensors on a mesh: one shard of a leaf) beside what the devices themselves hold.

    Args:
        name: a short name (``"minilm"``), a folder, or a hub id ``"org/name[@revision]"``: see ``resolve``.
        revision: branch, tag or commit of a hub id.
        dtype: type of the floating-point parameters; None keeps the file's type.
        key: random key that initialises leaves the files lack (such as BERT's pooler in a masked language model);
            without it a missing leaf raises.
        mesh: the devices; None for the default device. Each process reads only what its own devices hold.
        sharding: rules from parameter paths to layouts on the mesh, as for ``jtl.train.make_step``, such as
            ``jtl.sharding.FULLY_SHARDED``. Running statistics are replicated.

    Raises:
        UnknownModelError: the name, or the architecture in config.json, is unknown; the message lists near misses.
        WeightsError: tensors are missing, left over or of another shape; the message names paths and shapes.
        FormatError: a weight file is damaged, unknown or contains code.
        RuleError: ``sharding`` does not fit the parameters.

    >>> model = load("minilm")  # doctest: +SKIP
    """
    return load_with_report(name, revision=revision, dtype=dtype, key=key, mesh=mesh, sharding=sharding)[0]


def load_with_report(
    name: str | os.PathLike,
    *,
    revision: str | None = None,
    dtype: Any = jnp.float32,
    key: Array | None = None,
    mesh: Mesh | None = None,
    sharding: tree.Rules = REPLICATED,
) -> tuple[Model, Report]:
    """Return the model as ``load`` does, and a report on every tensor; arguments and errors are those of ``load``."""
    folder = resolve(name, revision)
    settings = read_config(name, folder)
    architecture = find_architecture(settings.get("model_type"))
    config = architecture.config.from_hf(settings)
    tensors = read_tensors(folder)
    keys = _canonical(architecture, config, tensors)
    config = architecture.settle(config, keys)
    module = architecture.module(config)

    body = architecture.tensors(config)
    spec, foreign = _head_spec(architecture, config, settings, keys)
    head = head_tensors(spec) if spec else {}
    shapes = {path: leaf.shape for path, leaf in expected(module, architecture, config).items()}
    shapes |= _head_shapes(config, spec, keys, tensors) if spec else {}
    wanted = body | head
    places = _places(shapes, mesh, sharding)

    read, problems = {}, []
    for path, tensor in sorted(wanted.items(), key=lambda item: -math.prod(shapes.get(item[0], ()))):
        if tensor.key not in keys:
            continue
        array = tensors[keys[tensor.key]]
        if problem := _misfit(path, tensor, array, shapes.get(path)):
            problems.append(problem)
        else:
            to = dtype if path.startswith("params/") else None
            read[path] = _placed(tensor.layout.to_jax(array), to, places[path])
    used = {tensor.key for tensor in wanted.values()}
    spare = [name for name in keys if name not in used and name not in foreign]
    left_over = [keys[name] for name in spare if not architecture.is_ignored(name)]
    missing = [path for path in shapes if path not in wanted or wanted[path].key not in keys]
    if left_over:
        problems.append(f"{len(left_over)} tensors that the model does not use: {_some(left_over)}")
    if missing and (key is None or any(path in head for path in missing)):
        lack = [f"{path} (tensor {wanted[path].key})" if path in wanted else path for path in missing]
        problems.append(
            f"{len(missing)} leaves without a tensor: {_some(lack)} (load(..., key=) would initialise them)"
        )
    if problems:
        where = f"{folder} does not fit the {architecture.name} of its config.json: "
        raise WeightsError(where + "; ".join(problems))
    if missing:
        fresh = _initialise(module, architecture, config, tuple(missing))(key)
        read |= {path: _placed(np.asarray(array), dtype, places[path]) for path, array in fresh.items()}

    variables = tree.nest({path: read[path] for path in shapes})
    model = _assemble(module, config, variables, spec)
    report = Report(
        folder,
        {path: keys[tensor.key] for path, tensor in wanted.items() if tensor.key in keys},
        tuple(keys[name] for name in keys if name not in used),
        tuple(missing),
    )
    return model, report


def scratch(name: str | os.PathLike, *, revision: str | None = None, key: Array) -> Model:
    """Return the same architecture with random weights and no head: the baseline that transfer is compared with.

    Args:
        name: as for ``load``.
        revision: of a hub id.
        key: random key for the initialisation.
    """
    settings = read_config(name, resolve(name, revision))
    architecture = find_architecture(settings.get("model_type"))
    config = architecture.config.from_hf(settings)
    module = architecture.module(config)
    paths = tuple(expected(module, architecture, config))
    return _assemble(module, config, tree.nest(_initialise(module, architecture, config, paths)(key)), None)


def find_architecture(model_type: str | None) -> Architecture:
    """Return the architecture that config.json calls ``model_type``.

    Raises:
        UnknownModelError: there is no such architecture; the message lists near misses.
    """
    if model_type not in ARCHITECTURES:
        near = tree.near_misses(str(model_type), ARCHITECTURES)
        raise UnknownModelError(
            f"config.json: unknown model_type {model_type!r}; expected one of {', '.join(ARCHITECTURES)}."
            + (f" Near misses: {', '.join(near)}." if near else "")
        )
    return ARCHITECTURES[model_type]


@lru_cache(maxsize=32)
def expected(module, architecture: Architecture, config) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shape and type of every variable of the module by path, collection included; nothing is computed."""
    return jax.eval_shape(lambda key: _variables(module, architecture, config, key), jax.random.key(0))


@lru_cache(maxsize=32)
def _initialise(module, architecture: Architecture, config, paths: tuple[str, ...]):
    """The compiled initialisation of these variables alone: XLA drops the rest."""

    def initialise(key: Array) -> dict[str, Array]:
        variables = _variables(module, architecture, config, key)
        return {path: variables[path] for path in paths}

    return jax.jit(initialise)


def _variables(module, architecture: Architecture, config, key: Array) -> dict[str, Array]:
    batch = {name: jnp.asarray(field) for name, field in architecture.example(config).items()}
    return tree.flatten(module.init(key, **arguments(type(module).__call__, batch, architecture.name)))


def _assemble(module, config, variables: dict[str, Any], spec: HeadSpec | None) -> Model:
    model = Model(variables, Linen(module), (), config)
    if spec is None:
        return model
    params = model.params["head"]
    classes = params["out"]["kernel"].shape[1]
    form = heads.standard(config, classes) if spec.output == config.head.output else heads.Classifier(classes)
    return heads.attach(model, form, on=spec.on, params=params, output=spec.output)


def _canonical(architecture: Architecture, config, tensors: Tensors) -> dict[str, str]:
    """The file's tensor names, by the name in the architecture's spelling."""
    aliases, keys = architecture.aliases(config), dict[str, str]()
    for name in tensors:
        canonical = aliases.get(name) or architecture.canonical(name)
        if canonical in keys:
            raise WeightsError(f"tensors {keys[canonical]!r} and {name!r} are one variable under two names.")
        keys[canonical] = name
    return keys


def head_tensors(spec: HeadSpec) -> dict[str, Tensor]:
    """Return the tensor name and layout of each leaf of the standard head."""
    layers = spec.tensors.items()
    kernels = {f"params/head/{ours}/kernel": Tensor(f"{theirs}.weight", LINEAR) for ours, theirs in layers}
    biases = {f"params/head/{ours}/bias": Tensor(f"{theirs}.bias", PLAIN) for ours, theirs in layers}
    return kernels | (biases if spec.bias else {})


def _head_spec(
    architecture: Architecture, config: Any, settings: Mapping[str, Any], keys: Mapping[str, str]
) -> tuple[HeadSpec | None, set[str]]:
    """The head in the files, if jtl knows it, and the tensor names of another task's head."""
    foreign: set[str] = set()
    for spec in filter(None, (config.head, architecture.spans)):
        roots = tuple(theirs.split(".")[0] + "." for theirs in spec.tensors.values())
        found = {name for name in keys if name.startswith(roots)}
        classes = settings.get("architectures") or [spec.task_class]
        if found and (spec.task_class in classes or architecture.base_class in classes):
            return spec, set()
        foreign |= found  # same name, another task: BertForTokenClassification also uses ``classifier``
    return None, foreign


def _head_shapes(config, spec: HeadSpec, keys: Mapping[str, str], tensors: Tensors):
    head = head_tensors(spec)
    out = head["params/head/out/kernel"].key
    width, classes = config.width(spec.on), len(tensors[keys[out]]) if out in keys else 0
    inner = spec.width or width
    sizes = {"out": (inner if spec.hidden else width, classes), "dense": (width, inner)}
    layers = {path: path.split("/")[2] for path in head}
    return {
        path: sizes[layer] if path.endswith("kernel") else sizes[layer][1:] for path, layer in layers.items()
    }


def _misfit(path: str, tensor: Tensor, array: np.ndarray, shape: tuple[int, ...] | None) -> str | None:
    if shape is None:
        return f"the name map has {path!r}, which the module does not"
    template = tensor.layout.to_file(np.broadcast_to(np.zeros(()), shape)).shape
    if array.shape != template:
        return f"{path}: expected tensor {tensor.key} of shape {template}, found {array.shape}"
    return None


def _places(shapes: Mapping[str, tuple[int, ...]], mesh: Mesh | None, rules: tree.Rules) -> dict[str, Any]:
    """The sharding of each variable; None for the default device."""
    if mesh is None:
        return dict.fromkeys(shapes)
    params = {path.removeprefix("params/"): 0 for path in shapes if path.startswith("params/")}
    found = tree.assign(rules, params)
    return {
        path: layout(shape, found.get(path.removeprefix("params/"), REPLICATE), mesh)
        for path, shape in shapes.items()
    }


def _placed(array: np.ndarray, dtype: Any, sharding: Sharding | None) -> Array:
    """Put the array on its devices as ``dtype`` if floating-point; each device reads only its own part."""
    if dtype is None or not jnp.issubdtype(array.dtype, jnp.floating):
        dtype = array.dtype
    dtype = jax.dtypes.canonicalize_dtype(dtype)

    def read(index: Any) -> np.ndarray:
        return np.array(
            array[index], dtype, order="C"
        )  # a copy: a CPU device may keep this memory, and files can change

    if sharding is None:
        placed = jnp.asarray(read(...))
    else:
        placed = jax.make_array_from_callback(array.shape, sharding, read)
    return jax.block_until_ready(placed)  # otherwise copies that wait for their transfer pile up


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
