"""PKT (probabilistic knowledge transfer): matches the distributions of similarity between the examples of a batch.

Passalis and Tefas 2018, "Learning Deep Representations with Probabilistic Knowledge Transfer", ECCV 2018,
https://arxiv.org/abs/1803.10837.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from jtl import rows
from jtl.distill import term
from jtl.distill.term import Layers, row_weight
from jtl.model import Batch, Model, Outputs


def pkt(
    student: Float[Array, "B ..."], teacher: term.Teacher, weight: Float[Array, " B"] | None = None
) -> Float[Array, ""]:
    """The mean over rows i (the paper sums) of ``Σ_j p_t(j|i) log(p_t(j|i) / p_s(j|i))``, j ≠ i.

    ``p(j|i)`` is the affinity ``(cos(x_i, x_j) + 1) / 2`` over its sum over the other rows. Widths may differ. The
    authors' published code also counts j = i and averages over all pairs.

    Raises:
        ValueError: the numbers of rows differ.
    """
    term.same_rows("PKT", student, teacher)
    held = rows.pairs(weight, len(student)) > 0

    def log_conditional(x: Array) -> Array:
        x = rows.unit(rows.vectors(x))
        affinity = jnp.where(held, (x @ x.T + 1) / 2, 0.0)
        p = affinity / jnp.maximum(affinity.sum(1, keepdims=True), EPSILON)
        return jnp.log(jnp.where(held, jnp.maximum(p, EPSILON), 1.0))

    log_t, log_s = log_conditional(teacher), log_conditional(student)
    divergence = jnp.sum(jnp.where(held, jnp.exp(log_t) * (log_t - log_s), 0.0), 1)
    return rows.mean(divergence, weight)


EPSILON = 1e-7  # opposite rows have affinity 0


class PKT(Layers):
    """``pkt`` summed over pairs of layers; batches should be large, because it compares their rows with each other."""

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Returns the loss."""
        parts = [pkt(own, taught, row_weight(batch)) for own, taught in self.pairs(outputs, batch)]
        return sum(parts, jnp.zeros(())), {}
