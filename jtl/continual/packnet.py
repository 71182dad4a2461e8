"""PackNet: one network whose weights are divided among tasks by pruning and retraining.

Each task trains the weights that are still free. Then the smallest of them are pruned, and the rest train on without
them; they belong to the task and never change again. Mallya and Lazebnik 2018, "PackNet: Adding Multiple Tasks to a
Single Network by Iterative Pruning", https://arxiv.org/abs/1711.05769.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jtl import tree
from jtl.errors import InputError
from jtl.model import Batch, Forward, Mode, Model, Outputs, State, Variables

LEAVES = "packnet"


@dataclass(frozen=True)
class Packed:
    """The technique: uses the weights of this task and, as constants, those of earlier tasks; all others count as 0.

    ``variables["packnet"]`` holds the number of the ``task`` and the ``owner`` of each entry, 0 for none.
    """

    def wrap(self, forward: Forward) -> Forward:
        """Returns ``forward`` with the weights of the task."""

        def run(variables: Variables, batch: Batch, mode: Mode, key: Array | None) -> tuple[Outputs, State]:
            task, owners = variables[LEAVES]["task"], tree.flatten(variables[LEAVES]["owner"])

            def dealt(path: str, w: Array) -> Array:
                if path not in owners:
                    return w
                owner = owners[path]
                fixed = jnp.where((0 < owner) & (owner < task), jax.lax.stop_gradient(w), 0)
                return jnp.where(owner == task, w, fixed)

            others = {name: leaves for name, leaves in variables.items() if name != LEAVES}
            params = tree.map_with_path(dealt, variables["params"])
            return forward({**others, "params": params}, batch, mode, key)

        return run


def pack(model: Model, where: str) -> Model:
    """Returns ``model`` whose weights at the paths that match ``where`` all belong to task 1.

    Train it with an optimiser without weight decay, which would also change the weights of other tasks. What ``where``
    leaves out (except heads) should only train with task 1: the paper freezes biases and norms after it.

    Raises:
        RuleError: no path matches.
    """
    chosen, _ = tree.partition(model.params, tree.matches(where, model.params))
    owner = tree.nest({path: jnp.ones(leaf.shape, jnp.int32) for path, leaf in tree.flatten(chosen).items()})
    packed = {LEAVES: {"owner": owner, "task": jnp.int32(1)}}
    return model.replace(variables={**model.variables, **packed}).with_technique(Packed(), {})


def prune(model: Model, keep: float) -> Model:
    """Frees the smallest weights of the current task and sets them to 0; in each leaf it keeps the share ``keep``.

    Train on after this, then call ``next_task``.

    Raises:
        ValueError: ``keep`` is not in (0, 1].
    """
    if not 0 < keep <= 1:
        raise InputError(f"keep is the share of a task's weights that stays, in (0, 1]; got {keep}")
    task, owners = model.variables[LEAVES]["task"], tree.flatten(model.variables[LEAVES]["owner"])
    params = tree.flatten(model.params)
    for path, owner in owners.items():
        mine = owner == task
        size = jnp.where(mine, jnp.abs(params[path]), -1).ravel()
        count = jnp.round(keep * mine.sum()).astype(jnp.int32)
        rank = jnp.argsort(jnp.argsort(-size)).reshape(owner.shape)
        free = mine & (rank >= count)
        owners[path] = jnp.where(free, 0, owner)
        params[path] = jnp.where(free, 0, params[path])
    return _with(model.with_params(tree.nest(params)), task, tree.nest(owners))


def next_task(model: Model) -> Model:
    """Gives the free weights to one more task, which trains them from 0."""
    task = model.variables[LEAVES]["task"] + 1
    owner = jax.tree.map(lambda own: jnp.where(own == 0, task, own), model.variables[LEAVES]["owner"])
    return _with(model, task, owner)


def select(model: Model, task: int) -> Model:
    """Returns the model of one task, counted from 1; its outputs are bitwise the same whatever later tasks train.

    Raises:
        ValueError: there is no such task yet.
    """
    last = max(int(own.max()) for own in jax.tree.leaves(model.variables[LEAVES]["owner"]))
    if not 1 <= task <= last:
        raise InputError(f"no weight belongs to task {task}: there are tasks 1 to {last}")
    return _with(model, jnp.int32(task), model.variables[LEAVES]["owner"])


def _with(model: Model, task: Array, owner: dict) -> Model:
    return model.replace(variables={**model.variables, LEAVES: {"owner": owner, "task": task}})
