"""Attribution by erasure: how a classifier's prediction changes when a token or image region is hidden."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jtl.errors import InputError
from jtl.model import Batch, Model


def erasure(model: Model, batch: Batch) -> Float[Array, "B L"]:
    """Returns by how many nats the predicted class's log-probability falls when each token is hidden.

    Above 0 a token supports the prediction, below 0 it speaks against it; padding is 0. A token is hidden through the
    ``attention_mask``; the others keep their positions. Li, Monroe, Jurafsky 2016, "Understanding Neural Networks
    through Representation Erasure", https://arxiv.org/abs/1612.08220, section 3.

    Args:
        model: a text classifier; each row of the batch takes one forward pass of L + 1 rows.
        batch: ``input_ids`` and ``attention_mask`` (B, L); other fields are ignored.
    """
    ids, mask = jnp.asarray(batch["input_ids"]), jnp.asarray(batch["attention_mask"])

    def of_text(text: tuple[Array, Array]) -> Array:
        own_ids, own_mask = text
        L = own_ids.shape[0]
        masks = own_mask[None] * (
            1 - jnp.eye(L + 1, L, -1, dtype=own_mask.dtype)
        )  # the whole text, then without each token
        rows = {"input_ids": jnp.tile(own_ids[None], (L + 1, 1)), "attention_mask": masks}
        said = jax.nn.log_softmax(model(rows)["logits"])
        whole, without = said[0], said[1:]
        predicted = jnp.argmax(whole)
        return jnp.where(own_mask > 0, whole[predicted] - without[:, predicted], 0.0)

    return jax.lax.map(of_text, (ids, mask))


def occlusion(model: Model, batch: Batch, *, patch: int, stride: int | None = None) -> Float[Array, "B h w"]:
    """Returns by how many nats the predicted class's log-probability falls when a square of the image is grey.

    The square has value 0, the mean of normalised images. Zeiler and Fergus 2014, "Visualizing and Understanding
    Convolutional Networks", https://arxiv.org/abs/1311.2901, section 4.2.

    Args:
        model: an image classifier; one forward pass of the batch for each of the h · w positions.
        batch: ``image`` (B, H, W, C); other fields are ignored.
        patch: side of the square in pixels.
        stride: pixels between positions; by default half of ``patch``.

    Raises:
        ValueError: the square is larger than the images.
    """
    image = jnp.asarray(batch["image"])
    _, H, W, _ = image.shape
    if not 1 <= patch <= min(H, W):
        raise InputError(f"patch must be 1 to {min(H, W)}, the shorter side of the images, got {patch}")
    step = max(1, patch // 2) if stride is None else stride
    tops, lefts = jnp.arange(0, H - patch + 1, step), jnp.arange(0, W - patch + 1, step)
    whole = jax.nn.log_softmax(model({"image": image})["logits"])
    predicted = jnp.argmax(whole, -1)

    def said(logits: Array) -> Array:
        return jnp.take_along_axis(logits, predicted[:, None], 1)[:, 0]

    def lost(corner: tuple[Array, Array]) -> Array:
        top, left = corner
        rows, columns = jnp.arange(H)[:, None] - top, jnp.arange(W)[None] - left
        grey = (rows >= 0) & (rows < patch) & (columns >= 0) & (columns < patch)
        hidden = jnp.where(grey[None, :, :, None], 0.0, image)
        return said(whole) - said(jax.nn.log_softmax(model({"image": hidden})["logits"]))

    places = jnp.meshgrid(tops, lefts, indexing="ij")
    found = jax.lax.map(lost, (places[0].ravel(), places[1].ravel()))
    return found.T.reshape(image.shape[0], len(tops), len(lefts))
