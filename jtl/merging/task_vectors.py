"""Arithmetic with task vectors, which are what fine-tuning adds to a common start."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jtl import tree
from jtl.errors import InputError
from jtl.merging.check import same


def task_vector(start: PyTree, tuned: PyTree) -> PyTree:
    """Returns ``tuned - start``.

    Raises:
        ValueError: the leaves of the two differ.
    """
    same([start, tuned])
    return tree.sub(tuned, start)


def task_arithmetic(start: PyTree, tuned: Sequence[PyTree], weights: Sequence[float]) -> PyTree:
    """Computes ``start + sum of weight * (tuned - start)``: positive weights add abilities, negative ones remove them.

    Ilharco et al. 2023, "Editing models with task arithmetic", https://arxiv.org/abs/2212.04089.

    Args:
        start: the common start.
        tuned: models fine-tuned from it.
        weights: one for each.

    Raises:
        ValueError: there is not one weight for each model, or leaves differ.
    """
    if len(weights) != len(tuned):
        raise InputError(f"{len(tuned)} models need as many weights, got {len(weights)}")
    merged = start
    for own, weight in zip(tuned, weights, strict=True):
        merged = tree.add(merged, tree.scale(weight, task_vector(start, own)))
    return merged


def ties(start: PyTree, tuned: Sequence[PyTree], *, keep: float = 0.2, weight: float = 1.0) -> PyTree:
    """TIES: trims each task vector, elects a sign for each entry, and averages the entries that agree with it.

    Yadav et al. 2023, "TIES-Merging: Resolving Interference When Merging Models", https://arxiv.org/abs/2306.01708,
    algorithm 1. Trimming keeps the share ``keep`` of largest magnitude over the *whole* vector; the sign is that of
    the larger total.

    Args:
        start: the common start.
        tuned: models fine-tuned from it.
        keep: share of entries kept, above 0 and at most 1 (0.2 in the paper).
        weight: factor of the merged vector.

    Raises:
        ValueError: ``keep`` is out of range, or leaves differ.
    """
    if not 0 < keep <= 1:
        raise InputError(f"keep is a share over 0 and at most 1, got {keep}")
    vectors = [_trim(task_vector(start, own), keep) for own in tuned]

    def one(*parts: Array) -> Array:
        stack = jnp.stack(parts)
        sign = jnp.sign(stack.sum(0))
        agree = (jnp.sign(stack) == sign[None]) & (stack != 0)
        return jnp.where(agree, stack, 0).sum(0) / jnp.maximum(agree.sum(0), 1)

    same(vectors)
    return tree.add(start, tree.scale(weight, jax.tree.map(one, *vectors)))


def _trim(vector: PyTree, keep: float) -> PyTree:
    sizes = jnp.concatenate([jnp.abs(leaf).ravel() for leaf in jax.tree.leaves(vector)])
    count = max(1, round(keep * sizes.size))
    threshold = jax.lax.top_k(sizes, count)[0][-1]
    return jax.tree.map(lambda leaf: jnp.where(jnp.abs(leaf) >= threshold, leaf, 0), vector)


def dare(start: PyTree, tuned: PyTree, *, drop: float, key: Array) -> PyTree:
    """DARE: the tuned model with a random part of its task vector dropped and the rest rescaled.

    Each entry of the vector is zero with probability ``drop``, otherwise divided by ``1 - drop``. Merge the results
    with ``task_arithmetic`` or ``ties``. Yu et al. 2024, "Language Models are Super Mario: Absorbing Abilities from
    Homologous Models as a Free Lunch", https://arxiv.org/abs/2311.03099, equations 2 to 4.

    Args:
        start: the model before fine-tuning.
        tuned: the model after it.
        drop: the probability of dropping an entry, below 1.
        key: for the random choice.

    Raises:
        ValueError: ``drop`` is out of range, or leaves differ.
    """
    if not 0 <= drop < 1:
        raise InputError(f"drop is a probability below 1, got {drop}")

    def one(path: str, leaf: Array) -> Array:
        kept = jax.random.bernoulli(tree.fold_path(key, path), 1 - drop, leaf.shape)
        return jnp.where(kept, leaf / (1 - drop), 0)

    return tree.add(start, tree.map_with_path(one, task_vector(start, tuned)))
