"""Similarity-preserving distillation: matches the pairwise similarities of the examples of a batch.

Tung and Mori 2019, "Similarity-Preserving Knowledge Distillation", ICCV 2019, https://arxiv.org/abs/1907.09682.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from jtl import rows
from jtl.distill import term
from jtl.distill.term import Layers, row_weight
from jtl.model import Batch, Model, Outputs


def similarity(
    student: Float[Array, "B ..."], teacher: term.Teacher, weight: Float[Array, " B"] | None = None
) -> Float[Array, ""]:
    """Computes ``||G_t - G_s||² / B²`` (Frobenius), G the B x B inner products of rows, each row of G scaled to norm 1.

    Rows of weight 0 are left out of G. Widths may differ.

    Raises:
        ValueError: the numbers of rows differ.
    """
    term.same_rows("similarity", student, teacher)
    weight = jnp.ones(len(student)) if weight is None else weight
    real = (weight > 0).astype(jnp.float32)

    def gram(x: Array) -> Array:
        x = rows.vectors(x) * real[:, None]
        return rows.unit(x @ x.T)

    squares = jnp.square(gram(teacher) - gram(student))
    return rows.mean(squares, weight[:, None] * weight[None])


class Similarity(Layers):
    """``similarity`` summed over pairs of layers. It compares the rows of a batch with each other."""

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Returns the loss."""
        parts = [similarity(own, taught, row_weight(batch)) for own, taught in self.pairs(outputs, batch)]
        return sum(parts, jnp.zeros(())), {}
