"""Mean teacher: agree with the running average of oneself.

Tarvainen and Valpola 2017, "Mean teachers are better role models", https://arxiv.org/abs/1703.01780; for domain
adaptation, on target rows: French, Mackiewicz and Fisher 2018, https://arxiv.org/abs/1706.05208.
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
    """``mean ||softmax(logits) - softmax(teacher)||²`` over rows; no gradient flows into the teacher."""
    q = jax.lax.stop_gradient(jax.nn.softmax(teacher_logits.astype(jnp.float32)))
    gaps = jnp.sum(jnp.square(jax.nn.softmax(logits.astype(jnp.float32)) - q), -1)
    return mean(gaps, jnp.ones(len(gaps)) if weight is None else weight)


class MeanTeacher(DomainLoss):
    """``consistency`` with the teacher of ``with_teacher`` on target rows."""

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The loss. Raises KeyError without a teacher or without ``batch["domain"]``."""
        target = domains(batch)[1]
        return consistency(layer(outputs, "logits"), layer(outputs, "teacher_logits"), target), {}
