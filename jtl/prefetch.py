"""Prefetching: a thread moves batches to the devices before the train step needs them."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from jtl import sharding as meshes


class Ready(NamedTuple):
    """A batch on the devices.

    Attributes:
        batch: its arrays.
        examples: number of real rows on this process: those of ``weight`` above 0, if there are weights.
        state: the loader's state after this batch, as JSON text; None if the loader has none.
    """

    batch: PyTree
    examples: int
    state: str | None


def prefetch(
    batches: Iterable[Any], mesh: Mesh | None = None, depth: int = 2
) -> Generator[Ready, None, None]:
    """Yield ``batches``, read and moved to the devices by a thread that stays ``depth`` batches ahead.

    Each batch carries the loader's state after it, because the loader itself is ahead of the train step. Close the
    generator to stop the thread.

    Args:
        batches: arrays by field; an iterator with ``get_state()`` is resumable.
        mesh: the devices over which to split the rows; None for the default device.
        depth: number of batches to read ahead.
    """
    iterator = iter(batches)
    stateful = hasattr(iterator, "get_state")

    def load() -> Ready | None:
        batch = next(iterator, None)
        if batch is None:
            return None
        # Serialised at once, since a loader may later mutate the state it returned.
        state = json.dumps(iterator.get_state()) if stateful else None  # type: ignore[attr-defined]
        moved = jax.device_put(batch) if mesh is None else meshes.global_batch(batch, mesh)
        return Ready(moved, examples(batch), state)

    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        ahead = deque(pool.submit(load) for _ in range(depth))
        try:
            while (ready := ahead.popleft().result()) is not None:
                ahead.append(pool.submit(load))
                yield ready
        finally:
            for waiting in ahead:
                waiting.cancel()


def examples(batch: PyTree) -> int:
    """Return the number of real rows in a batch."""
    if isinstance(batch, dict) and "weight" in batch:
        return int(np.count_nonzero(np.asarray(batch["weight"])))
    return len(jax.tree.leaves(batch)[0])
