"""Many runs in one program: a train step over N models that share their frozen leaves.

N adapters, heads, seeds or learning rates train on *one* frozen backbone. It is stored once, the program is compiled
once, and the matrix products of the N runs are batched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jtl import tree
from jtl.errors import InputError
from jtl.model import Batch, Model
from jtl.train.step import Step, TrainState


class Sweep:
    """A train step over N runs: see ``sweep``."""

    def __init__(self, step: Step, own_batches: bool) -> None:
        self.step = step
        axes = (0, None, None, 0 if own_batches else None)
        runs = jax.vmap(step.update, in_axes=axes)
        self._compiled = jax.jit(runs, donate_argnums=0, compiler_options=step.compiler_options)

    def init(self, models: Sequence[Model], keys: Array, rates: Sequence[float] | None = None) -> TrainState:
        """Return the state of N runs before their first step: all arrays except the frozen ones have a first axis of N.

        Args:
            models: one for each run; their frozen leaves must be equal.
            keys: a random key for each run.
            rates: a peak learning rate for each run, for an optimiser from ``jtl.train.adamw(schedule(...))``; by
                default the optimiser's own.

        Raises:
            ValueError: the numbers of models, keys and rates differ; the frozen leaves differ; or the optimiser's rate
                is not a schedule.
        """
        if not len(models) == len(keys) == len(models if rates is None else rates):
            raise InputError(
                f"{len(models)} models, {len(keys)} keys and {'no' if rates is None else len(rates)} rates: "
                "one of each for every run"
            )
        states = [self.step.init(model, key) for model, key in zip(models, keys, strict=True)]
        if rates is not None:
            states = [_with_peak(state, rate) for state, rate in zip(states, rates, strict=True)]
        for i, state in enumerate(states):
            _check_frozen(states[0].frozen, state.frozen, i)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(s.replace(frozen=None) for s in states))
        return stacked.replace(frozen=states[0].frozen)

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        """Update every run once; the metrics have a first axis of N. ``state`` must not be used again."""
        changed, metrics = self._compiled(
            state.replace(frozen=None), state.frozen, self.step.loss_leaves, batch
        )
        return changed.replace(frozen=state.frozen), metrics


def sweep(step: Step, *, own_batches: bool = False) -> Sweep:
    """Return N runs of ``step`` as one program, as ``make_step`` does for one run.

    Use it as ``state = runs.init(models, keys, rates)``, then ``state, metrics = runs(state, batch)``; ``run_of``
    returns the state of one run.

    Args:
        step: a step for one device.
        own_batches: whether each run has its own batch, in arrays (N, B, ...), instead of one shared batch.

    Raises:
        ValueError: the step has a mesh.
    """
    if step.mesh is not None:
        raise InputError("a sweep runs on one device: make its step without a mesh")
    return Sweep(step, own_batches)


def run_of(state: TrainState, index: int) -> TrainState:
    """Return the state of one run of a sweep; its ``model`` is that run's model."""
    one = jax.tree.map(lambda leaf: leaf[index], state.replace(frozen=None))
    return one.replace(frozen=state.frozen)


def _with_peak(state: TrainState, rate: float) -> TrainState:
    try:
        return state.replace(opt_state=optax.tree.set(state.opt_state, peak=jnp.asarray(rate, jnp.float32)))
    except KeyError as error:
        raise InputError(
            "rates need an optimiser whose peak is part of its state: adamw(schedule(...))"
        ) from error


def _check_frozen(first: Any, other: Any, index: int) -> None:
    if other.replace(variables={}) != first.replace(variables={}):
        raise InputError(
            f"model {index} computes another function than model 0: the techniques must be equal"
        )
    one, two = tree.flatten(first.params), tree.flatten(other.params)
    differ = [
        path for path in one if one[path] is not two[path] and not jnp.array_equal(one[path], two[path])
    ]
    if differ:
        raise InputError(
            f"model {index} differs from model 0 in {len(differ)} frozen leaves, such as {differ[0]!r}: runs of a "
            "sweep share what does not train"
        )
