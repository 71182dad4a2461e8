"""Gradient reversal: the identity in the forward pass, the gradient times -λ in the backward pass.

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
    """Returns ``x``, with its gradient multiplied by ``-scale``; ``scale`` may be traced and gets no gradient.

    >>> float(jax.grad(lambda x: 3 * reverse(x, 0.5))(jnp.ones(())))
    -1.5
    """
    return x


@reverse.defjvp
def _reverse_jvp(primals: Any, tangents: Any) -> Any:
    x, scale = primals
    return x, -jnp.asarray(scale, x.dtype) * tangents[0]


def ramp(progress: Array | float) -> Array:
    """The paper's schedule of λ, ``2 / (1 + exp(-10 p)) - 1``, from 0 to almost 1 for p in [0, 1].

    >>> float(ramp(0.0)), round(float(ramp(1.0)), 4)
    (0.0, 0.9999)
    """
    return 2.0 / (1.0 + jnp.exp(-10.0 * jnp.clip(jnp.asarray(progress, jnp.float32), 0.0, 1.0))) - 1.0


@dataclass(frozen=True)
class Reversal:
    """A technique: ``outputs[output] = reverse(outputs[on], λ)``, where λ grows over the horizon of the run.

    ``variables[name]["step"]`` counts the training forwards; each returns it plus one in its state, which a train step
    carries along. λ itself is ``outputs["reversal"]``.

    Attributes:
        name: of the collection with the count.
        on: the output to reverse.
        output: the name of the reversed output.
        horizon: updates after which p is 1, the length of this run; None holds λ at ``peak``.
        peak: the factor of the ramp.
    """

    name: str
    on: str
    output: str
    horizon: int | None
    peak: float = 1.0

    def scale(self, step: Int[Array, ""]) -> Float[Array, ""]:
        """Returns λ at ``step``."""
        if self.horizon is None:
            return jnp.asarray(self.peak)
        return self.peak * ramp(step / self.horizon)

    def wrap(self, forward: Forward) -> Forward:
        """Returns ``forward`` with the reversed output added."""

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
