"""IRM: one classifier that is optimal in every domain at once.

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
    """``(d/dw mean CE(w · logits, label))²`` at w = 1, of one domain, over all its rows.

    (Some libraries multiply the gradients of two halves of the rows, an unbiased estimate that can be below 0.)
    """
    weight = jnp.ones(len(logits)) if weight is None else weight
    risk = lambda w: mean(cross_entropy(w * logits.astype(jnp.float32), label), weight)  # noqa: E731
    return jnp.square(jax.grad(risk)(jnp.ones(())))


class IRM(DomainLoss):
    """The sum over domains of ``irm_penalty``; add ``jtl.tasks.Classify()``. 0 for a domain that has no rows.

    Attributes:
        domains: K; a batch's ``domain`` is 0 ... K - 1.
    """

    domains: int = struct.field(pytree_node=False, default=2)

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The penalty. Raises KeyError without ``batch["domain"]`` or ``batch["label"]``."""
        logits, label = layer(outputs, "logits"), column(batch, "label", "the class of each row")
        parts = [irm_penalty(logits, label, w) for w in domains(batch, self.domains)]
        return sum(parts, jnp.zeros(())), {}
