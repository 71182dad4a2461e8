"""Averages of models: soups, interpolation between two models (WiSE-FT) and SLERP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jtl import tree
from jtl.merging.check import same
from jtl.model import Model


def uniform_soup(params: Sequence[PyTree]) -> PyTree:
    """The mean of all models' parameters.

    Wortsman et al. 2022, "Model soups: averaging weights of multiple fine-tuned models improves accuracy without
    increasing inference time", https://arxiv.org/abs/2203.05482. Fold adapters in first: see ``jtl.merging``.

    Raises:
        ValueError: there are no models, or their leaves differ.

    >>> uniform_soup([{"w": jnp.array(1.0)}, {"w": jnp.array(3.0)}])["w"].item()
    2.0
    """
    same(params)
    return tree.scale(1 / len(params), jax.tree.map(lambda *leaves: sum(leaves), *params))


def greedy_soup(
    params: Sequence[PyTree], score: Callable[[PyTree], float]
) -> tuple[PyTree, tuple[int, ...], float]:
    """The greedy soup: adds models, best first, unless that lowers the score (Wortsman et al. 2022, recipe 1).

    Args:
        params: the candidates.
        score: accuracy on *validation* data, higher is better; called at most ``2 len(params) - 1`` times.

    Returns:
        The soup, the indices of its ingredients in the order in which they were added, and its score.

    Raises:
        ValueError: there are no models, or their leaves differ.
    """
    same(params)
    alone = [score(own) for own in params]
    order = sorted(range(len(params)), key=lambda i: -alone[i])
    taken, best = [order[0]], alone[order[0]]
    for i in order[1:]:
        mixed = score(uniform_soup([params[j] for j in (*taken, i)]))
        if mixed >= best:
            taken, best = [*taken, i], mixed
    return uniform_soup([params[i] for i in taken]), tuple(taken), best


def wise_ft(start: Model, tuned: Model, weights: Float[Array, " K"], measure: Callable[[Model], Any]) -> Any:
    """Returns ``measure`` of K models on the line from ``start`` to ``tuned``, in one ``vmap``.

    The parameters are ``(1 - weight) start + weight tuned``. Wortsman et al. 2022, "Robust fine-tuning of zero-shot
    models", https://arxiv.org/abs/2109.01903, equation 1.

    Args:
        start: the model before fine-tuning, with the same leaves.
        tuned: the model after it.
        weights: such as ``jnp.linspace(0, 1, 11)``.
        measure: a pure function of a model, for example ``lambda model: model(batch)["logits"]``.

    Raises:
        ValueError: the leaves of the two differ.
    """
    same([start.params, tuned.params])
    at = lambda weight: measure(tuned.with_params(tree.interpolate(start.params, tuned.params, weight)))  # noqa: E731
    return jax.jit(jax.vmap(at))(weights)


def slerp(start: PyTree, end: PyTree, weight: float) -> PyTree:
    """Interpolates each leaf along the arc from ``start`` to ``end``.

    Shoemake 1985, "Animating rotation with quaternion curves":
    ``sin((1 - t) w) / sin(w) start + sin(t w) / sin(w) end`` with w the angle between the leaves as vectors. The
    interpolation is linear where they are nearly parallel or one is zero.

    Args:
        start: parameters at t = 0.
        end: parameters at t = 1.
        weight: t.

    Raises:
        ValueError: the leaves of the two differ.
    """
    same([start, end])

    def one(a: Array, b: Array) -> Array:
        lengths = jnp.linalg.norm(a.ravel()) * jnp.linalg.norm(b.ravel())
        cosine = jnp.vdot(a, b) / jnp.where(lengths > 0, lengths, 1)
        angle = jnp.arccos(jnp.clip(cosine, -1, 1))
        sine = jnp.sin(angle)
        curved = (lengths > 0) & (sine > 1e-4)
        safe = jnp.where(curved, sine, 1)
        first = jnp.where(curved, jnp.sin((1 - weight) * angle) / safe, 1 - weight)
        second = jnp.where(curved, jnp.sin(weight * angle) / safe, weight)
        return (first * a + second * b).astype(a.dtype)

    return jax.tree.map(one, start, end)
