"""Which tokens a classifier leans on: what changes where one is hidden from it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jtl.model import Batch, Model


def erasure(model: Model, batch: Batch) -> Float[Array, "B L"]:
    """How much of its log-probability the predicted class loses when the model does not see a token, in nats.

    Above 0 a token speaks for the prediction, below 0 against it; padding is 0. The token is left out of the
    ``attention_mask``, the positions of the others stay. Li, Monroe and Jurafsky 2016, "Understanding Neural Networks
    through Representation Erasure", https://arxiv.org/abs/1612.08220, section 3.

    Args:
        model: a classifier of texts; one forward of L + 1 rows for each row of the batch.
        batch: ``input_ids`` and ``attention_mask`` (B, L); other fields are not read.
    """
    ids, mask = jnp.asarray(batch["input_ids"]), jnp.asarray(batch["attention_mask"])

    def of_text(text: tuple[Array, Array]) -> Array:
        own_ids, own_mask = text
        L = own_ids.shape[0]
        masks = own_mask[None] * (
            1 - jnp.eye(L + 1, L, -1, dtype=own_mask.dtype)
        )  # all of it, then without each token
        rows = {"input_ids": jnp.tile(own_ids[None], (L + 1, 1)), "attention_mask": masks}
        said = jax.nn.log_softmax(model(rows)["logits"])
        whole, without = said[0], said[1:]
        predicted = jnp.argmax(whole)
        return jnp.where(own_mask > 0, whole[predicted] - without[:, predicted], 0.0)

    return jax.lax.map(of_text, (ids, mask))
