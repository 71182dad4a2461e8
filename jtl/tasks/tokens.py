"""What the tasks on tokens share."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jtl.errors import InputError


def check_ids(ids: Any, config: Any, name: str = "input_ids") -> None:
    """Raise ValueError if a token lies outside the model's vocabulary, as those of another model's tokenizer may.

    JAX would look up NaN. Ids that are only traced, and models without a ``vocab_size``, pass.
    """
    size = getattr(config, "vocab_size", None)
    if size is None or isinstance(ids, jax.core.Tracer) or not np.size(ids):
        return
    least, most = int(np.min(ids)), int(np.max(ids))
    if not 0 <= least <= most < size:
        raise InputError(
            f"{name} holds the token {most if most >= size else least}, and the model has embeddings of 0 to "
            f"{size - 1}: take the model's own tokenizer, jtl.pretrained.tokenizer(NAME)"
        )


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
