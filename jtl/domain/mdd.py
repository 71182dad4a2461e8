"""MDD: an auxiliary classifier that agrees with the main one on the source and disagrees with it on the target.

Zhang et al. 2019, "Bridging Theory and Algorithm for Domain Adaptation", https://arxiv.org/abs/1904.05801.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from jtl.domain.loss import DomainLoss, layer, pair, source_and_target
from jtl.errors import InputError
from jtl.model import Batch, Model, Outputs
from jtl.rows import cross_entropy, mean


def mdd(
    source: Float[Array, "N C"],
    target: Float[Array, "M C"],
    source_adversary: Float[Array, "N C"],
    target_adversary: Float[Array, "M C"],
    source_weight: Float[Array, " N"] | None = None,
    target_weight: Float[Array, " M"] | None = None,
    *,
    gamma: float = 4.0,
) -> Float[Array, ""]:
    """The margin disparity discrepancy, ``-γ mean_source CE(f'(x), ŷ) + mean_target log(1 - p'(ŷ | x))``.

    ŷ = argmax f(x) are the classifier's own predictions; f' and p' are the adversary's logits and softmax. The
    adversary maximises it. γ is the exponential of the margin.

    Args:
        source: logits of the classifier on source rows; they get no gradient.
        target: logits of the classifier on target rows.
        source_adversary: logits of the adversary on source rows.
        target_adversary: logits of the adversary on target rows.
        source_weight: of each source row.
        target_weight: of each target row.
        gamma: γ.

    Raises:
        ValueError: fewer than two classes, or as for any two domains: sizes differ or a domain has no rows.
    """
    if source.shape[-1] < 2:
        raise InputError(f"MDD needs two classes or more, found {source.shape[-1]}")
    f, g, a, b = pair(source_adversary, target_adversary, source_weight, target_weight)
    others = jnp.where(jax.nn.one_hot(target.argmax(-1), g.shape[-1]) > 0, -jnp.inf, g)
    log_rest = jax.nn.logsumexp(others, -1) - jax.nn.logsumexp(g, -1)  # log(1 - p), without 1 - 1
    return -gamma * mean(cross_entropy(f, source.argmax(-1)), a) + mean(log_rest, b)


class MDD(DomainLoss):
    """Minus ``mdd``: the loss that the adversary minimises; the gradient reversal gives the features the opposite.

    The model has ``logits`` and ``jtl.domain.adversary(model, outputs=C, hidden=(1024,), name="adversary",
    output="adversary_logits", peak=0.1, ...)``; the paper increases the trade-off to 0.1.

    Attributes:
        gamma: γ.
    """

    gamma: float = struct.field(pytree_node=False, default=4.0)

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Returns the loss.

        Raises:
            KeyError: ``adversary_logits`` or ``batch["domain"]`` is missing.
        """
        z, _, source, target = source_and_target(batch, layer(outputs, "logits"))
        other = layer(outputs, "adversary_logits")
        return -mdd(z, z, other, other, source, target, gamma=self.gamma), {}
