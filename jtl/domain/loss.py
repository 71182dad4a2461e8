"""What the domain losses share: batches that mix rows of several domains, and means over the rows of one domain.

A batch mixes domains in any order. Its column ``domain`` (B,) is 0 for source and 1 for target rows (or the number of
the domain, where there are more). ``label`` is ignored where a row is not source, and ``weight`` (B,), if present, is
0 for padding. So one forward serves every term of a loss, and each term averages over the rows it applies to.
"""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from jtl import tree
from jtl.errors import InputError, MissingError
from jtl.loss import Loss
from jtl.model import Batch, Mode, Outputs
from jtl.rows import cross_entropy, mean, weights

TAP = "taps/"


class DomainLoss(Loss, kw_only=True):
    """Base of the losses of ``jtl.domain``: dropout is on, and normalisation follows ``stats``.

    Attributes:
        stats: normalise by ``"running"`` or ``"batch"`` statistics; the terms of a sum must agree.
    """

    stats: Literal["running", "batch"] = struct.field(pytree_node=False, default="running")

    def layers(self) -> tuple[str, ...]:
        """Returns the outputs that the loss compares; ``"taps/encoder/layer_3"`` is the tap at ``encoder/layer_3``."""
        return ()

    def mode(self) -> Mode:
        """Returns the mode with dropout on, the chosen normalisation, and the taps among ``layers``."""
        taps = tuple(name.removeprefix(TAP) for name in self.layers() if name.startswith(TAP))
        return Mode(train=True, stats=self.stats, taps=taps)


# --- columns ---------------------------------------------------------------------------------------


def column(batch: Batch, name: str, why: str) -> Array:
    """Returns the batch's field ``name``.

    Raises:
        KeyError: it is missing; the message says ``why`` it is needed.
    """
    if name not in batch:
        found = sorted(batch)
        raise MissingError(f"the batch needs a column {name!r}: {why}; it has {found}")
    return jnp.asarray(batch[name])


def domains(batch: Batch, count: int = 2) -> tuple[Float[Array, " B"], ...]:
    """Returns the weights of each domain's rows: the batch's ``weight`` where ``domain`` is 0, where it is 1, ...

    Args:
        batch: with a column ``domain``.
        count: the number of domains.

    Raises:
        KeyError: the batch has no ``domain``.

    >>> source, target = domains({"domain": jnp.array([0, 1, 1]), "weight": jnp.array([1.0, 1.0, 0.0])})
    >>> target.tolist()
    [0.0, 1.0, 0.0]
    """
    domain = column(batch, "domain", "0 for source and 1 for target rows, or the number of each row's domain")
    weight = weights(batch, len(domain))
    return tuple(weight * (domain == d) for d in range(count))


def check(batch: Batch, count: int = 2) -> None:
    """Checks that ``batch`` holds at least two rows of each of ``count`` domains.

    Use it on NumPy batches, before training. Inside a compiled step the counts are unknown, and the loss of a missing
    domain is 0.

    Raises:
        KeyError: the batch has no ``domain``.
        ValueError: a domain has fewer than two rows, or ``domain`` holds another number.
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
    """Returns the output ``name`` (or the tap ``taps/...``) in float32.

    Raises:
        KeyError: there is no such output; near misses are listed.
        ValueError: it does not have one vector per row.
    """
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
    """Returns source, target and their weights (by default 1) in float32.

    Raises:
        ValueError: rows differ in size, or there are none.
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


def risks(outputs: Outputs, batch: Batch, count: int) -> tuple[Float[Array, " K"], Float[Array, " K"]]:
    """Returns the mean cross-entropy in each of ``count`` domains (0 where it has no rows), and whether it has rows."""
    label = column(batch, "label", "the class of each row")
    losses = cross_entropy(outputs["logits"], label)
    each = domains(batch, count)
    present = jnp.stack([jnp.sum(w) > 0 for w in each]).astype(jnp.float32)
    return jnp.stack([mean(losses, w) for w in each]), present


def source_and_target(batch: Batch, x: Any) -> tuple[Any, Any, Array, Array]:
    """Returns ``(x, x, source weights, target weights)``: the arguments of a discrepancy over all rows of a batch."""
    source, target = domains(batch)
    return x, x, source, target
