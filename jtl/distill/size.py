"""What a model costs: parameters, operations, memory and time of one forward."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import jax
import numpy as np

from jtl import tree
from jtl.errors import MissingError
from jtl.model import Batch, Model


class Size(NamedTuple):
    """The cost of a forward on one batch.

    Attributes:
        parameters: scalars in ``params``.
        flops: floating-point operations, as XLA counts them in the compiled program.
        bytes: memory of the compiled program: arguments, outputs and temporaries.
        seconds: median time of a call, compiled and warm; None if it was not run.
    """

    parameters: int
    flops: float
    bytes: int
    seconds: float | None


def measure(model: Model, batch: Batch, *, output: str = "logits", runs: int = 20) -> Size:
    """The size of ``model`` computing ``output`` for ``batch``, in evaluation mode.

    Time is that of this machine while it does what else it does: compare models one after another on an idle one.

    Args:
        model: any model.
        batch: arrays on which it is compiled; with ``runs=0`` their shapes suffice.
        output: what is asked for; XLA leaves out what it does not need.
        runs: timed calls, after one that warms up.

    Raises:
        KeyError: the model has no such output.

    >>> from jtl.wrap import function
    >>> model = function(lambda params, x: {"logits": x @ params["w"]}, {"w": jax.numpy.ones((8, 2))})
    >>> size = measure(model, {"x": jax.numpy.ones((4, 8))}, runs=0)
    >>> size.parameters, size.flops >= 2 * 4 * 8 * 2 - 4 * 2, size.seconds
    (16, True, None)
    """

    def forward(model: Model, batch: Batch) -> Any:
        outputs = model(batch)
        if output not in outputs:
            raise MissingError(f"the model gives no {output!r}; it gives {sorted(outputs)}")
        return outputs[output]

    compiled = jax.jit(forward).lower(model, batch).compile()
    memory: Any = compiled.memory_analysis()
    cost = compiled.cost_analysis() or {}
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    times = []
    for _ in range(runs + 1 if runs else 0):
        started = time.perf_counter()
        jax.block_until_ready(compiled(model, batch))
        times.append(time.perf_counter() - started)
    seconds = float(np.median(times[1:])) if runs else None
    return Size(tree.size(model.params), float(cost.get("flops", float("nan"))), int(held), seconds)
