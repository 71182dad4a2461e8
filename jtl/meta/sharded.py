"""Tasks over devices: each device runs its own tasks, as a program of its own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, PyTree

from jtl.errors import InputError
from jtl.meta.inner import TaskLoss
from jtl.meta.tasks import Graded, count
from jtl.model import Batch
from jtl.sharding import AXIS


def sharded(gradient: Any, mesh: Mesh) -> Any:
    """``gradient`` of the tasks of each device of ``mesh``, averaged over devices: the same function, a faster program.

    For ``make_step(loss, optimizer, gradient=sharded(maml(steps=5, rate=0.4, chunk=1), mesh), mesh=mesh)``. There
    ``chunk`` is of one device. Without this a batch over devices needs a ``vmap`` over tasks, so that each task has
    kernels of its own in one program; with it a device can run one task after another, by plain products.

    Leaves laid out over the mesh are gathered first. Randomness, such as dropout, is another on each device. Raises
    ValueError if the devices do not divide the tasks.
    """

    def over_mesh(loss: TaskLoss, trained: PyTree, batch: Batch, key: Array) -> Graded:
        tasks, devices = count(batch), mesh.shape[AXIS]
        if tasks % devices:
            raise InputError(
                f"the {devices} devices of the mesh do not divide the {tasks} tasks of the batch"
            )

        def on_device(trained: PyTree, batch: Batch, key: Array) -> Graded:
            own = jax.random.fold_in(key, jax.lax.axis_index(AXIS))
            return jax.tree.map(_mean, gradient(loss, trained, batch, own))

        replicated = PartitionSpec()
        run = jax.shard_map(
            on_device, mesh=mesh, in_specs=(replicated, PartitionSpec(AXIS), replicated), out_specs=replicated,
            check_vma=False,  # else gradients of what all devices share are summed over them already
        )  # fmt: skip
        return run(trained, batch, key)

    return over_mesh


def _mean(x: Array) -> Array:
    """Over devices; a count among the state stays an integer."""
    return jax.lax.pmean(x, AXIS) if jnp.issubdtype(x.dtype, jnp.inexact) else jax.lax.pmax(x, AXIS)
