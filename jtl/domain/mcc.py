"""MCC: minimises the confusion between classes in the predictions on target rows.

Jin et al. 2020, "Minimum Class Confusion for Versatile Domain Adaptation", https://arxiv.org/abs/1912.03699.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from jtl.domain.loss import DomainLoss, domains, layer
from jtl.model import Batch, Model, Outputs
from jtl.rows import entropy


def mcc(
    logits: Float[Array, "M C"], weight: Float[Array, " M"] | None = None, *, temperature: float = 2.5
) -> Float[Array, ""]:
    """The mean over classes of the off-diagonal mass of the normalised class correlation, in [0, 1].

    With Y = softmax(logits / T) and row weights u_i ∝ 1 + exp(-H(y_i)), which get no gradient, the correlation is Yᵀ
    diag(u) Y, each of its rows divided by its sum. Because the rows of Y sum to 1, the mass off the diagonal is
    ``Σ_i r_ij (1 - y_ij)`` with r_ij = u_i y_ij / Σ_i u_i y_ij. It is computed in this form, so that no class
    underflows.

    Args:
        logits: of target rows.
        weight: of each row; 0 leaves it out.
        temperature: T; 2.5 in most of the paper.

    >>> round(float(mcc(jnp.zeros((3, 4)))), 4)
    0.75
    """
    z = logits.astype(jnp.float32) / temperature
    weight = jnp.ones(len(z)) if weight is None else weight
    defined = jnp.sum(weight) > 0
    log_p = jax.nn.log_softmax(z)
    sure = jax.lax.stop_gradient(jnp.log(weight) + jnp.log1p(jnp.exp(-entropy(z))))
    share = jax.nn.softmax(log_p + jnp.where(defined, sure, 0.0)[:, None], axis=0)
    value = jnp.mean(jnp.sum(share * (1.0 - jnp.exp(log_p)), 0))
    return jnp.where(defined, value, 0.0)


class MCC(DomainLoss):
    """``mcc`` on the logits of target rows.

    Attributes:
        temperature: T.
    """

    temperature: float = struct.field(pytree_node=False, default=2.5)

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Returns the loss.

        Raises:
            KeyError: there is no ``batch["domain"]``.
        """
        return mcc(layer(outputs, "logits"), domains(batch)[1], temperature=self.temperature), {}
