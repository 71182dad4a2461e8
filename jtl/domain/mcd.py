"""MCD: two classifiers that disagree as much as they can, and features that make them agree.

Saito et al. 2018, "Maximum Classifier Discrepancy for Unsupervised Domain Adaptation",
https://arxiv.org/abs/1712.02560: updates go round through three phases,

    0  all leaves minimise the source loss of both heads;
    1  the heads minimise it less the discrepancy on the target;
    2  the other leaves minimise the discrepancy (n updates in a row).

One compiled step serves them all: the count in ``variables["mcd"]`` says which phase it is, leaves that a phase
holds get no gradient in it, and the rates of ``alternate`` keep an optimiser's momentum from moving them. (The authors
use two optimisers; here a held leaf's moments see gradients of zero meanwhile.)

    model = jtl.domain.two_heads(model, key=key)
    labels = jtl.domain.alternate(model)
    step = jtl.train.make_step(jtl.domain.MCD(), optimizer, labels)  # 2 + n updates a round
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
    """A technique: gradients reach the leaves of the present phase alone; ``outputs["phase"]`` is 0, 1 or 2.

    Attributes:
        heads: names of the two heads.
        repeats: n, how often phase 2 is repeated in a round.
    """

    heads: tuple[str, str]
    repeats: int

    def phase(self, step: Int[Array, ""] | int) -> Int[Array, ""]:
        """The phase of update number ``step``, counted from 0."""
        return jnp.minimum(jnp.asarray(step) % (2 + self.repeats), 2)

    def open(self, path: str, phase: Int[Array, ""]) -> Array:
        """1 where the leaf at ``path`` trains in ``phase``, else 0."""
        held = 2 if path.split("/")[0] in self.heads else 1
        return jnp.where(phase == held, 0.0, 1.0)

    def wrap(self, forward: Forward) -> Forward:
        """``forward`` with the gradients of held leaves cut off."""

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
        """The rate at ``step``."""
        rate = self.rate(step) if callable(self.rate) else self.rate
        return rate * self.phases.open(self.path, self.phases.phase(step))


def two_heads(
    model: Model, *, key: Array, repeats: int = 4, width: int | None = None, name: str = "head_2"
) -> Model:
    """``model`` with a second head like its first, giving ``logits_2``, and MCD's phases. Attach it last.

    Args:
        model: a model with a head named ``head``.
        key: for the second head, which must differ from the first.
        repeats: n; the paper tries 2 to 4.
        width: size of the head's input; by default that of the model's architecture.
        name: of the second head.

    Raises ValueError if there is no first head, or repeats is below 1.
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
    """Labels for a model of ``two_heads``: each leaf at its rate (by default 1) in its phases, and at 0 else.

    Leaves whose rate is 0 stay frozen.
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
    """What the present phase minimises: both heads' source cross-entropy, that less the discrepancy, or the latter.

    It holds the supervised term, so add none. Metrics: both parts, and the phase.
    """

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The loss. Raises KeyError without ``two_heads``, ``batch["domain"]`` or ``batch["label"]``."""
        source, target = domains(batch)
        label = column(batch, "label", "the class of each source row")
        first, second = layer(outputs, "logits"), layer(outputs, "logits_2")
        supervised = mean(cross_entropy(first, label), source) + mean(cross_entropy(second, label), source)
        apart = discrepancy(first, second, target)
        phase = outputs["phase"]
        sign = jnp.where(phase == 2, 1.0, jnp.where(phase == 1, -1.0, 0.0))
        value = jnp.where(phase == 2, 0.0, supervised) + sign * apart
        return value, {"source_loss": supervised, "discrepancy": apart, "phase": phase}
