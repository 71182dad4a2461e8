"""Frozen features: any output or activation of a model over a whole data set, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from jtl import tree
from jtl._files import cache_dir, write_file
from jtl.errors import InputError
from jtl.features.reads import reads
from jtl.model import Model

Fields = Mapping[str, Any]
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class DataKey:
    """What identifies the rows that a loader gives, in their order.

    Attributes:
        name: of the data set.
        split: of it.
        fingerprint: a hash of the content: raw rows, their selection and order; ``digest`` makes one of arrays.
        preprocessing: all that turns a raw row into a batch's: tokenizer, length, image size; JSON values.
    """

    name: str
    split: str
    fingerprint: str
    preprocessing: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.fingerprint:
            raise InputError(
                f"DataKey of {self.name!r} needs the fingerprint of its content; a name alone goes stale"
            )


def digest(arrays: PyTree) -> str:
    """SHA-256 of the paths, types, shapes and bytes of all leaves, in hex.

    >>> digest({"a": np.zeros(2)}) == digest({"a": np.zeros(2)})
    True
    >>> digest({"a": np.zeros(2)}) == digest({"a": np.zeros((1, 2))})
    False
    """
    sha = hashlib.sha256()
    for path, leaf in tree.flatten(arrays).items():
        array = np.ascontiguousarray(leaf)
        sha.update(f"{path} {array.dtype} {np.shape(leaf)}\n".encode())
        sha.update(array.reshape(-1).view(np.uint8).data)
    return sha.hexdigest()


def extract(
    model: Model,
    batches: Iterable[Fields],
    at: Sequence[str] = ("features",),
    *,
    keep: Sequence[str] = ("label",),
) -> Arrays:
    """Outputs and activations of ``model`` over ``batches``, as arrays of N rows each.

    The forward is deterministic: no dropout, running normalisation statistics. Rows of ``weight`` 0
    (padding of a last batch) are left out, and where batches have ``index`` (as those of ``jtl.data`` do) rows come
    in its order, that of the split. Sequences of different lengths are padded with zeros at their end.

    Args:
        model: any model.
        batches: dicts of arrays with a first axis of rows.
        at: names of outputs (``"features"``, ``"pooled"``) or paths of modules (``"encoder/layer_3"``).
        keep: fields of the batch to return too, such as ``label`` or ``attention_mask``; one that is
            absent is left out.

    Raises:
        KeyError: no output or module is called so; near misses are listed.
        ValueError: no rows, or shapes of rows that differ in more than a length.
    """
    forward, iterator = _start(model, batches, at)
    return _collect(forward, model, iterator, at, keep)


def cached(
    model: Model,
    batches: Iterable[Fields],
    data: DataKey,
    at: Sequence[str] = ("features",),
    *,
    keep: Sequence[str] = ("label",),
    folder: str | os.PathLike | None = None,
) -> Arrays:
    """``extract``, from a file if the same features were computed before.

    The file is named by a hash of the program that XLA would run (so of the module, its techniques and the
    code behind them), of every leaf it reads, of ``data``, ``at`` and ``keep``; a change of any is another
    file. A head above what is extracted counts for nothing. Only the first of ``batches`` is read when the
    file is there; a damaged file is computed anew.

    Args:
        model: any model.
        batches: read once, in order.
        data: what identifies ``batches``.
        at: see ``extract``.
        keep: see ``extract``.
        folder: by default ``features`` in jtl's cache folder (``$JTL_CACHE``).
    """
    forward, iterator = _start(model, batches, at)
    first = next(iterator)
    used = tree.flatten(reads(forward, model, first)[0])
    leaves = {path: leaf for path, leaf in tree.flatten(model.variables).items() if used[path]}
    program = jax.jit(forward).lower(model, first).as_text()
    described = json.dumps(
        [vars(data) | {"preprocessing": dict(data.preprocessing)}, [*at], [*keep]], sort_keys=True
    )
    name = hashlib.sha256("\0".join((program, digest(leaves), described)).encode()).hexdigest()[:32]
    readable = re.sub(r"[^\w.-]+", "-", f"{data.name}-{data.split}")
    file = Path(folder or cache_dir() / "features") / f"{readable}-{name}.npz"
    try:
        with open(file, "rb") as stream, np.load(stream, allow_pickle=False) as saved:
            return {key: saved[key] for key in saved.files}
    except FileNotFoundError:
        pass
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        file.unlink()
    arrays = _collect(forward, model, chain([first], iterator), at, keep)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, lambda stream: np.savez(stream, **arrays))  # type: ignore[arg-type]
    return arrays


def _start(model: Model, batches: Iterable[Fields], at: Sequence[str]) -> tuple[Any, Iterator[Fields]]:
    if isinstance(at, str):
        raise InputError(f"at is a sequence of names: write at=({at!r},)")
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        raise InputError("there are no batches to extract features from")
    known = jax.eval_shape(lambda model, batch: model(batch), model, first)
    taps = tuple(name for name in at if name not in known)

    def forward(model: Model, batch: Fields) -> dict[str, Any]:
        outputs = model(batch, taps=taps)
        return {name: outputs["taps"][name] if name in taps else outputs[name] for name in at}

    return forward, chain([first], iterator)


def _collect(
    forward: Any, model: Model, batches: Iterable[Fields], at: Sequence[str], keep: Sequence[str]
) -> Arrays:
    compiled = jax.jit(forward)
    parts: dict[str, list[np.ndarray]] = {}
    for batch in batches:
        values = {**compiled(model, batch), **{name: batch[name] for name in {*keep, "index"} & batch.keys()}}
        rows = len(next(iter(values.values())))
        real = np.asarray(batch["weight"]) > 0 if "weight" in batch else np.ones(rows, bool)
        for name, value in values.items():
            parts.setdefault(name, []).append(np.asarray(value)[real])
    arrays = {name: _concatenate(name, part) for name, part in parts.items()}
    if not len(arrays[at[0]]):
        raise InputError("all rows of the batches have weight 0: there are no features to extract")
    order = np.argsort(arrays["index"], kind="stable") if "index" in arrays else slice(None)
    return {name: array[order] for name, array in arrays.items() if name in (*at, *keep)}


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
