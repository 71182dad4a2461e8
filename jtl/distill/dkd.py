"""DKD (decoupled knowledge distillation): soft targets split into a target-class and a non-target-class part.

Zhao et al. 2022, "Decoupled Knowledge Distillation", CVPR 2022, https://arxiv.org/abs/2203.08679.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jtl import rows
from jtl.distill import term
from jtl.distill.term import Term, read, row_weight
from jtl.model import Batch, Model, Outputs


def dkd_parts(
    student_logits: Float[Array, "B C"],
    teacher_logits: term.Teacher,
    label: Int[Array, " B"],
    temperature: Any = 4.0,
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Returns ``(TCKD, NCKD)`` of each row, in nats.

    TCKD is the KL divergence between the binary distributions (target, not target). NCKD is the KL divergence over the
    other classes, given that it is one of them. Both are at ``temperature``. ``KL = TCKD + (1 - p_t(label)) · NCKD``
    (the paper's equation 7). With two classes NCKD is 0. Rows with a label outside the classes are NaN.

    Args:
        student_logits: of B rows over C classes.
        teacher_logits: likewise.
        label: the class of each row.
        temperature: T.

    Raises:
        ValueError: rows or classes differ.
    """
    term.same_classes(student_logits, teacher_logits)
    classes = student_logits.shape[-1]
    target = jax.nn.one_hot(label, classes, dtype=bool)

    def split(logits: Array) -> tuple[Array, Array]:
        log_p = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
        others = jnp.where(target, -jnp.inf, log_p)
        hit = jnp.sum(jnp.where(target, log_p, 0.0), -1)
        return jnp.stack([hit, jax.nn.logsumexp(others, -1)], -1), jax.nn.log_softmax(others)

    (student, student_others), (teacher, teacher_others) = split(student_logits), split(teacher_logits)
    known = (label >= 0) & (label < classes)
    parts = rows.kl(teacher, student), rows.kl(teacher_others, student_others)
    return jnp.where(known, parts[0], jnp.nan), jnp.where(known, parts[1], jnp.nan)


def dkd(
    student_logits: Float[Array, "B C"],
    teacher_logits: term.Teacher,
    label: Int[Array, " B"],
    temperature: Any = 4.0,
    weight: Float[Array, " B"] | None = None,
    *,
    alpha: Any = 1.0,
    beta: Any = 8.0,
) -> Float[Array, ""]:
    """The mean over rows of ``T² · (alpha · TCKD + beta · NCKD)``: see ``dkd_parts`` for both and the other arguments.

    T² is that of soft targets. The paper also warms the weight of this loss up over the first 20 epochs, for which a
    schedule can be used.

    Args:
        student_logits: of B rows over C classes.
        teacher_logits: likewise.
        label: the class of each row.
        temperature: T.
        weight: of the rows.
        alpha: weight of TCKD.
        beta: weight of NCKD.

    Raises:
        ValueError: rows or classes differ.
    """
    target, others = dkd_parts(student_logits, teacher_logits, label, temperature)
    return jnp.square(temperature) * rows.mean(alpha * target + beta * others, weight)


class DKD(Term):
    """``dkd`` of the logits and ``batch["label"]``.

    Attributes:
        temperature: T.
        alpha: weight of the target-class part.
        beta: weight of the non-target-class part.
    """

    temperature: Any = 4.0
    alpha: Any = 1.0
    beta: Any = 8.0

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Returns the loss."""
        logits, taught, label = read(outputs, "logits"), self.taught(batch, "logits"), batch["label"]
        return dkd(
            logits, taught, label, self.temperature, row_weight(batch), alpha=self.alpha, beta=self.beta
        ), {}
