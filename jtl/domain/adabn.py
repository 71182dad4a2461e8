"""AdaBN: adapts a model by re-estimating the running statistics of batch normalisation on target rows.

Li et al. 2016, "Revisiting Batch Normalization For Practical Domain Adaptation", https://arxiv.org/abs/1603.04779.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jtl import tree
from jtl.errors import InputError
from jtl.model import Batch, Mode, Model


def adabn(model: Model, batches: Iterable[Mapping[str, Any]]) -> Model:
    """Returns ``model`` with ``batch_stats`` that are the means and variances over all rows of ``batches``.

    Statistics are pooled over batches, Σ n (v + m²) / Σ n - mean², so they do not depend on a layer's momentum. Within
    a batch, each layer is normalised by that batch. A single batch of all rows is exact.

    Args:
        model: with normalisation layers that keep ``mean`` and ``var`` (``flax.linen.BatchNorm``).
        batches: mappings of arrays, of target rows; rows of ``weight`` 0 are dropped. Each batch size compiles once.

    Raises:
        ValueError: the model has no such statistics, a layer never updates them, or there are no rows.
    """
    stats = model.variables.get("batch_stats")
    paths = tree.flatten(stats or {})
    if not paths:
        raise InputError("the model has no running statistics: AdaBN needs batch normalisation")
    if odd := [path for path in paths if path.split("/")[-1] not in ("mean", "var")]:
        raise InputError(f"running statistics must be named mean or var; found {odd[0]!r}")
    sums: dict[str, Any] = {}
    count = 0
    for batch in batches:
        rows = _counted(batch)
        n = len(jax.tree.leaves(rows)[0])
        if not n:
            continue
        found = {path: np.asarray(leaf, np.float64) for path, leaf in tree.flatten(_own(model, rows)).items()}
        for path, value in found.items():
            if path.endswith("var"):
                value = value + found[path.removesuffix("var") + "mean"] ** 2
            sums[path] = sums.get(path, 0.0) + n * value
        count += n
    if not count:
        raise InputError("AdaBN: the batches hold no row of weight over 0")
    means = {path: total / count for path, total in sums.items()}
    for path in means:
        if path.endswith("var"):
            means[path] = np.maximum(means[path] - means[path.removesuffix("var") + "mean"] ** 2, 0.0)
    if not all(np.isfinite(value).all() for value in means.values()):
        raise InputError("AdaBN found statistics that are not finite: does a layer have momentum 1?")
    new = tree.nest({path: jnp.asarray(value, paths[path].dtype) for path, value in means.items()})
    return model.replace(variables={**model.variables, "batch_stats": new})


def _counted(batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
    rows = {name: np.asarray(value) for name, value in batch.items()}
    if "weight" not in rows:
        return rows
    kept = rows["weight"] > 0
    return {name: value[kept] for name, value in rows.items()}


@jax.jit
def _own(model: Model, batch: Batch) -> PyTree:
    """One batch's statistics: an update is m·old + (1 - m)·new, so old = 0 and old = 1 determine m and new."""

    def updated(old: float) -> PyTree:
        filled = jax.tree.map(lambda leaf: jnp.full_like(leaf, old), model.variables["batch_stats"])
        start = model.replace(variables={**model.variables, "batch_stats": filled})
        return start.run(batch, Mode(stats="batch"))[1]["batch_stats"]

    return jax.tree.map(lambda zero, one: zero / (1 - jnp.median(one - zero)), updated(0.0), updated(1.0))
