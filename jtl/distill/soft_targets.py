"""Soft targets: the student matches the teacher's class probabilities at a raised temperature.

Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network", https://arxiv.org/abs/1503.02531.
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


def soft_targets(
    student_logits: Float[Array, "B C"],
    teacher_logits: term.Teacher,
    temperature: Any = 4.0,
    weight: Float[Array, " B"] | None = None,
) -> Float[Array, ""]:
    """The mean over rows of ``T² · KL(softmax(teacher / T) || softmax(student / T))``, in nats.

    The paper minimises the cross-entropy, which differs from the KL divergence by the teacher's entropy, a constant.
    T² keeps the size of the gradient as T changes (section 2).

    Args:
        student_logits: of B rows over C classes.
        teacher_logits: likewise.
        temperature: T.
        weight: of the rows; 0 for padding.

    Raises:
        ValueError: rows or classes differ.

    >>> round(float(soft_targets(jnp.array([[0.0, 0.0]]), jnp.array([[0.0, 2.0]]), temperature=2.0)), 4)
    0.4438
    """
    term.same_classes(student_logits, teacher_logits)
    student, teacher = (
        jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
        for logits in (student_logits, teacher_logits)
    )
    return jnp.square(temperature) * rows.mean(rows.kl(teacher, student), weight)


class SoftTargets(Term):
    """``soft_targets`` between the logits of student and teacher.

    Attributes:
        temperature: T.
    """

    temperature: Any = 4.0

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Returns the loss."""
        logits, taught = read(outputs, "logits"), self.taught(batch, "logits")
        return soft_targets(logits, taught, self.temperature, row_weight(batch)), {}
