"""``Loss``: what a training step minimises, as a pytree that adds up.

A loss is called ``loss(model, batch, key) -> (value, Aux)``, and any plain function of that form will do
for a train step. Losses of jtl are pytrees whose leaves (a teacher, Fisher weights, an anchor) reach the
compiled step as arguments. ``a + 0.5 * b`` is a loss too, and its terms share *one* forward of the model.
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
        metrics: scalars by name, for people.
        state: the collections that the forward updated, such as ``batch_stats``.
    """

    metrics: dict[str, Array]
    state: State


class Loss(struct.PyTreeNode):
    """Base of the losses: subclasses say which forward they need (``mode``) and what it costs (``value``)."""

    def mode(self) -> Mode | None:
        """The forward this loss needs, or None if it reads parameters alone."""
        return Mode(train=True)

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The loss of ``outputs``, and metrics by name."""
        raise TypeError(f"{type(self).__name__} does not define value(model, outputs, batch, key)")

    def __call__(self, model: Model, batch: Batch, key: Array | None) -> tuple[Float[Array, ""], Aux]:
        """The value on one batch, its metrics and the model's updated state."""
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
    """A weighted sum of losses over one shared forward. The weights are leaves: changing them recompiles nothing."""

    terms: tuple[Loss, ...]
    weights: tuple[Any, ...]

    def mode(self) -> Mode | None:
        """The one forward that serves every term.

        Raises ValueError if two terms ask for different dropout or normalisation modes.
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
        """``sum(weight * term)``; each term's unweighted value is a metric under its class's name.

        A second term of a class counts as ``Name_2``, and its own metrics likewise.
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
