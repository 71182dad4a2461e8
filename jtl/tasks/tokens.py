"""What the losses of language models share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def mean_cross_entropy(
    logits: Float[Array, "B L V"], target: Int[Array, "B L"], weight: Float[Array, "B L"]
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The weighted mean over all tokens, in nats, the total weight as ``tokens``, and their ``token_accuracy``.

    A target of weight above 0 outside the vocabulary makes the mean NaN.
    """
    logits = logits.astype(jnp.float32)
    # JAX would take the last token for an id that is too large, and would count backwards from one below 0.
    known = (target >= 0) & (target < logits.shape[-1])
    losses = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, target[..., None], -1)[..., 0]
    losses = jnp.where(weight > 0, jnp.where(known, losses, jnp.nan), 0.0)
    tokens = weight.sum()
    total = jnp.maximum(tokens, 1.0)
    hits = jnp.argmax(logits, -1) == target
    return jnp.sum(weight * losses) / total, {
        "tokens": tokens,
        "token_accuracy": jnp.sum(weight * hits) / total,
    }
