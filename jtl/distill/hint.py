"""Hints (FitNets): the student regresses activations of the teacher's hidden layers.

Romero et al. 2015, "FitNets: Hints for Thin Deep Nets", https://arxiv.org/abs/1412.6550, equation 3.
"""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from jtl import rows
from jtl.distill import term
from jtl.distill.term import Layers, row_weight, token_mask
from jtl.model import Batch, Model, Outputs


def hint(
    student: Float[Array, "B ..."],
    teacher: term.Teacher,
    weight: Float[Array, "*W"] | None = None,
    *,
    over_units: Literal["sum", "mean"] = "sum",
) -> Float[Array, ""]:
    """The mean over rows of ``½ ||teacher - student||²``.

    Args:
        student: its guided layer, behind a ``regressor`` where its width differs.
        teacher: its hint layer, of the same shape.
        weight: (B,), or (B, L) for sequences (B, L, D), whose tokens then count as rows.
        over_units: ``"sum"`` is the paper's norm, which is large for large layers; ``"mean"`` divides it by the number
            of units of a row.

    Raises:
        ValueError: the shapes differ.

    >>> float(hint(jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 5.0]])))
    4.5
    """
    term.same("hint", student, teacher, "put a regressor to the teacher's shape on the student's layer")
    squares = 0.5 * jnp.square(teacher.astype(jnp.float32) - student.astype(jnp.float32))
    axes = tuple(range(1 if weight is None else weight.ndim, student.ndim))
    errors = jnp.sum(squares, axes) if over_units == "sum" else jnp.mean(squares, axes)
    return rows.mean(errors, weight)


class Hint(Layers):
    """``hint`` between layers of the student (or their regressors) and of the teacher, summed over pairs.

    The paper first trains only the layers below the hint with it, then all layers with soft targets: two runs, the
    first with the labels of ``train_only``. In token sequences with an ``attention_mask`` each real token counts as a
    row.

    Attributes:
        over_units: ``"sum"`` (the paper's) or ``"mean"``.
    """

    over_units: Literal["sum", "mean"] = struct.field(pytree_node=False, default="sum")

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Returns the loss."""
        total = jnp.zeros(())
        for guided, taught in self.pairs(outputs, batch):
            tokens = token_mask(batch, guided.shape)
            weight = row_weight(batch) if tokens is None else tokens
            total += hint(guided, taught, weight, over_units=self.over_units)
        return total, {}
