"""Stacked layers: identical layers with their leaves stacked, run by one loop (``nn.scan``).

A model of 48 layers then compiles as fast as one of 2, into as small a program. Files and ``jtl.load`` have the
unrolled form; both compute the same, and each converts to the other:

    model = jtl.models.parts.scan.stack(jtl.load("smollm2"))  # decoder/layer_7/mlp/... becomes
        decoder/layers/mlp/...[7]
    model = jtl.models.parts.scan.unstack(model)

Add adapters after stacking; they work as usual. A tap ``decoder/layers`` returns the outputs of all layers,
(n, B, L, D). Functions that need layer numbers (``finetune.layerwise``, ``distill.choose_layers``) need the unrolled
form. So does long generation: a loop would copy the layer's weights and the cache at every token.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from jtl import tree
from jtl.errors import InputError
from jtl.heads import Head
from jtl.model import Cast, Model, with_config

LAYER, STACK = re.compile(r"(|.*/)layer_(\d+)/(.+)"), re.compile(r"(|.*/)layers/(.+)")
Layer = TypeVar("Layer", bound=nn.Module)


def run(
    make: Callable[[str], Layer],
    call: Callable[[Layer, Array, Any], Array],
    x: Array,
    each: Sequence[Any],
    *,
    scan: bool,
) -> Array:
    """Run ``x`` through one layer per entry of ``each``: ``x = call(layer, x, own)``.

    Args:
        make: returns the layer of a name, ``layer_0``, ``layer_1``, ... or ``layers`` for all.
        call: how to call a layer.
        x: input of the first layer.
        each: what each layer has for itself, numbers or None.
        scan: whether the layers are stacked.
    """
    if not scan:
        for i, own in enumerate(each):
            x = call(make(f"layer_{i}"), x, own)
        return x
    alike = len(set(each)) == 1  # then a constant is enough
    body = nn.scan(
        lambda layer, x, own: (call(layer, x, each[0] if alike else own), None),
        variable_axes={"params": 0, "cache": 0, "intermediates": 0},
        split_rngs={"params": True, "dropout": True},
        length=len(each),
    )
    return body(make("layers"), x, None if alike else jnp.asarray(each))[0]


def stacked(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested dicts with the leaves of ``layer_0``, ``layer_1``, ... stacked under ``layers``.

    Raises:
        ValueError: the layers differ in leaves or shapes.

    >>> stacked({"layer_0": {"w": jnp.ones(2)}, "layer_1": {"w": jnp.zeros(2)}})["layers"]["w"].tolist()
    [[1.0, 1.0], [0.0, 0.0]]
    """
    found: dict[str, Any] = {}
    parts: dict[str, dict[int, Array]] = {}
    for path, leaf in tree.flatten(leaves).items():
        if match := LAYER.fullmatch(path):
            parts.setdefault(f"{match[1]}layers/{match[3]}", {})[int(match[2])] = leaf
        else:
            found[path] = leaf
    counts: dict[str, int] = {}
    for path in parts:
        stack = path.split("layers/")[0]
        counts[stack] = max(counts.get(stack, 0), 1 + max(parts[path]))
    for path, own in parts.items():
        count = counts[path.split("layers/")[0]]
        shapes = {(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in own.values()}
        if len(own) != count or len(shapes) != 1:
            raise InputError(
                f"{path}: layers that are not alike cannot be stacked: {len(own)} of {count} have this leaf, of the "
                f"shapes {sorted(shape for shape, _ in shapes)}"
            )
        found[path] = jnp.stack([own[i] for i in range(count)])
    return tree.nest(found)


def unstacked(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of ``stacked``."""
    found: dict[str, Any] = {}
    for path, leaf in tree.flatten(leaves).items():
        if match := STACK.fullmatch(path):
            found |= {f"{match[1]}layer_{i}/{match[2]}": leaf[i] for i in range(len(leaf))}
        else:
            found[path] = leaf
    return tree.nest(found)


def stack(model: Model) -> Model:
    """Return ``model`` with stacked layers; a model that has them is returned unchanged.

    Raises:
        ValueError: the architecture has no stacked form, its layers differ, or the model has adapters.
    """
    return _switched(model, True, stacked)


def unstack(model: Model) -> Model:
    """Return ``model`` with separate leaves for each layer; a model that has them is returned unchanged.

    Raises:
        ValueError: the model has adapters.
    """
    return _switched(model, False, unstacked) if getattr(model.config, "scan_layers", False) else model


def _switched(model: Model, scan: bool, convert: Callable[[Mapping[str, Any]], dict[str, Any]]) -> Model:
    if not hasattr(model.config, "scan_layers"):
        kind = getattr(model.config, "model_type", type(model.base).__name__)
        raise InputError(f"the layers of {kind} cannot be stacked: its configuration has no scan_layers")
    if model.config.scan_layers == scan:
        return model
    if rest := [type(t).__name__ for t in model.techniques if not isinstance(t, Head | Cast)]:
        raise InputError(
            f"the model has {rest} in it, which name layers: merge them before, or insert them after"
        )
    variables = {name: convert(leaves) for name, leaves in model.variables.items()}
    return with_config(model.replace(variables=variables), scan_layers=scan)
