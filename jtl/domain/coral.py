"""Deep CORAL: the distance between the domains' feature covariances.

Sun and Saenko 2016, "Deep CORAL: Correlation Alignment for Deep Domain Adaptation", https://arxiv.org/abs/1607.01719.
"""

from __future__ import annotations

from itertools import combinations

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from jtl.domain.loss import DomainLoss, domains, layer, pair
from jtl.errors import InputError
from jtl.model import Batch, Model, Outputs
from jtl.rows import mean


def covariance(x: Float[Array, "N D"], weight: Float[Array, " N"]) -> Float[Array, "D D"]:
    """Computes ``Σ w (x - m)(x - m)ᵀ / (Σ w - 1)``, m the weighted mean; zero unless the weights sum to more than 1."""
    total = jnp.sum(weight)
    centred = x - mean(x, weight)[None]
    products = jnp.matmul((weight[:, None] * centred).T, centred, precision="highest")
    return products / jnp.where(total > 1, total - 1, jnp.inf)


def coral(
    source: Float[Array, "N D"],
    target: Float[Array, "M E"],
    source_weight: Float[Array, " N"] | None = None,
    target_weight: Float[Array, " M"] | None = None,
) -> Float[Array, ""]:
    """Computes ``||C_s - C_t||²_F / (4 D²)`` with unbiased covariances (equations 1 to 3 of the paper).

    Some libraries use this name for a mean of squares plus a term of the means, which is four times as large.

    Args:
        source: features (N, D).
        target: features (M, D).
        source_weight: of each source row; 0 leaves it out, 2 counts it twice.
        target_weight: of each target row.

    Returns:
        The distance, or 0 where fewer than two rows of a domain have weight, because they have no covariance.

    Raises:
        ValueError: feature sizes differ, or an array has fewer than two rows.

    >>> float(coral(jnp.array([[0.0], [2.0]]), jnp.array([[1.0], [1.0]])))  # (2 - 0)² / 4
    1.0
    """
    x, y, a, b = pair(source, target, source_weight, target_weight)
    if min(len(x), len(y)) < 2:
        raise InputError(f"CORAL needs two rows of each domain for a covariance, found {len(x)} and {len(y)}")
    distance = jnp.sum(jnp.square(covariance(x, a) - covariance(y, b)))
    return jnp.where((jnp.sum(a) > 1) & (jnp.sum(b) > 1), distance, 0.0) / (4 * x.shape[1] ** 2)


class CORAL(DomainLoss):
    """``coral`` between source and target; with more ``domains``, its mean over all pairs of them.

    Attributes:
        on: the output to compare; the paper takes the classifier's.
        domains: K; rows of domains 0 ... K - 1 are compared.
    """

    on: str = struct.field(pytree_node=False, default="features")
    domains: int = struct.field(pytree_node=False, default=2)

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
        x = layer(outputs, self.on)
        values = [coral(x, x, a, b) for a, b in combinations(domains(batch, self.domains), 2)]
        return sum(values, jnp.zeros(())) / len(values), {}
