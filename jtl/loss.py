"""Losses: what a training step minimises, as pytrees that can be added and weighted.

A loss is called as ``loss(model, batch, key) -> (value, Aux)``, and any plain function of that form works in a train
step. The losses of jtl are pytrees: their leaves (a teacher, Fisher weights, an anchor) enter the compiled step as
arguments. ``a + 0.5 * b`` is a loss too, and its terms share *one* forward of the model.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from jtl.errors import InputError
from jtl.model import Batch, Mode, Model, Outputs, State


class Aux(NamedTuple):
    """What a loss returns beside its value.

    Attributes:
        metrics: scalars by name, for logging.
        state: the collections that the forward updated, such as ``batch_stats``.
    """

    metrics: dict[str, Array]
    state: State


class Loss(struct.PyTreeNode):
    """Base class of losses: subclasses define the forward they need (``mode``) and their value (``value``)."""

    def mode(self) -> Mode | None:
        """Return the mode of the forward that this loss needs, or None if it reads only parameters."""
        return Mode(train=True)

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Return the loss of ``outputs``, and metrics by name.

        Args:
            model: the model, for losses that read its parameters.
            outputs: of the forward that ``mode`` asks for; empty if that is None.
            batch: arrays by field.
            key: random key for the loss's own noise.
        """
        raise TypeError(f"{type(self).__name__} does not define value(model, outputs, batch, key)")

    def __call__(self, model: Model, batch: Batch, key: Array | None) -> tuple[Float[Array, ""], Aux]:
        """Return the value on one batch, its metrics and the model's updated state."""
        mode = self.mode()
        outputs, state = ({}, {}) if mode is None else model.run(batch, mode, key)
        value, metrics = self.value(model, outputs, batch, key)
        return value, Aux({**metrics, "loss": value}, state)

    def __add__(self, other: Loss) -> Sum:
        if not isinstance(other, Loss):
            return NotImplemented
        return Sum(_terms(self) + _terms(other), _weights(self) + _weights(other))

    def __rmul__(self, weight: Any) -> Sum:
        return Sum(_terms(self), tuple(weight * w for w in _weights(self)))


class Sum(Loss):
    """A weighted sum of losses over one shared forward. The weights are leaves, so changing them does not recompile."""

    terms: tuple[Loss, ...]
    weights: tuple[Any, ...]

    def mode(self) -> Mode | None:
        """Return the mode of the one forward that serves every term.

        Raises:
            ValueError: two terms ask for different dropout or normalisation modes.
        """
        modes = [mode for mode in (term.mode() for term in self.terms) if mode is not None]
        if len({(mode.train, mode.stats) for mode in modes}) > 1:
            asked = ", ".join(f"{type(t).__name__}: {t.mode()}" for t in self.terms)
            raise InputError(f"the terms of a sum share one forward but ask for different ones: {asked}")
        taps = tuple(dict.fromkeys(tap for mode in modes for tap in mode.taps))
        return Mode(modes[0].train, modes[0].stats, taps) if modes else None

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Return ``sum(weight * term)``; each term's unweighted value is a metric under its class name.

        A second term of the same class is named ``Name_2``, and its metrics likewise.
        """
        total = jnp.zeros(())
        metrics: dict[str, Array] = {}
        seen: Counter[str] = Counter()
        for i, (term, weight) in enumerate(zip(self.terms, self.weights, strict=True)):
            own_key = None if key is None else jax.random.fold_in(key, i)
            value, own = term.value(model, outputs, batch, own_key)
            total = total + weight * value
            name = type(term).__name__
            seen[name] += 1
            again = f"_{seen[name]}" if seen[name] > 1 else ""
            metrics |= {f"{metric}{again}": found for metric, found in {**own, name: value}.items()}
        return total, metrics


def _terms(loss: Loss) -> tuple[Loss, ...]:
    return loss.terms if isinstance(loss, Sum) else (loss,)


def _weights(loss: Loss) -> tuple[Any, ...]:
    return loss.weights if isinstance(loss, Sum) else (1.0,)
