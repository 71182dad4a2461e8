"""Attention transfer: matches the spatial maps of activation energy of student and teacher.

Zagoruyko and Komodakis 2017, "Paying More Attention to Attention: Improving the Performance of Convolutional Neural
Networks via Attention Transfer", https://arxiv.org/abs/1612.03928.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from jtl import rows
from jtl.distill import term
from jtl.distill.term import Layers, row_weight
from jtl.errors import InputError
from jtl.model import Batch, Model, Outputs


def attention_map(activation: Float[Array, "B ... C"], power: float = 2.0) -> Float[Array, "B N"]:
    """Returns ``Σ_c |activation|^power`` at each of the N positions, each row scaled to Euclidean norm 1."""
    energy = jnp.sum(jnp.abs(activation.astype(jnp.float32)) ** power, -1)
    return rows.unit(rows.vectors(energy))


def attention_transfer(
    student: Float[Array, "B ... C"],
    teacher: term.Teacher,
    weight: Float[Array, " B"] | None = None,
    *,
    power: float = 2.0,
    squared: bool = False,
) -> Float[Array, ""]:
    """The mean over rows of ``½ ||Q_s / ||Q_s|| - Q_t / ||Q_t|| ||``, Q the map of activation (equation 2).

    Args:
        student: (B, H, W, C), (B, L, D), any positions between the first and the last axis.
        teacher: with the same positions; its last axis may differ.
        weight: of the rows.
        power: p of the map, ``Σ|A|^p``.
        squared: as in the authors' published code, the mean over positions of the squared difference, without ½.

    Raises:
        ValueError: rows or positions differ, or there are no positions.
    """
    if student.ndim < 3 or student.shape[:-1] != teacher.shape[:-1]:
        raise InputError(
            f"attention transfer compares positions: the student gives {student.shape}, the teacher {teacher.shape}; "
            "all axes but the last must agree, and there must be one between the first and the last"
        )
    difference = attention_map(student, power) - attention_map(teacher, power)
    if squared:
        return rows.mean(jnp.sum(jnp.square(difference), -1), weight) / math.prod(student.shape[1:-1])
    return 0.5 * rows.mean(rows.norm(difference)[:, 0], weight)


class AttentionTransfer(Layers):
    """``attention_transfer`` summed over pairs of layers.

    Right after a layer norm all positions have nearly the same energy, so there is nothing to transfer. In
    transformers, tap before it: ``encoder/layer_3/mlp``.

    Attributes:
        squared: see ``attention_transfer``.
    """

    squared: bool = struct.field(pytree_node=False, default=False)

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Returns the loss."""
        weight, total = row_weight(batch), jnp.zeros(())
        for own, taught in self.pairs(outputs, batch):
            total += attention_transfer(own, taught, weight, squared=self.squared)
        return total, {}
