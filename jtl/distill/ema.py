"""A teacher that is the student's own moving average: Tarvainen and Valpola 2017, "Mean teachers", arXiv:1703.01780."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jtl import tree
from jtl.distill.teacher import Distill
from jtl.errors import InputError
from jtl.model import Batch, Forward, Mode, Model, Outputs, State, Variables

NAME = "ema"


@dataclass(frozen=True)
class Average:
    """The technique behind ``with_average``: each training forward moves the collection ``ema`` to the parameters."""

    decay: float

    def wrap(self, forward: Forward) -> Forward:
        """``forward`` with the moved average in its state."""

        def run(variables: Variables, batch: Batch, mode: Mode, key: Array | None) -> tuple[Outputs, State]:
            below = {name: leaves for name, leaves in variables.items() if name != NAME}
            outputs, state = forward(below, batch, mode, key)
            if not mode.train:
                return outputs, state
            now = jax.lax.stop_gradient(variables["params"])
            return outputs, {**state, NAME: tree.interpolate(now, variables[NAME], self.decay)}

        return run


def with_average(model: Model, decay: float = 0.999) -> Model:
    """``model`` with a moving average of its parameters, the collection ``ema``, which starts as they are.

    At each step ``average ← decay · average + (1 - decay) · parameters``, of the parameters *before* that step's
    update, since collections change in the forward.

    Raises ValueError unless 0 <= decay < 1.
    """
    if not 0 <= decay < 1:
        raise InputError(f"decay must be at least 0 and below 1, got {decay}")
    model = model.replace(techniques=(*model.techniques, Average(float(decay))))
    return model.replace(variables={**model.variables, NAME: jax.tree.map(jnp.array, model.params)})


def averaged(model: Model) -> Model:
    """The averaged model alone: the teacher, and often the better model to keep.

    Raises ValueError if ``model`` has no average.
    """
    if NAME not in model.variables:
        raise InputError("the model has no moving average: add one with jtl.distill.with_average")
    kept = tuple(technique for technique in model.techniques if not isinstance(technique, Average))
    variables = {name: leaves for name, leaves in model.variables.items() if name != NAME}
    return model.replace(variables={**variables, "params": model.variables[NAME]}, techniques=kept)


class EMATeacher(Distill, kw_only=True):
    """``Distill`` from the moving average of the student itself, made by ``with_average``.

    ``EMATeacher(Classify() + 0.5 * SoftTargets())``. Student and teacher see one batch; the teacher has no dropout.
    """

    teacher: None = None

    def find(self, model: Model) -> Model:
        """The average."""
        return averaged(model)
