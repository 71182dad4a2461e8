"""The blocks of a column that can have laterals, and the initial leaves of a lateral."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from jtl import trace, tree
from jtl.errors import InputError
from jtl.model import Inputs, Mode, Model
from jtl.progressive.columns import LAYERS


@dataclass
class Block:
    """A module of a column: the shapes of its input and output, and a detached copy if it is a layer."""

    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    layer: Any = None


def find(model: Model, where: str, batch: Inputs, number: int) -> dict[str, Block]:
    """Returns the blocks that ``where`` matches, in the order in which they start to run.

    Raises:
        ValueError: a block runs twice, or does not return a single array.
    """
    found: dict[str, Block] = {}

    def watcher(module: nn.Module, path: str, x: Any, call: Callable[[], Any]) -> Any:
        if not path or not re.fullmatch(where, path):
            return call()
        if path in found:
            raise InputError(f"block {path!r} of column {number} runs twice in a forward: choose others")
        found[path] = Block()
        y = call()
        if not isinstance(y, jax.Array):
            raise InputError(f"block {path!r} of column {number} gives no single array: choose its layers")
        layer = module.clone(parent=None, name=None) if isinstance(module, LAYERS) else None
        found[path] = Block(x.shape, y.shape, layer)
        return y

    trace.watch(watcher, lambda model, batch: model.run(batch, Mode())[0], model, batch)
    return found


def width_of(path: str, own: Block, source: dict[str, Block], number: int) -> int:
    """Returns the number of input features of a source column's block.

    Raises:
        ValueError: the column lacks the block, or has it over other positions than the new column.
    """
    if path not in source:
        near = tree.near_misses(path, source) or list(source)
        raise InputError(
            f"column {number} has no block {path!r}, which the new column has; near misses: {near}; choose "
            "blocks that all columns have"
        )
    theirs = source[path].inputs
    if theirs[:-1] != own.inputs[:-1]:
        raise InputError(
            f"block {path!r} takes {theirs} in column {number} and {own.inputs} in the new one: columns may differ in "
            "the last axis alone"
        )
    return theirs[-1]


def init(
    block: Block, path: str, widths: list[int], laterals: str, alpha: float, key: Array
) -> dict[str, Array]:
    """Returns the initial leaves of one lateral: α, V by LeCun's normal initialisation, and U = 0."""
    if laterals == "linear":
        return {"u": jnp.zeros(_shape_of_u(block, path, sum(widths)))}
    width = block.inputs[-1]
    v = jax.nn.initializers.lecun_normal()(key, (sum(widths), width))
    return {
        "alpha": jnp.full(len(widths), alpha, jnp.float32),
        "v": v,
        "u": jnp.zeros(_shape_of_u(block, path, width)),
    }


def _shape_of_u(block: Block, path: str, width: int) -> tuple[int, ...]:
    if block.layer is not None:
        layer = block.layer.clone(use_bias=False)
        x = jax.ShapeDtypeStruct((*block.inputs[:-1], width), jnp.float32)
        return jax.eval_shape(layer.init, jax.random.key(0), x)["params"]["kernel"].shape
    if block.inputs[:-1] != block.outputs[:-1]:
        raise InputError(
            f"block {path!r} makes {block.outputs} of {block.inputs}: a lateral around it would not fit; choose its "
            "layers"
        )
    return (width, block.outputs[-1])
