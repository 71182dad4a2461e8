"""Gradient reversal: the identity forward, the gradient times -λ backward.

Ganin et al. 2016, "Domain-Adversarial Training of Neural Networks", https://arxiv.org/abs/1505.07818.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jtl.errors import MissingError
from jtl.model import Batch, Forward, Mode, Outputs, State, Variables


@jax.custom_jvp
def reverse(x: Array, scale: Any) -> Array:
    """``x``, whose gradient is ``-scale`` times what it would be. ``scale`` may be traced and gets no gradient.

    >>> float(jax.grad(lambda x: 3 * reverse(x, 0.5))(jnp.ones(())))
    -1.5
    """
    return x


@reverse.defjvp
def _reverse_jvp(primals: Any, tangents: Any) -> Any:
    x, scale = primals
    return x, -jnp.asarray(scale, x.dtype) * tangents[0]


def ramp(progress: Array | float) -> Array:
    """``2 / (1 + exp(-10 p)) - 1`` for p in [0, 1], from 0 to almost 1: the paper's schedule of λ.

    >>> float(ramp(0.0)), round(float(ramp(1.0)), 4)
    (0.0, 0.9999)
    """
    return 2.0 / (1.0 + jnp.exp(-10.0 * jnp.clip(jnp.asarray(progress, jnp.float32), 0.0, 1.0))) - 1.0


@dataclass(frozen=True)
class Reversal:
    """A technique: ``outputs[output] = reverse(outputs[on], λ)``, λ growing over the run's own horizon.

    ``variables[name]["step"]`` counts the training forwards; each returns it plus one in its state, which a train
    step threads. λ itself is ``outputs["reversal"]``.

    Attributes:
        name: of the collection with the count.
        on: the output to reverse.
        output: the name of the reversed one.
        horizon: updates after which p is 1, the length of this run; None holds λ at ``peak``.
        peak: what the ramp is multiplied by.
    """

    name: str
    on: str
    output: str
    horizon: int | None
    peak: float = 1.0

    def scale(self, step: Int[Array, ""]) -> Float[Array, ""]:
        """λ at ``step``."""
        if self.horizon is None:
            return jnp.asarray(self.peak)
        return self.peak * ramp(step / self.horizon)

    def wrap(self, forward: Forward) -> Forward:
        """``forward`` with the reversed output added."""

        def run(variables: Variables, batch: Batch, mode: Mode, key: Array | None) -> tuple[Outputs, State]:
            outputs, state = forward(variables, batch, mode, key)
            if self.on not in outputs:
                raise MissingError(
                    f"{self.name!r} reverses output {self.on!r}; the model gives {sorted(outputs)}"
                )
            step = variables[self.name]["step"]
            scale = self.scale(step)
            outputs = {**outputs, self.output: reverse(outputs[self.on], scale), "reversal": scale}
            return outputs, {**state, self.name: {"step": step + 1}} if mode.train else state

        return run
