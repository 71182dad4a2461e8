"""IRM: features on which one classifier is optimal in every domain at once, for domain generalisation.

Arjovsky et al. 2019, "Invariant Risk Minimization", https://arxiv.org/abs/1907.02893, in the form IRMv1.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from jtl.domain.loss import DomainLoss, column, domains, layer
from jtl.model import Batch, Model, Outputs
from jtl.rows import cross_entropy, mean


def irm_penalty(
    logits: Float[Array, "N C"], label: Int[Array, " N"], weight: Float[Array, " N"] | None = None
) -> Float[Array, ""]:
    """The IRMv1 penalty of one domain, ``(d/dw mean CE(w · logits, label))²`` at w = 1, over all its rows.

    (Some libraries multiply the gradients of two halves of the rows instead, an unbiased estimate that can be
    negative.)

    Args:
        logits: of the domain's rows.
        label: their classes.
        weight: of each row; 0 leaves it out.
    """
    weight = jnp.ones(len(logits)) if weight is None else weight
    risk = lambda w: mean(cross_entropy(w * logits.astype(jnp.float32), label), weight)  # noqa: E731
    return jnp.square(jax.grad(risk)(jnp.ones(())))


class IRM(DomainLoss):
    """The sum over domains of ``irm_penalty``, 0 for a domain without rows; add it to ``jtl.tasks.Classify()``.

    Attributes:
        domains: K; a batch's ``domain`` is 0 ... K - 1.
    """

    domains: int = struct.field(pytree_node=False, default=2)

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Returns the penalty.

        Raises:
            KeyError: ``batch["domain"]`` or ``batch["label"]`` is missing.
        """
        logits, label = layer(outputs, "logits"), column(batch, "label", "the class of each row")
        parts = [irm_penalty(logits, label, w) for w in domains(batch, self.domains)]
        return sum(parts, jnp.zeros(())), {}
