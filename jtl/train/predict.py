"""Run a model over batches and gather what it gives, row by row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from jtl import tree
from jtl.errors import InputError, MissingError
from jtl.model import Model
from jtl.prefetch import prefetch


@partial(jax.jit, static_argnames=("names", "taps"))
def _forward(model: Model, batch: Any, names: tuple[str, ...], taps: tuple[str, ...]) -> dict[str, jax.Array]:
    outputs = model(batch, taps=taps)
    known = {**batch, **outputs, **outputs.get("taps", {})}
    missing = [name for name in names if name not in known]
    if missing:
        known.pop("taps", None)
        raise MissingError(
            f"the model gives no {missing[0]!r}, nor has the batch it; they have {sorted(known)}"
            f" (near misses: {tree.near_misses(missing[0], known)})"
        )
    return {name: known[name] for name in names}


def outputs(
    model: Model,
    batches: Iterable[Any],
    names: Sequence[str] = ("features",),
    *,
    taps: Sequence[str] = (),
    mesh: Mesh | None = None,
) -> dict[str, np.ndarray]:
    """What ``model`` gives for every example, in the order of the batches: ``{name: (N, ...)}``.

    Batches of texts come by length: take ``"index"`` among the names to know which example a row is.

    Dropout is off and normalisation uses running statistics. It compiles once for each shape of batch, and
    models that differ only in the values of their leaves share the compilation.

    Args:
        model: any model; with a mesh, one whose leaves lie on it.
        batches: dicts of arrays with B rows each. Rows of ``weight`` 0 are dropped.
        names: outputs of the model, or fields of the batch such as ``"label"``.
        taps: modules whose outputs to return too, under their paths.
        mesh: the devices over which the rows are split; B must divide by their number.

    Raises:
        KeyError: neither the model nor the batch has an output of that name.
        ValueError: there are no batches, or an output's shape differs between batches in more than B.
    """
    wanted, taps = (*names, *taps), tuple(taps)
    parts: list[dict[str, np.ndarray]] = []
    waiting: Any = None
    with closing(prefetch(batches, mesh)) as ready:
        for batch, _, _ in ready:
            weighted = (*wanted, "weight") if "weight" in batch else wanted
            computing = _forward(model, batch, weighted, taps)
            # Fetched one batch late, so that the devices are at work meanwhile.
            parts += [_rows(waiting)] if waiting is not None else []
            waiting = computing
    if waiting is None:
        raise InputError("no batches: nothing to predict")
    parts.append(_rows(waiting))
    gathered = {}
    for name in wanted:
        shapes = {part[name].shape[1:] for part in parts}
        if len(shapes) > 1:
            raise InputError(
                f"{name!r} has rows of shapes {sorted(shapes)} in different batches: no one array holds them"
            )
        gathered[name] = np.concatenate([part[name] for part in parts])
    return gathered


def predict(
    model: Model, batches: Iterable[Any], mesh: Mesh | None = None
) -> tuple[Float[np.ndarray, "N C"], Int[np.ndarray, " N"]]:
    """The logits and labels of every example. See ``outputs``, which also takes unlabelled batches."""
    found = outputs(model, batches, ("logits", "label"), mesh=mesh)
    return found["logits"], found["label"]


def _rows(computed: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    arrays = {name: _fetch(x) for name, x in computed.items()}
    if "weight" in arrays:
        real = arrays["weight"] > 0
        arrays = {name: x[real] for name, x in arrays.items()}
    return arrays


def _fetch(x: jax.Array) -> np.ndarray:
    if x.is_fully_addressable:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
