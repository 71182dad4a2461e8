"""Moving averages of a model's parameters, kept in its variables and moved by each training forward.

Tarvainen and Valpola 2017, "Mean teachers are better role models", https://arxiv.org/abs/1703.01780. Two timings are in
use: ``with_average`` averages the parameters before each step's update, for a teacher that only follows;
``with_teacher`` averages them before each step's forward and answers in it, so that its logits have seen every update.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jtl import tree
from jtl.errors import InputError, MissingError
from jtl.model import Batch, Forward, Mode, Model, Outputs, State, Variables

AVERAGE, TEACHER = "ema", "teacher"  # the collections


@dataclass(frozen=True)
class Average:
    """The technique behind ``with_average``: each training forward moves the collection ``ema`` to the parameters."""

    decay: float
    name: ClassVar[str] = AVERAGE

    def wrap(self, forward: Forward) -> Forward:
        """``forward`` with the moved average in its state."""

        def run(variables: Variables, batch: Batch, mode: Mode, key: Array | None) -> tuple[Outputs, State]:
            below = {name: leaves for name, leaves in variables.items() if name != AVERAGE}
            outputs, state = forward(below, batch, mode, key)
            if not mode.train:
                return outputs, state
            return outputs, {**state, AVERAGE: _moved(variables, AVERAGE, self.decay)}

        return run


@dataclass(frozen=True)
class Teacher:
    """The technique behind ``with_teacher``: ``outputs["teacher_logits"]`` in training, of the collection ``teacher``.

    The teacher runs with noise (dropout) of its own, and draws no gradient.
    """

    decay: float
    name: ClassVar[str] = TEACHER

    def wrap(self, forward: Forward) -> Forward:
        """``forward`` with the teacher's beside it."""

        def run(variables: Variables, batch: Batch, mode: Mode, key: Array | None) -> tuple[Outputs, State]:
            if not mode.train:
                return forward(variables, batch, mode, key)
            mine, its = (None, None) if key is None else jax.random.split(key)
            average = _moved(variables, TEACHER, self.decay)
            outputs, state = forward(variables, batch, mode, mine)
            other, _ = forward({**variables, "params": average}, batch, mode, its)
            if "logits" not in other:
                raise MissingError(f"a teacher needs output 'logits'; the model gives {sorted(other)}")
            logits = jax.lax.stop_gradient(other["logits"])
            return {**outputs, "teacher_logits": logits}, {**state, TEACHER: average}

        return run


def with_average(model: Model, decay: float = 0.999) -> Model:
    """``model`` with a moving average of its parameters, the collection ``ema``, which starts as they are.

    At each step ``average ← decay · average + (1 - decay) · parameters``, of the parameters *before* that step's
    update, since collections change in the forward.

    Raises:
        ValueError: ``decay`` is not in [0, 1).
    """
    return _added(model, AVERAGE, Average(_checked(decay)))


def with_teacher(model: Model, decay: float = 0.999) -> Model:
    """``model`` with a mean teacher: the moving average ``teacher``, whose logits each training forward gives too.

    Before each forward ``teacher ← decay · teacher + (1 - decay) · parameters``. The paper's decay is 0.99 at first and
    0.999 later. Attach it last.

    Raises:
        ValueError: ``decay`` is not in [0, 1).
    """
    return _added(model, TEACHER, Teacher(_checked(decay)))


def average_model(model: Model) -> Model:
    """The plain model of the averaged parameters, of either kind: to evaluate and save.

    Raises:
        ValueError: ``model`` has no moving average.
    """
    name = next((name for name in (AVERAGE, TEACHER) if name in model.variables), None)
    if name is None:
        raise InputError("the model has no moving average: add one with jtl.ema.with_average or with_teacher")
    kept = tuple(t for t in model.techniques if not isinstance(t, (Average, Teacher)))
    variables = {other: leaves for other, leaves in model.variables.items() if other != name}
    return model.replace(variables={**variables, "params": model.variables[name]}, techniques=kept)


def _moved(variables: Variables, name: str, decay: float) -> State:
    now = jax.lax.stop_gradient(variables["params"])
    return tree.interpolate(now, jax.lax.stop_gradient(variables[name]), decay)


def _added(model: Model, name: str, technique: Average | Teacher) -> Model:
    copied = jax.tree.map(jnp.array, model.params)
    return model.replace(
        variables={**model.variables, name: copied}, techniques=(*model.techniques, technique)
    )


def _checked(decay: float) -> float:
    if not 0 <= decay < 1:
        raise InputError(f"decay must be at least 0 and below 1, got {decay}")
    return float(decay)
