"""Rows of several domains in one batch: who is who, means over some of them, and what a loss reads.

A batch mixes domains in any order. Its column ``domain`` (B,) is 0 for source and 1 for target rows (or the number
of the domain, where there are more), ``label`` is ignored where a row is not source, and ``weight`` (B,), if there,
is 0 for padding. So one forward serves every term of a loss, and each term takes its mean over the rows it is about.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Float, Int

from jtl import tree
from jtl.errors import InputError, MissingError
from jtl.loss import Loss
from jtl.model import Batch, Mode, Outputs

TAP = "taps/"


class DomainLoss(Loss, kw_only=True):
    """Base of the losses here: they train, and normalise as ``stats`` says.

    Attributes:
        stats: normalise by ``"running"`` or ``"batch"`` statistics; the terms of a sum must agree.
    """

    stats: Literal["running", "batch"] = struct.field(pytree_node=False, default="running")

    def layers(self) -> tuple[str, ...]:
        """The outputs that the loss compares; ``"taps/encoder/layer_3"`` is the tap at ``encoder/layer_3``."""
        return ()

    def mode(self) -> Mode:
        """Dropout on, normalisation as ``stats`` says, and the taps among ``layers``."""
        taps = tuple(name.removeprefix(TAP) for name in self.layers() if name.startswith(TAP))
        return Mode(train=True, stats=self.stats, taps=taps)


# --- columns ---------------------------------------------------------------------------------------


def column(batch: Batch, name: str, why: str) -> Array:
    """The batch's field ``name``; KeyError says ``why`` it must have one."""
    if not isinstance(batch, Mapping) or name not in batch:
        found = sorted(batch) if isinstance(batch, Mapping) else "one array"
        raise MissingError(f"the batch needs a column {name!r}: {why}; it has {found}")
    return jnp.asarray(batch[name])


def weights(batch: Batch, rows: int) -> Float[Array, " B"]:
    """The loader's ``weight`` of each row, 1 without one."""
    if isinstance(batch, Mapping) and "weight" in batch:
        return jnp.asarray(batch["weight"], jnp.float32)
    return jnp.ones(rows)


def domains(batch: Batch, count: int = 2) -> tuple[Float[Array, " B"], ...]:
    """The weights of each domain's rows: the batch's ``weight`` where ``domain`` is 0, where it is 1, ...

    Raises KeyError if the batch has no ``domain``.

    >>> source, target = domains({"domain": jnp.array([0, 1, 1]), "weight": jnp.array([1.0, 1.0, 0.0])})
    >>> target.tolist()
    [0.0, 1.0, 0.0]
    """
    domain = column(batch, "domain", "0 for source and 1 for target rows, or the number of each row's domain")
    weight = weights(batch, len(domain))
    return tuple(weight * (domain == d) for d in range(count))


def check(batch: Batch, count: int = 2) -> None:
    """Raise KeyError or ValueError if ``batch`` does not hold two rows or more of each of ``count`` domains.

    For batches of NumPy, before training: within a compiled step the counts are not known, and a loss of a
    domain that is missing is 0.
    """
    domain = np.asarray(column(batch, "domain", "0 for source and 1 for target rows"))
    counts = [int(np.sum(np.asarray(w) > 0)) for w in domains(batch, count)]
    if unknown := sorted(set(domain.tolist()) - set(range(count))):
        raise InputError(f"column 'domain' holds {unknown}; expected 0 to {count - 1}")
    for d, rows in enumerate(counts):
        if rows < 2:
            names = ("source", "target") if count == 2 else ()
            raise InputError(
                f"the batch has {rows} rows of domain {d}{f' ({names[d]})' if names else ''}; a covariance needs 2: "
                "mix the domains in every batch"
            )


def layer(outputs: Outputs, name: str) -> Float[Array, "B D"]:
    """The output ``name`` (or the tap ``taps/...``) in float32; it must have one vector a row."""
    known = {**outputs, **{TAP + path: value for path, value in outputs.get("taps", {}).items()}}
    if name not in known:
        near = tree.near_misses(name, known)
        raise MissingError(
            f"the model gives no {name!r}; it gives {sorted(set(known) - {'taps'})} (near misses: {near})"
        )
    if jnp.ndim(known[name]) != 2:
        raise InputError(f"{name!r} has shape {jnp.shape(known[name])}; expected (B, D): pool it first")
    return known[name].astype(jnp.float32)


def pair(
    source: Array, target: Array, source_weight: Array | None, target_weight: Array | None
) -> tuple[Array, Array, Array, Array]:
    """Source, target and their weights in float32, 1 by default.

    Raises ValueError if rows differ in size, or there are none.
    """
    if source.shape[1:] != target.shape[1:]:
        raise InputError(
            f"source rows have shape {source.shape[1:]} and target rows {target.shape[1:]}; expected the same"
        )
    if not len(source) or not len(target):
        raise InputError(f"{len(source)} source and {len(target)} target rows: expected at least one of each")
    ones = lambda x, w: jnp.ones(len(x)) if w is None else w.astype(jnp.float32)  # noqa: E731
    x, y = source.astype(jnp.float32), target.astype(jnp.float32)
    return x, y, ones(x, source_weight), ones(y, target_weight)


# --- means -----------------------------------------------------------------------------------------


def mean(values: Array, weight: Float[Array, " B"]) -> Array:
    """``Σ w_i v_i / Σ w_i`` over the rows of weight over 0; zero where there are none."""
    weight = weight.reshape(-1, *(1,) * (values.ndim - 1))
    total = jnp.sum(weight)
    parts = jnp.where(weight > 0, weight * values, 0.0)
    return jnp.sum(parts, 0) / jnp.where(total > 0, total, 1.0)


def cross_entropy(logits: Float[Array, "B C"], label: Int[Array, " B"]) -> Float[Array, " B"]:
    """-log p(label) of each row; NaN for a label outside the classes, so that a row that counts shows."""
    C = logits.shape[-1]
    losses = optax.softmax_cross_entropy(logits.astype(jnp.float32), jax.nn.one_hot(label, C))
    return jnp.where((label >= 0) & (label < C), losses, jnp.nan)


def entropy(logits: Float[Array, "B C"]) -> Float[Array, " B"]:
    """-Σ_c p_c log p_c of each row's softmax, in nats."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.sum(jnp.exp(log_p) * log_p, -1)


def risks(outputs: Outputs, batch: Batch, count: int) -> tuple[Float[Array, " K"], Float[Array, " K"]]:
    """Mean cross-entropy in each of ``count`` domains (0 where it has no rows), and whether it has rows."""
    label = column(batch, "label", "the class of each row")
    losses = cross_entropy(outputs["logits"], label)
    each = domains(batch, count)
    present = jnp.stack([jnp.sum(w) > 0 for w in each]).astype(jnp.float32)
    return jnp.stack([mean(losses, w) for w in each]), present


def squared_distances(x: Float[Array, "N D"], y: Float[Array, "M D"]) -> Float[Array, "N M"]:
    """``||x_i - y_j||²``, by products, in full precision on every device, never below 0."""
    centre = jax.lax.stop_gradient(jnp.mean(x, 0, keepdims=True))  # less cancels; distances stay
    x, y = x - centre, y - centre
    products = jnp.matmul(x, y.T, precision="highest")
    squares = jnp.sum(x * x, 1)[:, None] + jnp.sum(y * y, 1)[None] - 2 * products
    return jnp.maximum(squares, 0.0)


def source_and_target(batch: Batch, x: Any) -> tuple[Any, Any, Array, Array]:
    """``(x, x, source weights, target weights)``: the arguments of a discrepancy between all rows of a batch."""
    source, target = domains(batch)
    return x, x, source, target
