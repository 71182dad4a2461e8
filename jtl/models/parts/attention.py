"""Multi-head self-attention, and the masks that it adds to its logits.

Vaswani et al. 2017, "Attention Is All You Need", https://arxiv.org/abs/1706.03762, section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jtl.models.parts.dropout import Dropout
from jtl.models.parts.layers import Ids, dense


def bias_where(seen: Bool[Array | np.ndarray, "*shape"]) -> Float[Array, "*shape"]:
    """Return what attention adds to its logits: 0 where a position is seen, else the lowest float32.

    After the softmax an unseen position has weight exactly 0, and a row that sees no position stays finite.
    """
    return jnp.where(seen, 0.0, jnp.finfo(jnp.float32).min)


def mask_bias(mask: Ids | None) -> Float[Array, "B 1 1 L"] | None:
    """Return ``bias_where`` of a padding mask, the same for every query."""
    return None if mask is None else bias_where(jnp.asarray(mask) != 0)[:, None, None, :]


def attend(
    q_BxHxQxE: Float[Array, "B H Q E"],
    k_BxHxKxE: Float[Array, "B H K E"],
    v_BxHxKxE: Float[Array, "B H K E"],
    bias: Float[Array, "#B #H #Q K"] | None,
    drop: Callable[[Array], Array],
) -> Float[Array, "B H Q E"]:
    """Compute ``drop(softmax(q k' + bias)) v``, with the softmax in float32; scale the queries first.

    Args:
        q_BxHxQxE: queries, already scaled.
        k_BxHxKxE: keys.
        v_BxHxKxE: values.
        bias: added to the logits, see ``bias_where``; None for no mask.
        drop: dropout of the attention weights.
    """
    logits_BxHxQxK = jnp.einsum("bhqe,bhke->bhqk", q_BxHxQxE, k_BxHxKxE, preferred_element_type=jnp.float32)
    if bias is not None:
        logits_BxHxQxK += bias
    # The softmax divides after the product with the values: K / E times fewer divisions, forward and backward.
    weights_BxHxQxK = jnp.exp(logits_BxHxQxK - jax.lax.stop_gradient(logits_BxHxQxK.max(-1, keepdims=True)))
    total_BxHxQx1 = weights_BxHxQxK.sum(-1, keepdims=True)
    weights_BxHxQxK = drop(weights_BxHxQxK).astype(v_BxHxKxE.dtype)
    y_BxHxQxE = jnp.einsum("bhqk,bhke->bhqe", weights_BxHxQxK, v_BxHxKxE, preferred_element_type=jnp.float32)
    return (y_BxHxQxE / total_BxHxQx1).astype(v_BxHxKxE.dtype)


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, section 3.2): (B, L, D) to (B, L, D)."""

    heads: int
    dropout: float = 0.0
    bias: bool = True  # of query, key and value
    std: float = 0.02

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], bias: Float[Array, "B 1 #L L"] | None = None, *, train: bool = False
    ) -> Float[Array, "B L D"]:
        """Attend; ``bias`` is added to the logits: from ``mask_bias``, or one per query (a causal mask)."""
        B, L, D = x.shape
        H = self.heads

        def heads_first(name):
            return dense(D, name, self.std, self.bias)(x).reshape(B, L, H, D // H).transpose(0, 2, 1, 3)

        q_BxHxLxE, k_BxHxLxE, v_BxHxLxE = heads_first("query"), heads_first("key"), heads_first("value")
        drop = partial(Dropout(self.dropout), train=train)
        y_BxHxLxE = attend(q_BxHxLxE * (D // H) ** -0.5, k_BxHxLxE, v_BxHxLxE, bias, drop)
        y = y_BxHxLxE.transpose(0, 2, 1, 3)
        return dense(D, "output", self.std)(y.reshape(B, L, D))
