"""Per-row and per-token building blocks of losses: weighted means, cross-entropy, divergences and distances.

A batch's ``weight`` says how much a row or token counts. Entries of weight 0 are padding and never have any influence,
whatever their values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


def mean(values: Float[Array, ...], weight: Float[Array, ...] | None = None) -> Float[Array, ...]:
    """``Σ w_i v_i / Σ w_i`` over the axes of ``weight``, the leading axes of ``values``; 0 if all weights are 0.

    Without weights, the mean over all axes. Entries of weight 0 are ignored, even if they are NaN.

    >>> mean(jnp.array([1.0, 3.0, jnp.nan]), jnp.array([0.5, 0.5, 0.0]))
    Array(2., dtype=float32)
    """
    if weight is None:
        return jnp.mean(values)
    total, axes = jnp.sum(weight), tuple(range(weight.ndim))
    weight = weight.reshape(*weight.shape, *(1,) * (values.ndim - weight.ndim))
    counted = jnp.where(weight > 0, weight * values, 0.0)
    return jnp.sum(counted, axes) / jnp.where(total > 0, total, 1.0)


def weights(batch: Mapping[str, Any], count: int) -> Float[Array, " B"]:
    """Return the batch's ``weight``, or ones for its ``count`` rows if it has none."""
    return jnp.asarray(batch["weight"], jnp.float32) if "weight" in batch else jnp.ones(count)


def cross_entropy(
    logits: Float[Array, "*S C"], label: Int[Array, "*S"], smoothing: float = 0.0
) -> Float[Array, "*S"]:
    """``-log p(label)`` in nats; NaN for a label outside the classes, so that such a row is noticed.

    Args:
        logits: per class.
        label: class numbers.
        smoothing: share of the target spread evenly over the classes (Szegedy et al. 2016, section 7).
    """
    classes = logits.shape[-1]
    # Not indexing: JAX would clamp a label that is too large to the last class.
    targets = optax.smooth_labels(jax.nn.one_hot(label, classes), smoothing)
    losses = optax.softmax_cross_entropy(logits.astype(jnp.float32), targets)
    return jnp.where((label >= 0) & (label < classes), losses, jnp.nan)


def mean_token_cross_entropy(
    logits: Float[Array, "B L V"], target: Int[Array, "B L"], weight: Float[Array, "B L"]
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Return the weighted mean cross-entropy over tokens, in nats, and the metrics ``tokens`` and ``token_accuracy``.

    ``tokens`` is the total weight. A target outside the vocabulary with weight above 0 makes the mean NaN.
    """
    logits = logits.astype(jnp.float32)
    # JAX would clamp an id that is too large to the last token, and count a negative one from the end.
    known = (target >= 0) & (target < logits.shape[-1])
    losses = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, target[..., None], -1)[..., 0]
    losses = jnp.where(known, losses, jnp.nan)
    hits = jnp.argmax(logits, -1) == target
    return mean(losses, weight), {"tokens": weight.sum(), "token_accuracy": mean(hits, weight)}


def entropy(logits: Float[Array, "B C"]) -> Float[Array, " B"]:
    """``-Σ_c p_c log p_c`` of each row's softmax, in nats."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.sum(jnp.exp(log_p) * log_p, -1)


def kl(log_p: Float[Array, "*S N"], log_q: Float[Array, "*S N"]) -> Float[Array, "*S"]:
    """``KL(p || q)`` in nats over the last axis, from log-probabilities; entries with p = 0 contribute 0."""
    held = log_p > -jnp.inf
    log_p = jnp.where(held, log_p, 0.0)
    return jnp.sum(jnp.where(held, jnp.exp(log_p) * (log_p - jnp.where(held, log_q, 0.0)), 0.0), -1)


def squared_distances(x: Float[Array, "N D"], y: Float[Array, "M D"]) -> Float[Array, "N M"]:
    """``||x_i - y_j||²`` by matrix products, in full precision on every device and never below 0."""
    centre = jax.lax.stop_gradient(
        jnp.mean(x, 0, keepdims=True)
    )  # less cancellation; the distances do not change
    x, y = x - centre, y - centre
    products = jnp.matmul(x, y.T, precision="highest")
    squares = jnp.sum(x * x, 1)[:, None] + jnp.sum(y * y, 1)[None] - 2 * products
    return jnp.maximum(squares, 0.0)


def pairs(weight: Float[Array, " B"] | None, rows: int) -> Float[Array, "B B"]:
    """Return weights of ordered pairs of distinct rows: ``w_i · w_j``, 0 on the diagonal."""
    weight = jnp.ones(rows) if weight is None else weight
    return weight[:, None] * weight[None] * (1 - jnp.eye(rows))


def vectors(values: Float[Array, "B ..."]) -> Float[Array, "B N"]:
    """Flatten each row to one float32 vector."""
    return values.reshape(values.shape[0], -1).astype(jnp.float32)


def norm(values: Float[Array, "*S N"]) -> Float[Array, "*S 1"]:
    """The Euclidean norm over the last axis, which is kept; its gradient at 0 is 0, not NaN."""
    squares = jnp.sum(jnp.square(values), -1, keepdims=True)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)


def unit(values: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """Divide ``values`` by their norm along the last axis; zero vectors stay zero."""
    length = norm(values)
    return values / jnp.where(length > 0, length, 1.0)


def huber(difference: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """``x²/2`` for ``|x| <= 1`` and ``|x| - 1/2`` beyond."""
    size = jnp.abs(difference)
    return jnp.where(size <= 1, 0.5 * jnp.square(difference), size - 0.5)
