"""Frozen features: any output or activation of a model over a whole data set, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
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
from jtl.model import Batch, Model
from jtl.outputs import forward_of, outputs
from jtl.trace import reads


@dataclass(frozen=True)
class DataKey:
    """Identifies the rows that a loader returns, in their order.

    Attributes:
        name: of the data set.
        split: of the data set.
        fingerprint: a hash of the content: raw rows, their selection and order; ``digest`` makes one from arrays.
        preprocessing: everything between a raw row and a row of a batch (tokenizer, length, image size), as JSON
            values.
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
    """SHA-256, in hex, of the paths, types, shapes and bytes of all leaves.

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


def cached(
    model: Model,
    batches: Iterable[Batch],
    data: DataKey,
    at: Sequence[str] = ("features",),
    *,
    keep: Sequence[str] = ("label",),
    folder: str | os.PathLike | None = None,
) -> dict[str, np.ndarray]:
    """Returns what ``jtl.outputs.outputs`` does, read from a file if the same features were computed before.

    The file name is a hash of the program that XLA would run (so of the module, its techniques and their code), of
    every leaf the program reads, of ``data``, ``at`` and ``keep``; changing any of these gives another file. A head
    above the extracted output does not count. If the file exists, only the first of ``batches`` is read. A damaged
    file is recomputed.

    Args:
        model: any model.
        batches: read once, in order.
        data: identifies ``batches``.
        at: names of outputs (``"features"``, ``"pooled"``) or paths of modules (``"encoder/layer_3"``).
        keep: fields of the batch to store too, such as ``label`` or ``attention_mask``; absent ones are skipped.
        folder: by default ``features`` in jtl's cache folder (``$JTL_CACHE``).
    """
    forward, batches = forward_of(model, batches, at)
    iterator = iter(batches)
    first = next(iterator)
    used = tree.flatten(reads(forward, model, first)[0].variables)
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
    kept = [name for name in keep if name in first]
    arrays = outputs(model, chain([first], iterator), [*at, *kept])
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, lambda stream: np.savez(stream, **arrays))  # type: ignore[arg-type]
    return arrays
