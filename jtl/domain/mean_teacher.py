"""Mean teacher: predictions on target rows should agree with those of a running average of the model.

Tarvainen and Valpola 2017, "Mean teachers are better role models: Weight-averaged consistency targets improve
semi-supervised deep learning results", https://arxiv.org/abs/1703.01780; for domain adaptation: French, Mackiewicz and
Fisher 2018, "Self-ensembling for visual domain adaptation", https://arxiv.org/abs/1706.05208.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jtl.domain.loss import DomainLoss, domains, layer
from jtl.model import Batch, Model, Outputs
from jtl.rows import mean


def consistency(
    logits: Float[Array, "M C"],
    teacher_logits: Float[Array, "M C"],
    weight: Float[Array, " M"] | None = None,
) -> Float[Array, ""]:
    """The mean over rows of ``||softmax(logits) - softmax(teacher)||²``; the teacher gets no gradient.

    Args:
        logits: the student's.
        teacher_logits: the teacher's.
        weight: of each row; 0 leaves it out.
    """
    q = jax.lax.stop_gradient(jax.nn.softmax(teacher_logits.astype(jnp.float32)))
    gaps = jnp.sum(jnp.square(jax.nn.softmax(logits.astype(jnp.float32)) - q), -1)
    return mean(gaps, jnp.ones(len(gaps)) if weight is None else weight)


class MeanTeacher(DomainLoss):
    """``consistency`` on target rows with the teacher of ``jtl.ema.with_teacher``."""

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Returns the loss.

        Raises:
            KeyError: the model has no teacher, or the batch no ``domain``.
        """
        target = domains(batch)[1]
        return consistency(layer(outputs, "logits"), layer(outputs, "teacher_logits"), target), {}
