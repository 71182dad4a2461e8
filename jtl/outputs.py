"""A model's outputs over a whole data set, in its order: for prediction, feature extraction and validation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import chain, repeat
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jtl import trace, tree
from jtl.errors import InputError, MissingError
from jtl.loss import Loss
from jtl.model import Batch, Mode, Model
from jtl.prefetch import prefetch


def outputs(
    model: Model,
    batches: Iterable[Batch],
    names: Sequence[str] = ("features",),
    *,
    mesh: Mesh | None = None,
) -> dict[str, np.ndarray]:
    """Return a model's outputs for every example of the batches: ``{name: (N, ...)}``.

    The forward is deterministic: no dropout, running normalisation statistics. If batches have ``index`` (as those of
    ``jtl.data`` do), rows are sorted by it, which is the data set's order; else they keep the order of the batches. It
    compiles once per batch shape, and models that differ only in the values of their leaves share the compilation.

    Args:
        model: any model; with a mesh, one whose leaves are on it.
        batches: mappings of arrays with B rows each. Rows of ``weight`` 0 (padding of the last batch) are dropped.
        names: outputs of the model (``"features"``, ``"logits"``), paths of its modules (``"encoder/layer_3"``), or
            batch fields such as ``"label"``. Sequences of different lengths are padded with zeros at the end.
        mesh: the devices over which to split the rows; their number must divide B.

    Raises:
        KeyError: neither the model nor the batch has an output of that name; the message lists near misses.
        ValueError: there are no rows, or rows differ in shape beyond their first axis.
    """
    wanted, taps, batches = _begin(model, batches, names)
    parts: list[dict[str, np.ndarray]] = []
    waiting: Any = None
    with closing(prefetch(batches, mesh)) as ready:
        for batch, _, _ in ready:
            computing = _forward(model, batch, (*wanted, *{"weight", "index"} & batch.keys()), taps)
            # Fetched one batch late, so that the devices stay busy meanwhile.
            parts += [_rows(waiting)] if waiting is not None else []
            waiting = computing
    return _gather([*parts, _rows(waiting)], wanted)


def predict(
    model: Model, batches: Iterable[Batch], mesh: Mesh | None = None
) -> tuple[Float[np.ndarray, "N C"], Int[np.ndarray, " N"]]:
    """Return the logits and labels of every example. For unlabelled batches use ``outputs``."""
    found = outputs(model, batches, ("logits", "label"), mesh=mesh)
    return found["logits"], found["label"]


def mean_loss(
    loss: Loss,
    model: Model,
    batches: Iterable[Batch],
    *,
    weight: str | None = None,
    train: bool = False,
    keys: Iterable[Array | None] = repeat(None),
) -> tuple[float, float]:
    """Return the mean of a loss over batches, and their total weight.

    Args:
        loss: any loss of jtl.
        model: the model.
        batches: mappings of arrays.
        weight: the loss's metric that weights a batch, such as ``"tokens"``; None weights all batches equally.
        train: run the forward in training mode, with dropout and the noise of techniques.
        keys: a random key for each batch.

    Raises:
        ValueError: there are no batches.
    """
    found = np.array(
        [_loss(loss, model, batch, key, weight, train) for batch, key in zip(batches, keys, strict=False)],
        np.float64,
    )
    if not len(found):
        raise InputError("no batches: no mean to take")
    return float(np.average(found[:, 0], weights=found[:, 1])), float(found[:, 1].sum())


@partial(jax.jit, static_argnames=("weight", "train"))
def _loss(
    loss: Loss, model: Model, batch: Batch, key: Array | None, weight: str | None, train: bool
) -> tuple[Array, Array]:
    mode = loss.mode() or Mode()
    found, _ = model.run(batch, Mode(train, mode.stats if train else "running", mode.taps), key)
    value, metrics = loss.value(model, found, batch, key)
    return value, jnp.ones(()) if weight is None else metrics[weight]


@partial(jax.jit, static_argnames=("names", "taps"))
def _forward(model: Model, batch: Batch, names: tuple[str, ...], taps: tuple[str, ...]) -> dict[str, Array]:
    return _named(model, batch, names, taps)


def _named(model: Model, batch: Batch, names: tuple[str, ...], taps: tuple[str, ...]) -> dict[str, Array]:
    found = model(batch, taps=taps)
    known = {**batch, **found, **found.get("taps", {})}
    return {name: known[name] for name in names}


def _begin(
    model: Model, batches: Iterable[Batch], names: Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...], Iterable[Batch]]:
    """Return the names, those that are module paths, and the batches with the peeked first one put back."""
    if isinstance(names, str):
        raise InputError(f"names is a sequence: write ({names!r},)")
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        raise InputError("there are no batches: nothing to run the model on")
    if not isinstance(first, Mapping):
        raise InputError(f"a batch is a mapping of arrays by field, found {type(first).__name__}")
    outputs = jax.eval_shape(lambda model, batch: model(batch), model, first)
    taps = tuple(name for name in names if name not in outputs and name not in first)
    if taps:
        paths = trace.modules(lambda model, batch: model(batch), model, first)
        if missing := [name for name in taps if name not in paths]:
            raise MissingError(
                f"the model gives no {missing[0]!r}: no module lies there, and no output or field is called so. They "
                f"are {sorted({*outputs, *first} - {'taps'})} (near misses: "
                f"{tree.near_misses(missing[0], [*outputs, *first, *paths])})"
            )
    return tuple(names), taps, chain([first], iterator)


def forward_of(
    model: Model, batches: Iterable[Batch], names: Sequence[str]
) -> tuple[Callable[[Model, Batch], dict[str, Array]], Iterable[Batch]]:
    """Return the function that ``outputs`` compiles, and the batches with the peeked first one put back."""
    wanted, taps, batches = _begin(model, batches, names)
    return lambda model, batch: _named(model, batch, wanted, taps), batches


def _rows(computed: dict[str, Array]) -> dict[str, np.ndarray]:
    arrays = {name: _fetch(x) for name, x in computed.items()}
    if "weight" in arrays:
        real = arrays["weight"] > 0
        arrays = {name: x[real] for name, x in arrays.items()}
    return arrays


def _fetch(x: Array) -> np.ndarray:
    if x.is_fully_addressable:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def _gather(parts: list[dict[str, np.ndarray]], names: tuple[str, ...]) -> dict[str, np.ndarray]:
    arrays = {name: _concatenate(name, [part[name] for part in parts]) for name in parts[0]}
    if not len(arrays[names[0]]):
        raise InputError("all rows of the batches have weight 0: there is nothing to gather")
    order = np.argsort(arrays["index"], kind="stable") if "index" in arrays else slice(None)
    return {name: arrays[name][order] for name in names}


def _concatenate(name: str, parts: list[np.ndarray]) -> np.ndarray:
    if len({(part.ndim, part.shape[2:]) for part in parts}) > 1:
        raise InputError(
            f"{name!r} has rows of shapes {sorted({part.shape[1:] for part in parts})}: only the first axis of "
            "a row, its length, may differ"
        )
    if parts[0].ndim < 2:
        return np.concatenate(parts)
    length = max(part.shape[1] for part in parts)
    widths = [[(0, 0), (0, length - part.shape[1])] + [(0, 0)] * (part.ndim - 2) for part in parts]
    return np.concatenate([np.pad(part, width) for part, width in zip(parts, widths, strict=True)])
