"""Tasks sharded over devices: each device runs its own tasks, as its own program."""

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
    """Returns ``gradient`` over each device's tasks, averaged over devices: the same function, in a faster program.

    For ``make_step(loss, optimizer, gradient=sharded(maml(steps=5, rate=0.4, chunk=1), mesh), mesh=mesh)``, where
    ``chunk`` is per device. Without this, a batch over devices needs a ``vmap`` over tasks, so that one program holds
    the kernels of every task. With it, a device can run one task after another, with plain products.

    Leaves sharded over the mesh are gathered first. Randomness, such as dropout, differs between devices. The gradient
    raises ValueError if the number of devices does not divide the number of tasks.

    Args:
        gradient: such as ``maml(...)``.
        mesh: of the devices.
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
            check_vma=False,  # otherwise gradients of shared arrays are already summed over devices
        )  # fmt: skip
        return run(trained, batch, key)

    return over_mesh


def _mean(x: Array) -> Array:
    """The mean over devices; an integer, such as a count in the state, stays an integer."""
    return jax.lax.pmean(x, AXIS) if jnp.issubdtype(x.dtype, jnp.inexact) else jax.lax.pmax(x, AXIS)
