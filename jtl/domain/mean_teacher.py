"""Mean teacher: agree with the running average of oneself.

Tarvainen and Valpola 2017, "Mean teachers are better role models", https://arxiv.org/abs/1703.01780; for domain
adaptation, on target rows: French, Mackiewicz and Fisher 2018, https://arxiv.org/abs/1706.05208.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jtl import tree
from jtl.domain.rows import DomainLoss, domains, layer, mean
from jtl.errors import InputError, MissingError
from jtl.model import Batch, Forward, Mode, Model, Outputs, State, Variables


@dataclass(frozen=True)
class Teacher:
    """A technique: ``outputs["teacher_logits"]`` while training, of the parameters in ``variables["teacher"]``.

    Before each training forward the teacher becomes ``decay · teacher + (1 - decay) · params``: it has seen every
    update so far. It runs with noise (dropout) of its own, and draws no gradient.

    Attributes:
        decay: α of the paper.
    """

    decay: float

    def wrap(self, forward: Forward) -> Forward:
        """``forward`` with the teacher's beside it."""

        def run(variables: Variables, batch: Batch, mode: Mode, key: Array | None) -> tuple[Outputs, State]:
            if not mode.train:
                return forward(variables, batch, mode, key)
            mine, its = (None, None) if key is None else jax.random.split(key)
            average = tree.interpolate(variables["params"], variables["teacher"], self.decay)
            average = jax.lax.stop_gradient(average)
            outputs, state = forward(variables, batch, mode, mine)
            other, _ = forward({**variables, "params": average}, batch, mode, its)
            if "logits" not in other:
                raise MissingError(f"a teacher needs output 'logits'; the model gives {sorted(other)}")
            logits = jax.lax.stop_gradient(other["logits"])
            return {**outputs, "teacher_logits": logits}, {**state, "teacher": average}

        return run


def mean_teacher(model: Model, *, decay: float = 0.999) -> Model:
    """``model`` with an average of its parameters in the collection ``teacher``, at first a copy. Attach it last.

    The paper's decay is 0.99 at first and 0.999 later. Raises ValueError unless it is in [0, 1).
    """
    if not 0 <= decay < 1:
        raise InputError(f"decay must lie in [0, 1), got {decay}")
    copied = model.replace(variables={**model.variables, "teacher": model.params})
    return copied.with_technique(Teacher(decay), {})


def teacher(model: Model) -> Model:
    """The plain model of the averaged parameters, to evaluate and save. ValueError if ``model`` has no teacher."""
    if "teacher" not in model.variables:
        raise InputError("the model has no teacher: make it with jtl.domain.mean_teacher")
    variables = {name: leaves for name, leaves in model.variables.items() if name != "teacher"}
    kept = tuple(t for t in model.techniques if not isinstance(t, Teacher))
    variables["params"] = model.variables["teacher"]
    return model.replace(variables=variables, techniques=kept)


def consistency(
    logits: Float[Array, "M C"],
    teacher_logits: Float[Array, "M C"],
    weight: Float[Array, " M"] | None = None,
) -> Float[Array, ""]:
    """``mean ||softmax(logits) - softmax(teacher)||²`` over rows; no gradient flows into the teacher."""
    q = jax.lax.stop_gradient(jax.nn.softmax(teacher_logits.astype(jnp.float32)))
    gaps = jnp.sum(jnp.square(jax.nn.softmax(logits.astype(jnp.float32)) - q), -1)
    return mean(gaps, jnp.ones(len(gaps)) if weight is None else weight)


class MeanTeacher(DomainLoss):
    """``consistency`` with the teacher of ``mean_teacher`` on target rows."""

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The loss. Raises KeyError without a teacher or without ``batch["domain"]``."""
        target = domains(batch)[1]
        return consistency(layer(outputs, "logits"), layer(outputs, "teacher_logits"), target), {}
