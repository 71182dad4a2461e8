"""Regressors: small modules from a student's layers to the shape of a teacher's, which train with the student.

Their leaves lie under ``params[NAME]``, and a loss reads what they give as the tap NAME. Without a loss that asks
for it a regressor does not run, so a trained student costs what it did before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import flax.linen as nn
import jax
from jaxtyping import Array

from jtl.distill.term import read, taps
from jtl.errors import InputError
from jtl.model import Batch, Forward, Mode, Model, Outputs, State, Variables


@dataclass(frozen=True)
class Regressor:
    """The technique behind ``regressor``: the tap ``name`` is ``module`` of the outputs or taps ``on``."""

    name: str
    module: nn.Module
    on: tuple[str, ...]

    def wrap(self, forward: Forward) -> Forward:
        """``forward`` with one more tap."""

        def run(variables: Variables, batch: Batch, mode: Mode, key: Array | None) -> tuple[Outputs, State]:
            if self.name not in mode.taps:
                return forward(variables, batch, mode, key)
            below = tuple(tap for tap in mode.taps if tap != self.name)
            below = tuple(dict.fromkeys(below + taps(self.on)))
            outputs, state = forward(variables, batch, replace(mode, taps=below), key)
            inputs = [read(outputs, name) for name in self.on]
            value = self.module.apply({"params": variables["params"][self.name]}, *inputs)
            return {**outputs, "taps": {**outputs.get("taps", {}), self.name: value}}, state

        return run


def regressor(
    model: Model,
    module: nn.Module | int,
    *,
    on: str | Sequence[str],
    name: str = "hint",
    batch: Batch,
    key: Array,
) -> Model:
    """``model`` with the tap ``name``, which is ``module`` of its layers ``on``.

    Args:
        model: the student.
        module: a Linen module with parameters alone; a number is a linear map of the last axis to that width (for a
            map (B, H, W, C) a 1 x 1 convolution).
        on: names of the layers it takes, in order: outputs such as ``"features"`` or paths of modules.
        name: of the tap, and of the leaves in ``params``.
        batch: any batch, to see shapes.
        key: for its initialisation.

    Raises:
        KeyError: no such layer; near misses are listed.
        ValueError: the name is taken, or the module has other collections than parameters.
    """
    names = (on,) if isinstance(on, str) else tuple(on)
    module = nn.Dense(module) if isinstance(module, int) else module
    if name in model.params:
        raise InputError(f"the model has leaves {name!r} already: choose another name")
    outputs = jax.eval_shape(lambda model, batch: model(batch, taps=taps(names)), model, batch)
    inputs = [read(outputs, layer) for layer in names]
    variables = jax.jit(lambda key: module.init(key, *(jax.numpy.zeros(x.shape, x.dtype) for x in inputs)))(
        key
    )
    if set(variables) != {"params"}:
        raise InputError(
            f"regressor {name!r} has the collections {sorted(variables)}: it may have params alone"
        )
    return model.with_technique(Regressor(name, module, names), {name: variables["params"]})
