"""What the distillation losses share on arrays: weighted means, norms, divergences and checks of shapes."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from jtl.errors import InputError

Teacher = Float[Array, "..."]  # any shape: it is checked by `same`, whose errors say what to do


def mean(values: Float[Array, "*S"], weight: Float[Array, "*S"] | None = None) -> Float[Array, ""]:
    """The mean of ``values`` by ``weight`` (all 1 if None); entries of weight 0 do not count, whatever they hold."""
    if weight is None:
        return jnp.mean(values)
    return jnp.sum(jnp.where(weight > 0, weight * values, 0.0)) / jnp.maximum(jnp.sum(weight), 1.0)


def pairs(weight: Float[Array, " B"] | None, rows: int) -> Float[Array, "B B"]:
    """The weights of ordered pairs of distinct rows: ``w_i · w_j``, 0 on the diagonal."""
    weight = jnp.ones(rows) if weight is None else weight
    return weight[:, None] * weight[None] * (1 - jnp.eye(rows))


def vectors(values: Float[Array, "B ..."]) -> Float[Array, "B N"]:
    """Each row as one float32 vector."""
    return values.reshape(values.shape[0], -1).astype(jnp.float32)


def norm(values: Float[Array, "*S N"]) -> Float[Array, "*S 1"]:
    """The Euclidean norm over the last axis, which is kept; its gradient at 0 is 0 and not NaN."""
    squares = jnp.sum(jnp.square(values), -1, keepdims=True)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)


def unit(values: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """``values`` over their norm along the last axis; 0 stays 0."""
    length = norm(values)
    return values / jnp.where(length > 0, length, 1.0)


def kl(log_p: Float[Array, "*S N"], log_q: Float[Array, "*S N"]) -> Float[Array, "*S"]:
    """KL(p || q) in nats over the last axis, from log-probabilities; where p is 0 it adds 0."""
    held = log_p > -jnp.inf
    log_p = jnp.where(held, log_p, 0.0)
    return jnp.sum(jnp.where(held, jnp.exp(log_p) * (log_p - jnp.where(held, log_q, 0.0)), 0.0), -1)


def huber(difference: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """``x²/2`` within 1 of 0 and ``|x| - 1/2`` beyond."""
    size = jnp.abs(difference)
    return jnp.where(size <= 1, 0.5 * jnp.square(difference), size - 0.5)


def same(what: str, student: Array, teacher: Array, advice: str) -> None:
    """Raise ValueError unless both have one shape."""
    if student.shape != teacher.shape:
        raise InputError(f"{what}: the student gives {student.shape}, the teacher {teacher.shape}; {advice}")


def same_classes(student: Array, teacher: Array) -> None:
    """Raise ValueError unless both logits have one shape: rows, positions of a sequence, and classes."""
    if student.ndim == 3 and student.shape[1] != teacher.shape[1]:
        advice = "tokenise both alike: one tokenizer and one padded length"
    else:
        advice = "both need the same rows and the same classes (or vocabulary), in the same order"
    same("logits", student, teacher, advice)


def same_rows(what: str, student: Array, teacher: Array) -> None:
    """Raise ValueError unless both have one number of rows."""
    if student.shape[0] != teacher.shape[0]:
        raise InputError(
            f"{what}: the student gives {student.shape[0]} rows, the teacher {teacher.shape[0]}; one batch for both"
        )
