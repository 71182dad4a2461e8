"""Adaptation curves: the metrics of every task before the inner loop and after each of its steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jtl.errors import Diverged
from jtl.loss import Aux
from jtl.meta.inner import Rate, trajectory
from jtl.meta.tasks import count, query_of
from jtl.model import Batch, Model

Curves = dict[str, Float[np.ndarray, "T K"]]


def make_evaluate(
    loss: Callable[[Model, Batch, Array], tuple[Array, Aux]],
    *,
    steps: int,
    rate: Rate,
    labels: PyTree | None = None,
    minibatch: int | None = None,
    chunk: int | None = None,
) -> Callable[[Model, Batch, Array], Curves]:
    """Makes a function ``(model, episodes, key)`` that returns the query metrics of each task after each inner step.

    Each metric is an array (tasks, steps + 1), step 0 first. The function is one ``jit``, which compiles once for each
    shape of episodes, and raises ``Diverged`` if a loss is not finite: lower the rate. Report means and intervals over
    *tasks*, by convention at least 600. For a metric learner use ``loss.tasks(model, episodes)`` instead.

    Args:
        loss: as in ``jtl.train.make_step``; its normalisation applies to the evaluation.
        steps: inner steps.
        rate: of the inner loop: see ``adapt``.
        labels: which leaves adapt: see ``adapt``; by default all parameters do.
        minibatch: see ``adapt``.
        chunk: tasks to run at a time; by default all.
    """

    def task(loss: Any, model: Model, episode: Any, key: Array) -> dict[str, Array]:
        inner_key, query_key = jax.random.split(key)
        query = query_of(episode)

        def on(params: PyTree, batch: Batch, key: Array) -> tuple[Array, Aux]:
            return loss(model.with_params(params), batch, key)

        def after(params: PyTree) -> dict[str, Array]:
            value, aux = on(params, query, query_key)
            return {**aux.metrics, "loss": value}

        found = trajectory(
            on, model.params, episode["support"], inner_key, observe=after,
            steps=steps, rate=rate, labels=labels, minibatch=minibatch,
        ).observed  # fmt: skip
        return jax.tree.map(
            lambda first, rest: jnp.concatenate([jnp.asarray(first)[None], rest]), after(model.params), found
        )

    # A jtl loss is a pytree, passed as an argument so that its leaves are not constants; a plain function is static.
    plain = jax.tree_util.all_leaves([loss])

    @jax.jit
    def run(leaves: Any, model: Model, episodes: Batch, key: Array) -> dict[str, Array]:
        one = lambda part: task(loss if plain else leaves, model, *part)  # noqa: E731
        tasks = count(episodes)
        return jax.lax.map(one, (episodes, jax.random.split(key, tasks)), batch_size=chunk or tasks)

    def evaluate(model: Model, episodes: Batch, key: Array) -> Curves:
        curves = {
            name: np.asarray(x) for name, x in run(None if plain else loss, model, episodes, key).items()
        }
        bad = ~np.isfinite(curves["loss"])
        if bad.any():
            step = int(np.argmax(bad.any(0)))
            raise Diverged(
                f"the query loss of {int(bad.any(1).sum())} of {len(bad)} tasks is not finite, first after inner step "
                f"{step}: lower the inner rate ({rate!r})"
            )
        return curves

    return evaluate
