"""Batches of tasks: an episode is ``{"support": batch, "query": batch}``; a batch of tasks adds a leading axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jtl import tree
from jtl.errors import InputError
from jtl.loss import Aux
from jtl.model import Batch

Graded = tuple[tuple[Array, Aux], PyTree]


def mean_over_tasks(
    one: Callable[[PyTree, Any, Array], Graded], trained: PyTree, batch: Batch, key: Array, chunk: int | None
) -> Graded:
    """Returns the mean over tasks of ``one(trained, episode, key) -> ((value, aux), gradients)``.

    It adds the metric ``diverged``: the share of tasks whose value is not finite.

    Args:
        one: value, metrics and gradients of one task.
        trained: the trained parameters.
        batch: of tasks.
        key: split between tasks.
        chunk: tasks to run at a time; by default all.

    Raises:
        ValueError: the batch is not a batch of episodes, or ``chunk`` does not divide its number of tasks.
    """
    tasks = count(batch)
    chunk = tasks if chunk is None else chunk
    if chunk < 1 or tasks % chunk:
        raise InputError(f"chunk={chunk} does not divide the {tasks} tasks of the batch")

    def graded(episode: Any, key: Array) -> Graded:
        (value, aux), gradients = one(trained, episode, key)
        metrics = {**aux.metrics, "loss": value, "diverged": 1.0 - jnp.isfinite(value)}
        return (value, Aux(metrics, aux.state)), gradients

    def some(part: Any) -> Graded:
        return graded(*_first(part)) if chunk == 1 else _sum(jax.vmap(graded)(*part))

    # Task i goes to chunk i % (tasks / chunk), so that every device of a sharded batch keeps its own.
    split = lambda x: x.reshape(chunk, tasks // chunk, *x.shape[1:]).swapaxes(0, 1)  # noqa: E731
    parts = jax.tree.map(split, (batch, jax.random.split(key, tasks)))
    if chunk == tasks:
        total = some(_first(parts))
    else:
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(some, _first(parts)))
        total, _ = jax.lax.scan(lambda total, part: (tree.add(total, some(part)), None), zero, parts)
    # An integer, such as a count in the state, stays an integer.
    return jax.tree.map(lambda x: (x / tasks).astype(x.dtype), total)


def _first(values: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x[0], values)


def _sum(values: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.sum(x, 0, dtype=x.dtype), values)


def count(batch: Batch) -> int:
    """Returns the number of tasks.

    Raises:
        ValueError: the batch is not ``{"support": ..., "query": ...}`` with equally many tasks in all leaves.
    """
    if not isinstance(batch, Mapping) or not {"support", "query"} <= set(batch):
        found = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise InputError(
            f"a batch of tasks has 'support' and 'query', each with a leading axis of tasks (see "
            f"jtl.data.episodes); found {found}"
        )
    sizes = {path: jnp.shape(leaf)[:1] for path, leaf in tree.flatten(batch).items()}
    if len(set(sizes.values())) != 1 or () in sizes.values():
        raise InputError(f"the leaves of a batch of tasks share their first axis; found {sizes}")
    return next(iter(sizes.values()))[0]


def query_of(episode: Mapping[str, Any]) -> Any:
    """Returns the query batch with the support added, by which a loss may normalise (``SupportStats``)."""
    query = episode["query"]
    return {**query, "support": episode["support"]} if isinstance(query, Mapping) else query
