"""One head per task on a shared body; each row's task selects its head."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array

from jtl import heads
from jtl.errors import MissingError
from jtl.model import Batch, Forward, Mode, Model, Outputs, State, Variables


@dataclass(frozen=True)
class TaskHeads:
    """The technique: selects, from ``logits`` (B, T · C) of all tasks' heads, those of ``batch["task"]`` (B,).

    The logits of all heads remain in ``outputs["task_logits"]`` (B, T, C).
    """

    tasks: int

    def wrap(self, forward: Forward) -> Forward:
        """Returns ``forward`` with the logits of each row's task."""

        def run(variables: Variables, batch: Batch, mode: Mode, key: Array | None) -> tuple[Outputs, State]:
            if "task" not in batch:
                raise MissingError(
                    f"a model with a head for each task reads batch['task'], (B,); it has {sorted(batch)}"
                )
            outputs, state = forward(variables, batch, mode, key)
            every = outputs["logits"].reshape(len(outputs["logits"]), self.tasks, -1)
            chosen = jnp.take_along_axis(every, batch["task"][:, None, None], 1)[:, 0]
            return {**outputs, "logits": chosen, "task_logits": every}, state

        return run


def task_heads(model: Model, tasks: int, classes: int, *, key: Array, on: str, width: int) -> Model:
    """Returns ``model`` with a linear head of C classes for each of T tasks on its output ``on`` (B, ``width``).

    A row's loss and gradient reach only the head of its own task. The leaves are those of one head of T · C classes.

    Args:
        model: the body.
        tasks: T.
        classes: C of each task.
        key: for the new leaves.
        on: the output that the heads read.
        width: its size.
    """
    wide = heads.classifier(model, tasks * classes, key=key, on=on, width=width)
    return wide.with_technique(TaskHeads(tasks), {})
