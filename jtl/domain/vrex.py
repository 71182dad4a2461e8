"""V-REx: equal risk in all domains, for domain generalisation.

Krueger et al. 2020, "Out-of-Distribution Generalization via Risk Extrapolation (REx)",
https://arxiv.org/abs/2003.00688.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from jtl.domain.loss import DomainLoss, risks
from jtl.model import Batch, Model, Outputs
from jtl.rows import mean


def vrex(risk: Float[Array, " K"], present: Float[Array, " K"] | None = None) -> Float[Array, ""]:
    """The variance of the domains' risks, ``mean (r - mean r)²``, over the domains present.

    >>> float(vrex(jnp.array([1.0, 3.0])))
    1.0
    """
    present = jnp.ones(len(risk)) if present is None else present
    return mean(jnp.square(risk - mean(risk, present)), present)


class VREx(DomainLoss):
    """``vrex`` of the mean cross-entropies of the domains in the batch; add it to ``jtl.tasks.Classify()``.

    The paper minimises ``Σ risks + β · variance``. When all domains have equally many rows, Classify's mean over rows
    is that sum divided by K.

    Attributes:
        domains: K; a batch's ``domain`` is 0 ... K - 1.
    """

    domains: int = struct.field(pytree_node=False, default=2)

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Returns the variance.

        Raises:
            KeyError: ``batch["domain"]`` or ``batch["label"]`` is missing.
        """
        risk, present = risks(outputs, batch, self.domains)
        return vrex(risk, present), {}
