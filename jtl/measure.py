"""The cost of a model or a compiled program: parameters, floating-point operations, memory and seconds."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import jax
import numpy as np

from jtl import tree
from jtl.errors import MissingError
from jtl.model import Inputs, Model


class Cost(NamedTuple):
    """The cost of a forward on one batch.

    Attributes:
        parameters: number of scalars in ``params``.
        flops: floating-point operations, see ``flops``.
        bytes: memory of the compiled program, see ``memory``.
        seconds: median time of a compiled, warm call; None if it was not run.
    """

    parameters: int
    flops: float
    bytes: int
    seconds: float | None


def forward(model: Model, batch: Inputs, *, output: str = "logits", runs: int = 20) -> Cost:
    """Measure ``model`` computing ``output`` for ``batch`` in evaluation mode.

    Times depend on the machine and its load: compare models one after another on an idle machine.

    Args:
        model: any model.
        batch: the arrays to compile for; with ``runs=0`` shapes suffice.
        output: the output to compute; XLA drops what it does not depend on.
        runs: number of timed calls, after one warm-up call.

    Returns:
        The cost; ``seconds`` is None with ``runs=0``.

    Raises:
        KeyError: the model has no such output.

    >>> from jtl.wrap import function
    >>> model = function(lambda params, x: {"logits": x @ params["w"]}, {"w": jax.numpy.ones((8, 2))})
    >>> cost = forward(model, {"x": jax.numpy.ones((4, 8))}, runs=0)
    >>> cost.parameters, cost.flops >= 2 * 4 * 8 * 2 - 4 * 2, cost.seconds
    (16, True, None)
    """

    def answer(model: Model, batch: Inputs) -> Any:
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
    """Return the floating-point operations of a lowered or compiled program, as XLA counts them: a loop's body once.

    NaN where XLA does not report them.
    """
    return float((program.cost_analysis() or {}).get("flops", float("nan")))


def memory(program: Any) -> int:
    """Return the bytes a compiled program holds: arguments, temporaries, and results that do not reuse an argument."""
    size = program.memory_analysis()
    results = size.output_size_in_bytes - size.alias_size_in_bytes
    return int(size.argument_size_in_bytes + results + size.temp_size_in_bytes)
