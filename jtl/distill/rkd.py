"""RKD (relational knowledge distillation): matches distances and angles between the examples of a batch.

Park, Kim, Lu and Cho 2019, "Relational Knowledge Distillation", CVPR 2019, https://arxiv.org/abs/1904.05068.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jtl import rows
from jtl.distill import term
from jtl.distill.term import Layers, row_weight
from jtl.model import Batch, Model, Outputs


def rkd_distance(
    student: Float[Array, "B ..."], teacher: term.Teacher, weight: Float[Array, " B"] | None = None
) -> Float[Array, ""]:
    """The Huber loss between distances of rows, each relative to the mean distance of its batch; mean over pairs i ≠ j.

    The paper sums over the pairs; the authors' published code averages over all B², including i = j.

    Raises:
        ValueError: the numbers of rows differ.
    """
    term.same_rows("RKD", student, teacher)
    pairs = rows.pairs(weight, len(student))

    def relative(x: Array) -> Array:
        distance = rows.norm(_differences(rows.vectors(x)))[..., 0]
        mean = rows.mean(distance, pairs)
        return distance / jnp.where(mean > 0, mean, 1.0)

    return rows.mean(rows.huber(relative(student) - relative(teacher)), pairs)


def rkd_angle(
    student: Float[Array, "B ..."], teacher: term.Teacher, weight: Float[Array, " B"] | None = None
) -> Float[Array, ""]:
    """The Huber loss between cosines of the angles at j of distinct rows i, j, k; the mean over triples.

    The paper sums over the triples; the authors' published code averages over all B³. Memory grows with B³.

    Raises:
        ValueError: the numbers of rows differ.
    """
    term.same_rows("RKD", student, teacher)
    count = len(student)
    pairs = rows.pairs(weight, count)
    ones = jnp.ones(count) if weight is None else weight
    # w_i w_j w_k at [j, i, k], where all are distinct.
    triples = ones[:, None, None] * ((pairs > 0)[:, :, None] & (pairs > 0)[:, None]) * pairs[None]

    def cosine(x: Array) -> Array:
        edges = rows.unit(_differences(rows.vectors(x)))  # [j, i]: from j to i
        return jnp.einsum("jid,jkd->jik", edges, edges)

    return rows.mean(rows.huber(cosine(student) - cosine(teacher)), triples)


def _differences(x: Float[Array, "B N"]) -> Float[Array, "B B N"]:
    """``x_i - x_j`` at [j, i]."""
    return x[None] - x[:, None]


class RKD(Layers):
    """``distance · rkd_distance + angle · rkd_angle``, summed over pairs of layers.

    Attributes:
        distance: weight of the distances, 25 in the paper's metric learning.
        angle: weight of the angles, 50 there.
    """

    distance: Any = 25.0
    angle: Any = 50.0

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Returns the loss, and its two parts as metrics."""
        weight, parts = row_weight(batch), {"rkd_distance": jnp.zeros(()), "rkd_angle": jnp.zeros(())}
        for own, taught in self.pairs(outputs, batch):
            parts["rkd_distance"] += rkd_distance(own, taught, weight)
            parts["rkd_angle"] += rkd_angle(own, taught, weight)
        return self.distance * parts["rkd_distance"] + self.angle * parts["rkd_angle"], parts
