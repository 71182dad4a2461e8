"""BSP (batch spectral penalisation): penalises the largest singular values of features; add it to an adversarial loss.

Chen, Wang, Long and Wang 2019, "Transferability vs. Discriminability: Batch Spectral Penalization for Adversarial
Domain Adaptation", ICML 2019.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from jtl.domain.loss import DomainLoss, layer, pair, source_and_target
from jtl.errors import InputError
from jtl.model import Batch, Model, Outputs


def bsp(
    source: Float[Array, "N D"],
    target: Float[Array, "M E"],
    source_weight: Float[Array, " N"] | None = None,
    target_weight: Float[Array, " M"] | None = None,
    *,
    count: int = 1,
) -> Float[Array, ""]:
    """The sum of squares of the ``count`` largest singular values of each domain's feature matrix.

    Args:
        source: features (N, D).
        target: features (M, D).
        source_weight: of each source row; 0 leaves it out.
        target_weight: of each target row.
        count: k; 1 in the paper, at a loss weight of 1e-4.

    Raises:
        ValueError: feature sizes differ, or ``count`` is not between 1 and the number of singular values.
    """
    x, y, a, b = pair(source, target, source_weight, target_weight)
    most = min(*x.shape, *y.shape)
    if not 1 <= count <= most:
        raise InputError(f"count must lie between 1 and {most}, the number of singular values; got {count}")
    scaled = [rows * jnp.sqrt(w)[:, None] for rows, w in ((x, a), (y, b))]
    # Only singular values: their gradient is finite where some are equal, that of the vectors is not.
    values = [jnp.linalg.svd(rows, compute_uv=False)[:count] for rows in scaled]
    return sum((jnp.sum(jnp.square(s)) for s in values), jnp.zeros(()))


class BSP(DomainLoss):
    """``bsp`` of source and target rows.

    Attributes:
        on: the features.
        count: k.
    """

    on: str = struct.field(pytree_node=False, default="features")
    count: int = struct.field(pytree_node=False, default=1)

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
        return bsp(*source_and_target(batch, layer(outputs, self.on)), count=self.count), {}
