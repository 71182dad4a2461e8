"""What a model or a compiled program costs: parameters, operations, memory and seconds."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import jax
import numpy as np

from jtl import tree
from jtl.errors import MissingError
from jtl.model import Batch, Model


class Cost(NamedTuple):
    """The cost of a forward on one batch.

    Attributes:
        parameters: scalars in ``params``.
        flops: floating-point operations, see ``flops``.
        bytes: memory of the compiled program, see ``memory``.
        seconds: median time of a call, compiled and warm; None if it was not run.
    """

    parameters: int
    flops: float
    bytes: int
    seconds: float | None


def forward(model: Model, batch: Batch, *, output: str = "logits", runs: int = 20) -> Cost:
    """The cost of ``model`` computing ``output`` for ``batch``, in evaluation mode.

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
    >>> cost = forward(model, {"x": jax.numpy.ones((4, 8))}, runs=0)
    >>> cost.parameters, cost.flops >= 2 * 4 * 8 * 2 - 4 * 2, cost.seconds
    (16, True, None)
    """

    def answer(model: Model, batch: Batch) -> Any:
        outputs = model(batch)
        if output not in outputs:
            raise MissingError(f"the model gives no {output!r}; it gives {sorted(outputs)}")
        return outputs[output]

    compiled = jax.jit(answer).lower(model, batch).compile()
    times = []
    for _ in range(runs + 1 if runs else 0):
        started = time.perf_counter()
        jax.block_until_ready(compiled(model, batch))
        times.append(time.perf_counter() - started)
    seconds = float(np.median(times[1:])) if runs else None
    return Cost(tree.size(model.params), flops(compiled), memory(compiled), seconds)


def flops(program: Any) -> float:
    """Floating-point operations of a lowered or compiled program, as XLA counts them: the body of a loop once.

    NaN where XLA does not say.
    """
    return float((program.cost_analysis() or {}).get("flops", float("nan")))


def memory(program: Any) -> int:
    """Bytes that a compiled program holds: arguments, temporaries, and results that reuse none of the arguments."""
    size = program.memory_analysis()
    results = size.output_size_in_bytes - size.alias_size_in_bytes
    return int(size.argument_size_in_bytes + results + size.temp_size_in_bytes)
