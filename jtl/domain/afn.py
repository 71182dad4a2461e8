"""AFN (adaptive feature norm): features whose norms grow step by step, in both domains.

Xu et al. 2019, "Larger Norm More Transferable: An Adaptive Feature Norm Approach for Unsupervised Domain Adaptation",
https://arxiv.org/abs/1811.07456.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from jtl.domain.loss import DomainLoss, domains, layer
from jtl.model import Batch, Model, Outputs
from jtl.rows import mean


def afn(
    features: Float[Array, "N D"], weight: Float[Array, " N"] | None = None, *, step: float = 1.0
) -> Float[Array, ""]:
    """The stepwise loss (SAFN) ``mean (||f|| - stopgrad(||f||) - Δ)²``.

    Its value is always Δ²; only its gradient, -2 Δ d||f||, matters. The gradient of a zero vector is taken as 0.

    Args:
        features: rows of both domains.
        weight: of each row; 0 leaves it out.
        step: Δ; 1 in the paper, at a loss weight of 0.05.
    """
    squares = jnp.sum(jnp.square(features.astype(jnp.float32)), 1)
    norms = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)
    loss = jnp.square(norms - jax.lax.stop_gradient(norms) - step)
    return mean(loss, jnp.ones(len(loss)) if weight is None else weight)


class AFN(DomainLoss):
    """``afn`` over source and target rows; the mean ``norm`` is a metric.

    Attributes:
        on: the features.
        step: Δ.
    """

    on: str = struct.field(pytree_node=False, default="features")
    step: float = struct.field(pytree_node=False, default=1.0)

    def layers(self) -> tuple[str, ...]:
        """Returns ``on``."""
        return (self.on,)

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Returns the loss.

        Raises:
            KeyError: the layer or ``batch["domain"]`` is missing.
        """
        features, both = layer(outputs, self.on), sum(domains(batch), jnp.zeros(()))
        norms = jax.lax.stop_gradient(jnp.linalg.norm(features, axis=1))
        return afn(features, both, step=self.step), {"norm": mean(norms, both)}
