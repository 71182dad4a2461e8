"""Device meshes, and how parameters, optimiser state and batches are laid out on them.

One rule language covers data parallelism and full sharding: rules map parameter paths to a layout, which is a
``PartitionSpec``, ``REPLICATE``, or ``SHARD`` (split the largest axis that the mesh size divides).
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jtl import tree

AXIS = "data"
REPLICATE = PartitionSpec()
SHARD = "shard"

REPLICATED: tree.Rules = ((".*", REPLICATE),)
FULLY_SHARDED: tree.Rules = ((".*", SHARD),)


def make_mesh(devices: Any = None) -> Mesh:
    """Return a mesh of all devices (or of ``devices``) with the single axis ``"data"``."""
    return Mesh(np.asarray(jax.devices() if devices is None else devices).reshape(-1), (AXIS,))


def layout(shape: tuple[int, ...], rule: Any, mesh: Mesh) -> NamedSharding:
    """Return the sharding of a leaf of ``shape`` under a rule's value.

    ``SHARD`` replicates a leaf that has no axis divisible by the mesh size, such as small biases and scalars.
    """
    if rule != SHARD:
        return NamedSharding(mesh, rule)
    axes = [axis for axis, length in enumerate(shape) if length % mesh.shape[AXIS] == 0]
    if not axes:
        return replicated(mesh)
    widest = max(axes, key=lambda axis: shape[axis])
    return NamedSharding(
        mesh, PartitionSpec(*[AXIS if axis == widest else None for axis in range(len(shape))])
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the layout of arrays that every device holds whole."""
    return NamedSharding(mesh, REPLICATE)


def shardings(state: Any, mesh: Mesh, rules: tree.Rules) -> Any:
    """Return the sharding of every leaf of a train state.

    Optimiser state follows the parameter whose path is a suffix of its own and whose shape it has; the rest is
    replicated.

    Args:
        state: the train state.
        mesh: the devices.
        rules: from parameter paths to layouts.
    """
    params = tree.combine(state.trained, state.frozen.params) if state.frozen is not None else state.trained
    by_path = tree.flatten(tree.assign(rules, params))
    shapes = {path: leaf.shape for path, leaf in tree.flatten(params).items()}

    def of(path: str, leaf: Any) -> NamedSharding:
        names = path.split("/")
        for start in range(len(names)):
            name = "/".join(names[start:])
            if name in by_path and shapes[name] == leaf.shape:
                return layout(leaf.shape, by_path[name], mesh)
        return replicated(mesh)

    return tree.map_with_path(of, state)


def place(state: Any, mesh: Mesh, rules: tree.Rules) -> Any:
    """Lay out ``state`` on the mesh.

    Raises:
        RuleError: rules and parameters do not fit.
    """
    return put(state, shardings(state, mesh, rules))


def put(values: Any, layouts: Any) -> Any:
    """Return ``values`` laid out as ``layouts`` says (one for all, or one for each leaf), also over several processes.

    A typed key goes by its data: JAX does not place the key itself on devices of another process.
    """
    data = jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, values)
    placed = jax.device_put(data, layouts)
    return jax.tree.map(
        lambda x, y: jax.random.wrap_key_data(y, impl=jax.random.key_impl(x)) if _is_key(x) else y,
        values,
        placed,
    )


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def constrain(state: Any, mesh: Mesh | None, rules: tree.Rules) -> Any:
    """Inside a compiled step: keep ``state`` laid out as ``place`` did."""
    if mesh is None:
        return state
    return jax.lax.with_sharding_constraint(state, shardings(state, mesh, rules))


def described(values: Any, layouts: Any) -> Any:
    """Return the shapes of ``values`` with their layouts, from which a step compiles without any array."""
    shape = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
    return jax.tree.map(shape, values, layouts)


def rows(mesh: Mesh) -> NamedSharding:
    """Return the layout of a batch: its rows split over the mesh."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def shard_batch(batch: PyTree, mesh: Mesh | None) -> PyTree:
    """Inside a compiled step: split the rows of ``batch`` over the mesh."""
    return batch if mesh is None else jax.lax.with_sharding_constraint(batch, rows(mesh))


def global_batch(batch: PyTree, mesh: Mesh | None) -> PyTree:
    """Return this process's rows as part of arrays over the whole mesh; all processes together hold the batch."""
    if mesh is None:
        return batch
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows(mesh), np.asarray(x)), batch)
