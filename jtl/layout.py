"""How leaves lie on a device mesh, by rules.

One rule language serves data parallelism and full sharding: rules map parameter paths to a layout, which is a
``PartitionSpec``, ``REPLICATE``, or ``SHARD`` (split the largest axis that the mesh divides).
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jtl import tree

AXIS = "data"
REPLICATE = PartitionSpec()
SHARD = "shard"

REPLICATED: tree.Rules = ((".*", REPLICATE),)
FULLY_SHARDED: tree.Rules = ((".*", SHARD),)


def make_mesh(devices: Any = None) -> Mesh:
    """A mesh of all devices (or ``devices``) on the one axis ``"data"``."""
    return Mesh(np.asarray(jax.devices() if devices is None else devices).reshape(-1), (AXIS,))


def layout(shape: tuple[int, ...], rule: Any, mesh: Mesh) -> NamedSharding:
    """The sharding of a leaf of ``shape`` under a rule's value.

    ``SHARD`` replicates a leaf without an axis that the mesh divides: biases and scalars stay whole.
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
    """The layout of what every device holds whole."""
    return NamedSharding(mesh, REPLICATE)
