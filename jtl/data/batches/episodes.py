"""Episodes for meta-learning: many small tasks as one batch of fixed shapes, sampled on the device from a key.

A batch is ``{"support": {...}, "query": {...}}``; every array has a leading axis of tasks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from jtl.data.dataset import DataError

Episodes = dict[str, dict[str, Array]]


class Pool(struct.PyTreeNode):
    """The examples of some classes, ready to sample episodes from.

    Attributes:
        arrays: fields of the examples, with a leading axis of rows.
        rows: the rows of each class, padded with 0, (C, size of the largest class).
        sizes: the number of rows of each class, (C,).
        classes: their labels in the data set.
        smallest: the size of the smallest class.
    """

    arrays: dict[str, Array]
    rows: Int[Array, "C M"]
    sizes: Int[Array, " C"]
    classes: tuple[int, ...] = struct.field(pytree_node=False)
    smallest: int = struct.field(pytree_node=False)


def pool(
    arrays: Mapping[str, Any], label: Int[np.ndarray, " N"] | Int[Array, " N"], classes: Iterable[int]
) -> Pool:
    """Returns the examples of ``classes`` as a ``Pool``.

    Args:
        arrays: fields by name, each with N rows; ``label`` may be left out.
        label: the class of each row.
        classes: the labels to sample from.

    Raises:
        DataError: a class is named twice or has no example, or an array does not have N rows.
    """
    known, chosen = np.asarray(label), tuple(int(one) for one in classes)
    if not chosen or len(set(chosen)) < len(chosen):
        raise DataError(f"classes must be different labels, at least one; got {sorted(chosen)[:20]}")
    for name, array in arrays.items():
        if np.shape(array)[:1] != known.shape:
            raise DataError(f"array {name!r} has shape {np.shape(array)}, and there are {len(known)} labels")
    members = [np.flatnonzero(known == one) for one in chosen]
    if empty := [one for one, rows in zip(chosen, members, strict=True) if not len(rows)]:
        raise DataError(f"no example has label {empty[:5]}; the labels are {np.unique(known).tolist()[:20]}")
    sizes = np.array([len(rows) for rows in members], np.int32)
    table = np.zeros((len(chosen), sizes.max()), np.int32)
    for i, rows in enumerate(members):
        table[i, : len(rows)] = rows
    fields = {name: jnp.asarray(array) for name, array in arrays.items() if name != "label"}
    return Pool(fields, jnp.asarray(table), jnp.asarray(sizes), chosen, int(sizes.min()))


def pools(
    arrays: Mapping[str, Any],
    label: Int[np.ndarray, " N"] | Int[Array, " N"],
    splits: Mapping[str, Iterable[int]],
) -> dict[str, Pool]:
    """Returns a pool for each split of classes, given as ``{"train": classes, "test": other classes}``.

    Args:
        arrays: as for ``pool``.
        label: the class of each row.
        splits: the labels of each split.

    Raises:
        DataError: two splits share a class, or as for ``pool``.
    """
    chosen = {name: tuple(int(one) for one in classes) for name, classes in splits.items()}
    names = list(chosen)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            if both := sorted(set(chosen[first]) & set(chosen[second])):
                raise DataError(
                    f"splits {first!r} and {second!r} share the classes {both[:10]}: a few-shot result on classes that "
                    "were trained on means nothing"
                )
    return {name: pool(arrays, label, classes) for name, classes in chosen.items()}


@partial(jax.jit, static_argnames=("tasks", "ways", "shots", "queries"))
def sample(pool: Pool, key: Array, *, tasks: int, ways: int, shots: int, queries: int) -> Episodes:
    """Samples ``tasks`` episodes of N-way K-shot classification.

    Each samples ``ways`` classes, and ``shots + queries`` rows of each without replacement. Rows are ordered by class;
    their ``label`` is 0 ... ways − 1, in random order of the classes.

    Args:
        pool: the examples.
        key: the only source of randomness.
        tasks: T.
        ways: N, number of classes per task.
        shots: K, support rows per class: the support's fields are (T, N · K, ...).
        queries: query rows per class.

    Raises:
        DataError: an argument is below 1, there are more ways than classes, or the smallest class has fewer rows than
            shots and queries.
    """
    if min(tasks, ways, shots, queries) < 1:
        raise DataError(
            f"tasks, ways, shots and queries must be at least 1: {tasks}, {ways}, {shots}, {queries}"
        )
    if ways > len(pool.classes):
        raise DataError(f"{ways} ways, but only {len(pool.classes)} classes to draw from: ask for fewer ways")
    if shots + queries > pool.smallest:
        raise DataError(
            f"{shots} shots and {queries} queries a class, but the smallest class has {pool.smallest} examples: ask "
            "for fewer, or leave that class out"
        )

    def rows(key: Array) -> Int[Array, "N K"]:
        first, second = jax.random.split(key)
        chosen = jax.random.permutation(first, len(pool.classes))[:ways]
        order = jax.random.uniform(second, (ways, pool.rows.shape[1]))
        real = jnp.arange(pool.rows.shape[1])[None] < pool.sizes[chosen][:, None]
        places = jnp.argsort(jnp.where(real, order, 2.0), 1)[:, : shots + queries]
        return jnp.take_along_axis(pool.rows[chosen], places, 1)

    drawn = jax.vmap(rows)(jax.random.split(key, tasks))

    def part(rows: Int[Array, "T N K"]) -> dict[str, Array]:
        label = jnp.repeat(jnp.arange(ways), rows.shape[-1])
        flat = rows.reshape(tasks, -1)
        fields = {name: array[flat] for name, array in pool.arrays.items()}
        return {**fields, "label": jnp.broadcast_to(label[None], flat.shape)}

    return {"support": part(drawn[..., :shots]), "query": part(drawn[..., shots:])}


@partial(jax.jit, static_argnames=("tasks", "shots", "queries"))
def sinusoids(key: Array, *, tasks: int, shots: int, queries: int) -> Episodes:
    """Samples regression tasks y = A sin(x − φ): A uniform in [0.1, 5], φ in [0, π], x in [−5, 5].

    Finn et al. 2017, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks",
    https://arxiv.org/abs/1703.03400, section 5.1; the sign of φ is that of the authors' code. Fields ``x`` and ``y``,
    (T, K, 1).
    """
    keys = jax.random.split(key, 3)
    amplitude = jax.random.uniform(keys[0], (tasks, 1, 1), minval=0.1, maxval=5.0)
    phase = jax.random.uniform(keys[1], (tasks, 1, 1), minval=0.0, maxval=jnp.pi)
    x = jax.random.uniform(keys[2], (tasks, shots + queries, 1), minval=-5.0, maxval=5.0)
    y: Float[Array, "T K 1"] = amplitude * jnp.sin(x - phase)
    both = {"x": x, "y": y}
    return {
        "support": {name: array[:, :shots] for name, array in both.items()},
        "query": {name: array[:, shots:] for name, array in both.items()},
    }
