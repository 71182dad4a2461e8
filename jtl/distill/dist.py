"""DIST: matches the correlations of predicted probabilities instead of their values, for strong teachers.

Huang et al. 2022, "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022, https://arxiv.org/abs/2205.10536.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jtl import rows
from jtl.distill import term
from jtl.distill.term import Term, read, row_weight
from jtl.model import Batch, Model, Outputs


def pearson(
    x: Float[Array, "*N C"], y: Float[Array, "*N C"], weight: Float[Array, "*N C"] | None = None
) -> Float[Array, "*N"]:
    """Pearson's correlation over the last axis, 0 where a side is constant."""
    weight = jnp.ones_like(x) if weight is None else weight
    total = weight.sum(-1, keepdims=True)
    total = jnp.where(total > 0, total, 1.0)
    x, y = (jnp.sqrt(weight) * (v - jnp.sum(weight * v, -1, keepdims=True) / total) for v in (x, y))
    return jnp.sum(rows.unit(x) * rows.unit(y), -1)


def dist(
    student_logits: Float[Array, "B C"],
    teacher_logits: term.Teacher,
    temperature: Any = 1.0,
    weight: Float[Array, " B"] | None = None,
    *,
    beta: Any = 1.0,
    gamma: Any = 1.0,
) -> Float[Array, ""]:
    """Computes ``T² · (beta · inter + gamma · intra)``, parts that are one minus the mean Pearson correlation.

    ``inter`` correlates the probabilities of the classes of a row, ``intra`` those of the rows of a class. T² is that
    of the authors' published code. With two classes every ``inter`` correlation is 1 or -1 and has no gradient.

    Args:
        student_logits: of B rows over C classes.
        teacher_logits: likewise.
        temperature: T.
        weight: of the rows.
        beta: weight of ``inter``.
        gamma: weight of ``intra``.

    Raises:
        ValueError: rows or classes differ.
    """
    term.same_classes(student_logits, teacher_logits)
    student, teacher = (
        jax.nn.softmax(logits.astype(jnp.float32) / temperature)
        for logits in (student_logits, teacher_logits)
    )
    of_rows = None if weight is None else jnp.broadcast_to(weight[None], student.T.shape)
    inter = rows.mean(1 - pearson(student, teacher), weight)
    intra = jnp.mean(1 - pearson(student.T, teacher.T, of_rows))
    return jnp.square(temperature) * (beta * inter + gamma * intra)


class DIST(Term):
    """``dist`` of the logits.

    Attributes:
        temperature: T.
        beta: weight of the correlations within a row.
        gamma: weight of the correlations within a class.
    """

    temperature: Any = 1.0
    beta: Any = 1.0
    gamma: Any = 1.0

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Returns the loss."""
        logits, taught = read(outputs, "logits"), self.taught(batch, "logits")
        return dist(logits, taught, self.temperature, row_weight(batch), beta=self.beta, gamma=self.gamma), {}
