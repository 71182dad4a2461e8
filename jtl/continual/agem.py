"""A-GEM: projects updates so that they do not increase the loss on remembered examples.

Chaudhry, Ranzato, Rohrbach and Elhoseiny 2019, "Efficient Lifelong Learning with A-GEM",
https://arxiv.org/abs/1812.00420, equations 10 and 11.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jtl import tree
from jtl.loss import Aux
from jtl.model import Batch


def agem(
    loss: Callable[..., Any], trained: PyTree, batch: Batch, key: Array
) -> tuple[tuple[Array, Aux], PyTree]:
    """The A-GEM gradient, for ``make_step(..., gradient=agem)``: g, or ``g - (g·r / r·r) r`` where g·r is negative.

    g is the gradient on the current rows, r that on remembered examples.

    Args:
        loss: ``(params, batch, key) -> (value, aux)``.
        trained: the trained parameters.
        batch: ``{"current": ..., "memory": ...}``, as ``Rehearse(..., apart=True)`` makes it.
        key: for both forwards.

    Returns:
        Value, metrics and updated state of the current rows, and the gradient. The metric ``projected`` is 1 where g
        was changed.
    """
    here, there = jax.random.split(key)
    graded = jax.value_and_grad(loss, has_aux=True)
    (value, aux), g = graded(trained, batch["current"], here)
    _, r = graded(trained, batch["memory"], there)
    along = tree.vdot(g, r)
    against = along < 0
    share = jnp.where(against, along / jnp.maximum(tree.vdot(r, r), jnp.finfo(jnp.float32).tiny), 0.0)
    metrics = {**aux.metrics, "projected": against.astype(jnp.float32)}
    return (value, aux._replace(metrics=metrics)), jax.tree.map(lambda g, r: g - share * r, g, r)
