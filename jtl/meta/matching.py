"""Matching networks: classify a query by attention over the support rows.

Vinyals et al. 2016, "Matching Networks for One Shot Learning", https://arxiv.org/abs/1606.04080.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jtl.meta.metric import Metric, Scores, unit
from jtl.model import Model


class Matching(Metric):
    """P(k | x) = Σ a(x, x_i) over the support rows of class k, with a the softmax of cosine similarities.

    The simple form of the paper's equations 1 and 2: one embedding for support and query, without full context
    embeddings.
    """

    def scores(
        self, model: Model, support: Array, label: Int[Array, " S"], query: Array, key: Array | None
    ) -> Scores:
        """Returns log P(k | x)."""
        attention = jax.nn.log_softmax(unit(query) @ unit(support).T)
        member = label[None] == jnp.arange(self.ways)[:, None]
        # A log-space sum per class; the sum over no rows is −inf.
        shares = jnp.where(member[None], attention[:, None], -jnp.inf)
        return jax.nn.logsumexp(shares, -1)
