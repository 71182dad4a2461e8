"""Which parameters and batch fields a function reads, from its traced program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.interpreters import partial_eval
from jaxtyping import PyTree

from jtl.model import Batch, Model


def reads(function: Callable[[Model, Batch], Any], model: Model, batch: Batch) -> tuple[PyTree, PyTree]:
    """Booleans like ``model.variables`` and like ``batch``: does any output of ``function(model, batch)`` depend on it?

    Nothing is computed: the function is traced and dead code removed.
    """
    closed = jax.make_jaxpr(function)(model, batch)
    _, used = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return jax.tree.unflatten(jax.tree.structure((model.variables, batch)), used)
