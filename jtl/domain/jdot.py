"""DeepJDOT: optimal transport of features and labels together, between source and target rows of a batch.

Damodaran et al. 2018, "DeepJDOT: Deep Joint Distribution Optimal Transport for Unsupervised Domain Adaptation",
https://arxiv.org/abs/1803.10081. The transport plan comes from Sinkhorn iterations (Cuturi 2013, "Sinkhorn Distances:
Lightspeed Computation of Optimal Transportation Distances", https://arxiv.org/abs/1306.0895), which take only a few
lines and no dependency.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from jtl.domain.loss import DomainLoss, column, layer, pair, source_and_target
from jtl.model import Batch, Model, Outputs
from jtl.rows import squared_distances


def sinkhorn(
    cost: Float[Array, "N M"],
    a: Float[Array, " N"],
    b: Float[Array, " M"],
    *,
    epsilon: Float[Array, ""] | float,
    steps: int = 100,
) -> Float[Array, "N M"]:
    """The transport plan P with row sums a and column sums b that minimises ``Σ P·cost + ε Σ P log P``.

    Computed in the log domain. After ``steps`` rounds the column sums are exact and the row sums nearly so.

    Args:
        cost: (N, M).
        a: row sums; entries may be 0.
        b: column sums; entries may be 0. a and b must have the same positive total.
        epsilon: ε.
        steps: rounds.
    """
    log_a, log_b, scaled = jnp.log(a), jnp.log(b), -cost / epsilon

    def round_(_: Any, potentials: tuple[Array, Array]) -> tuple[Array, Array]:
        _, g = potentials
        f = log_a - jax.nn.logsumexp(scaled + g[None], 1)
        return f, log_b - jax.nn.logsumexp(scaled + f[:, None], 0)

    start = jnp.zeros_like(log_a), jnp.where(b > 0, 0.0, -jnp.inf)
    f, g = jax.lax.fori_loop(0, steps, round_, start)
    return jnp.exp(scaled + f[:, None] + g[None])


def jdot(
    source: Float[Array, "N D"],
    target: Float[Array, "M E"],
    source_label: Int[Array, " N"],
    target_logits: Float[Array, "M C"],
    source_weight: Float[Array, " N"] | None = None,
    target_weight: Float[Array, " M"] | None = None,
    *,
    alpha: float = 0.001,
    beta: float = 0.0001,
    epsilon: float = 0.05,
    steps: int = 100,
) -> Float[Array, ""]:
    """Computes ``Σ_ij P_ij (α ||x_i - x_j||² + β CE(y_i, f(x_j)))`` over source rows i and target rows j.

    P is the transport plan between the rows of both domains for this same cost, uniform over the rows that count; it
    gets no gradient. The paper's plan is exact; this one is entropic, so that it compiles on any device, with ε
    relative to the mean cost.

    Args:
        source: features of source rows.
        target: features of target rows.
        source_label: the class y of each source row.
        target_logits: the classifier's logits on target rows.
        source_weight: of each source row.
        target_weight: of each target row.
        alpha: α, the weight of the features; 0.001 in the paper.
        beta: β, the weight of the labels; the paper's λ_t, 0.0001.
        epsilon: ε, relative to the mean cost.
        steps: Sinkhorn rounds.

    Returns:
        The loss; 0 where no row of a domain has weight, NaN where a source row that counts has an unknown label.
    """
    x, y, a, b = pair(source, target, source_weight, target_weight)
    C = target_logits.shape[-1]
    known = (source_label >= 0) & (source_label < C)
    targets = jax.nn.one_hot(source_label, C)
    log_p = jax.nn.log_softmax(target_logits.astype(jnp.float32))
    cost = alpha * squared_distances(x, y) - beta * jnp.matmul(targets, log_p.T, precision="highest")
    defined = (jnp.sum(a) > 0) & (jnp.sum(b) > 0)
    a, b = (jnp.where(defined, w, 1.0) for w in (a, b))
    a, b = a / jnp.sum(a), b / jnp.sum(b)
    fixed = jax.lax.stop_gradient(cost)
    scale = jnp.maximum(jnp.sum(a[:, None] * fixed * b[None]), 1e-12)
    plan = sinkhorn(fixed, a, b, epsilon=epsilon * scale, steps=steps)
    value = jnp.where(defined, jnp.sum(plan * cost), 0.0)
    return jnp.where(jnp.all(known | (a == 0)), value, jnp.nan)


class JDOT(DomainLoss):
    """``jdot`` between source and target rows; add the supervised term.

    Attributes:
        on: the features.
        alpha: α.
        beta: λ_t.
        epsilon: ε, relative to the mean cost.
        steps: Sinkhorn rounds.
    """

    on: str = struct.field(pytree_node=False, default="features")
    alpha: float = struct.field(pytree_node=False, default=0.001)
    beta: float = struct.field(pytree_node=False, default=0.0001)
    epsilon: float = struct.field(pytree_node=False, default=0.05)
    steps: int = struct.field(pytree_node=False, default=100)

    def layers(self) -> tuple[str, ...]:
        """Returns ``on``."""
        return (self.on,)

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Returns the loss.

        Raises:
            KeyError: the layer, ``batch["domain"]`` or ``batch["label"]`` is missing.
        """
        x, _, source, target = source_and_target(batch, layer(outputs, self.on))
        label = column(batch, "label", "the class of each source row")
        value = jdot(
            x, x, label, layer(outputs, "logits"), source, target,
            alpha=self.alpha, beta=self.beta, epsilon=self.epsilon, steps=self.steps,
        )  # fmt: skip
        return value, {}
