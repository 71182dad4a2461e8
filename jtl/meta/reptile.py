"""Reptile: moves towards the parameters that a few steps on each task lead to; a first-order meta-gradient."""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array, PyTree

from jtl import tree
from jtl.meta.inner import Rate, TaskLoss, adapt
from jtl.meta.tasks import Graded, mean_over_tasks, query_of
from jtl.model import Batch


def reptile(
    *,
    steps: int,
    rate: Rate,
    labels: PyTree | None = None,
    minibatch: int | None = None,
    chunk: int | None = None,
) -> Any:
    """Reptile's gradient, θ − mean φ: with ``optax.sgd(ε)`` the step is θ ← θ + ε (mean φ − θ).

    Nichol, Achiam and Schulman 2018, "On First-Order Meta-Learning Algorithms", https://arxiv.org/abs/1803.02999,
    algorithm 2. Anneal ε to 0 by a schedule of that ``sgd``. The paper's inner optimiser is
    ``rate=optax.adam(1e-3, b1=0.0)``; here its second moments start afresh in each task, while the authors' code
    carries them from task to task.

    Only the support trains. Value and metrics are those of the query after adaptation and are only reported.

    Args:
        steps: inner steps.
        rate: of the inner loop: see ``adapt``. Learned rules cannot be trained this way, because they need a gradient.
        labels: which leaves adapt: see ``adapt``. Others do not change.
        minibatch: rows of the support that an inner step sees: see ``adapt``.
        chunk: tasks to run at a time; by default all.
    """

    def gradient(loss: TaskLoss, trained: PyTree, batch: Batch, key: Array) -> Graded:
        def graded(trained: PyTree, episode: Any, key: Array) -> Graded:
            inner_key, query_key = jax.random.split(key)
            adapted = adapt(
                loss, trained, episode["support"], inner_key,
                steps=steps, rate=rate, labels=labels, minibatch=minibatch,
            )  # fmt: skip
            return loss(adapted, query_of(episode), query_key), tree.sub(trained, adapted)

        return mean_over_tasks(graded, trained, batch, key, chunk)

    return gradient
