"""Bounding boxes: area, intersection over union, and non-maximum suppression.

A box is ``(left, top, right, bottom)`` in pixels, with the origin at the upper left corner of the image.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def area(boxes: Float[Array, "*B 4"]) -> Float[Array, "*B"]:
    """Returns the area in square pixels; 0 for a box whose sides are in the wrong order."""
    sides = jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0.0)
    return sides[..., 0] * sides[..., 1]


def _shared(one: Float[Array, "*B 4"], other: Float[Array, "*B 4"]) -> Float[Array, "*B"]:
    corners = (jnp.maximum(one[..., :2], other[..., :2]), jnp.minimum(one[..., 2:], other[..., 2:]))
    return area(jnp.concatenate(corners, -1))


def iou(one: Float[Array, "N 4"], other: Float[Array, "M 4"]) -> Float[Array, "N M"]:
    """Returns the intersection over union of every pair of boxes, in [0, 1]; 0 where both are empty.

    >>> iou(jnp.array([[0.0, 0.0, 4.0, 4.0]]), jnp.array([[0.0, 0.0, 4.0, 2.0], [5.0, 5.0, 6.0, 6.0]])).tolist()
    [[0.5, 0.0]]
    """
    shape = (len(one), len(other), 4)
    left, right = jnp.broadcast_to(one[:, None], shape), jnp.broadcast_to(other[None], shape)
    shared = _shared(left, right)
    return shared / jnp.maximum(area(left) + area(right) - shared, 1e-9)


def giou(one: Float[Array, "*B 4"], other: Float[Array, "*B 4"]) -> Float[Array, "*B"]:
    """Returns the generalised intersection over union of corresponding boxes, in [-1, 1].

    It is the IoU minus the share of the smallest enclosing box that neither box covers, so it has a gradient even where
    the boxes do not overlap. Rezatofighi et al. 2019, "Generalized Intersection over Union",
    https://arxiv.org/abs/1902.09630, algorithm 1.
    """
    shared = _shared(one, other)
    union = jnp.maximum(area(one) + area(other) - shared, 1e-9)
    corners = (jnp.minimum(one[..., :2], other[..., :2]), jnp.maximum(one[..., 2:], other[..., 2:]))
    around = jnp.maximum(area(jnp.concatenate(corners, -1)), 1e-9)
    return shared / union - (around - union) / around


def nms(
    boxes: Float[Array, "N 4"],
    score: Float[Array, " N"],
    label: Int[Array, " N"],
    overlap: float = 0.6,
) -> Bool[Array, " N"]:
    """Non-maximum suppression within each class: returns which boxes to keep.

    In order of falling score, each kept box removes those of its class whose IoU with it exceeds ``overlap``. Boxes of
    score 0 or less are padding: they are never kept and remove none. Shapes are static, so it runs inside ``jit`` and
    ``vmap``; it takes N² memory.
    """
    order = jnp.argsort(-score, stable=True)
    boxes, score, label = boxes[order], score[order], label[order]
    rivals = (iou(boxes, boxes) > overlap) & (label[:, None] == label[None])
    later = jnp.arange(len(score))

    def suppress(i: Array, stay: Array) -> Array:
        return stay & ~(stay[i] & rivals[i] & (later > i))

    stay = jax.lax.fori_loop(0, len(score), suppress, score > 0)
    return jnp.zeros_like(stay).at[order].set(stay)
