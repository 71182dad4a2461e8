"""MCD: two classifiers trained to disagree on target rows, and features trained to make them agree.

Saito et al. 2018, "Maximum Classifier Discrepancy for Unsupervised Domain Adaptation",
https://arxiv.org/abs/1712.02560. Updates cycle through three phases:

    0  all leaves minimise the source loss of both heads;
    1  the heads minimise it minus the discrepancy on the target;
    2  the other leaves minimise the discrepancy (n updates in a row).

One compiled step serves all phases. The count in ``variables["mcd"]`` determines the phase, leaves that a phase holds
get no gradient in it, and the rates of ``alternate`` keep an optimiser's momentum from moving them. (The authors use
two optimisers; here the moments of a held leaf see zero gradients in the meantime.)

    model = jtl.domain.two_heads(model, key=key)
    labels = jtl.domain.alternate(model)
    step = jtl.train.make_step(jtl.domain.MCD(), optimizer, labels)  # 2 + n updates per cycle
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jtl import heads, tree
from jtl.domain.dann import width_of
from jtl.domain.loss import DomainLoss, column, domains, layer
from jtl.domain.reversal import reverse
from jtl.errors import InputError
from jtl.model import Batch, Forward, Mode, Model, Outputs, State, Variables
from jtl.rows import cross_entropy, mean


def discrepancy(
    first: Float[Array, "M C"], second: Float[Array, "M C"], weight: Float[Array, " M"] | None = None
) -> Float[Array, ""]:
    """The mean over rows and classes of ``|softmax(first) - softmax(second)|``.

    >>> float(discrepancy(jnp.array([[100.0, 0.0]]), jnp.array([[0.0, 100.0]])))
    1.0
    """
    gap = jnp.mean(jnp.abs(jax.nn.softmax(first) - jax.nn.softmax(second)), -1)
    return mean(gap, jnp.ones(len(gap)) if weight is None else weight)


@dataclass(frozen=True)
class Phases:
    """A technique: gradients reach only the leaves of the present phase; ``outputs["phase"]`` is 0, 1 or 2.

    Attributes:
        heads: names of the two heads.
        repeats: n, how often phase 2 is repeated in a cycle.
    """

    heads: tuple[str, str]
    repeats: int

    def phase(self, step: Int[Array, ""] | int) -> Int[Array, ""]:
        """Returns the phase of update number ``step``, counted from 0."""
        return jnp.minimum(jnp.asarray(step) % (2 + self.repeats), 2)

    def open(self, path: str, phase: Int[Array, ""]) -> Array:
        """Returns 1 where the leaf at ``path`` trains in ``phase``, else 0."""
        held = 2 if path.split("/")[0] in self.heads else 1
        return jnp.where(phase == held, 0.0, 1.0)

    def wrap(self, forward: Forward) -> Forward:
        """Returns ``forward`` with the gradients of held leaves cut off."""

        def run(variables: Variables, batch: Batch, mode: Mode, key: Array | None) -> tuple[Outputs, State]:
            step = variables["mcd"]["step"]
            phase = self.phase(step)
            params = variables["params"]
            if mode.train:
                params = tree.map_with_path(lambda path, x: reverse(x, -self.open(path, phase)), params)
            outputs, state = forward({**variables, "params": params}, batch, mode, key)
            state = {**state, "mcd": {"step": step + 1}} if mode.train else state
            return {**outputs, "phase": phase}, state

        return run


@dataclass(frozen=True)
class Rate:
    """A schedule: ``rate`` (a number or a schedule) in the phases in which the leaf at ``path`` trains, else 0."""

    phases: Phases
    path: str
    rate: Any

    def __call__(self, step: Int[Array, ""] | int) -> Float[Array, ""]:
        """Returns the rate at ``step``."""
        rate = self.rate(step) if callable(self.rate) else self.rate
        return rate * self.phases.open(self.path, self.phases.phase(step))


def two_heads(
    model: Model, *, key: Array, repeats: int = 4, width: int | None = None, name: str = "head_2"
) -> Model:
    """Returns ``model`` with a second head like its first, with output ``logits_2``, and MCD's phases; attach it last.

    Args:
        model: a model with a head named ``head``.
        key: for the second head, which must differ from the first.
        repeats: n; the paper tries 2 to 4.
        width: size of the head's input; by default that of the model's architecture.
        name: of the second head.

    Raises:
        ValueError: there is no first head, ``repeats`` is below 1, or the width is unknown.
    """
    first = heads.find(model)
    if first is None:
        raise InputError("MCD needs a classifier named 'head': put jtl.heads.classifier on the model first")
    if repeats < 1:
        raise InputError(f"repeats must be at least 1, got {repeats}")
    size = width_of(model, first.on, width)
    twin = heads.attach(model, first.module, on=first.on, width=size, key=key, name=name, output="logits_2")
    counted = twin.replace(variables={**twin.variables, "mcd": {"step": jnp.zeros((), jnp.int32)}})
    return counted.with_technique(Phases((first.name, name), repeats), {})


def alternate(model: Model, rates: PyTree | None = None) -> PyTree:
    """Labels for a model of ``two_heads``: each leaf has its rate in the phases in which it trains, and 0 otherwise.

    Args:
        model: from ``two_heads``.
        rates: of each leaf, by default 1; leaves whose rate is 0 stay frozen.

    Raises:
        ValueError: the model has no phases.
    """
    phases = next((t for t in model.techniques if isinstance(t, Phases)), None)
    if phases is None:
        raise InputError("the model has no phases: make it with jtl.domain.two_heads")
    rates = jax.tree.map(lambda _: 1.0, model.params) if rates is None else rates
    found = phases

    def label(path: str, rate: Any) -> Any:
        return rate if not callable(rate) and rate == 0 else Rate(found, path, rate)

    return tree.map_with_path(label, rates)


class MCD(DomainLoss):
    """The MCD loss of the present phase, from both heads' source cross-entropy and their target discrepancy.

    Phase 0 minimises the cross-entropy, phase 1 the cross-entropy minus the discrepancy, phase 2 the discrepancy. It
    includes the supervised term, so do not add one. Metrics: both parts, and the phase.
    """

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Returns the loss.

        Raises:
            KeyError: ``batch["domain"]`` or ``batch["label"]`` is missing, or the model is not from ``two_heads``.
        """
        source, target = domains(batch)
        label = column(batch, "label", "the class of each source row")
        first, second = layer(outputs, "logits"), layer(outputs, "logits_2")
        supervised = mean(cross_entropy(first, label), source) + mean(cross_entropy(second, label), source)
        apart = discrepancy(first, second, target)
        phase = outputs["phase"]
        sign = jnp.where(phase == 2, 1.0, jnp.where(phase == 1, -1.0, 0.0))
        value = jnp.where(phase == 2, 0.0, supervised) + sign * apart
        return value, {"source_loss": supervised, "discrepancy": apart, "phase": phase}
