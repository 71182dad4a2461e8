"""A training loop with batches drawn on the device: many updates are one compiled call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jtl.errors import Diverged
from jtl.model import Batch, Model
from jtl.train import Step


def train(
    step: Step,
    model: Model,
    draw: Callable[[Any, jax.Array], Batch],
    source: Any,
    key: jax.Array,
    *,
    updates: int,
    block: int,
    report: int,
) -> tuple[Model, list[dict[str, float]]]:
    """The model after ``updates`` updates, and its metrics by block.

    Args:
        step: a compiled train step.
        model: where it starts.
        draw: ``(source, key) -> batch``, as a part of the program.
        source: what batches are drawn from: arrays that the program takes as arguments; or None.
        key: decides every batch; the update's number is folded in.
        updates: a multiple of ``block``.
        block: updates of one call of the program.
        report: updates after which a line is printed.

    Raises:
        Diverged: the loss of a block is not finite.
    """
    state = step.init(model, key)
    frozen = state.frozen

    @jax.jit
    def run(state: Any, frozen: Any, loss: Any, source: Any) -> Any:
        def one(state: Any, _: None) -> Any:
            batch = draw(source, jax.random.fold_in(key, state.step))
            return step.update(state, frozen, loss, batch)

        return jax.lax.scan(one, state, None, length=block)

    state, curve = state.replace(frozen=None), []
    for done in range(block, updates + 1, block):
        state, metrics = run(state, frozen, step.loss_leaves, source)
        means = {name: float(np.mean(values)) for name, values in metrics.items()}
        if not np.isfinite(means["loss"]):
            raise Diverged(
                f"the loss of updates {done - block + 1} to {done} is {means['loss']}: lower the rates"
            )
        curve.append({"step": done, **means})
        if done % report < block:
            shown = "  ".join(f"{name} {means[name]:.3f}" for name in ("loss", "accuracy") if name in means)
            print(f"update {done:,} of {updates:,}: {shown}", flush=True)
    return state.replace(frozen=frozen).model, curve
