"""Pruning of progressive networks: removes laterals that carry nothing, so that unused columns no longer run.

Rusu et al. 2016, "Progressive Neural Networks", https://arxiv.org/abs/1606.04671, appendix B, find most of the
capacity unused and leave pruning open.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from jtl import tree
from jtl.errors import InputError
from jtl.model import Model
from jtl.progressive.columns import LATERAL, Columns, Lateral, name_of


def prune(model: Model, sensitivity: Mapping[str, np.ndarray], *, below: float = 0.01) -> Model:
    """Returns ``model`` without the lateral sources of its last column whose sensitivity is under ``below``.

    It computes what it would with α_j = 0 at these sources, and has fewer leaves. A lateral without sources is
    removed. A column that the last one no longer reads, directly or through others, does not run for its task, but
    keeps its leaves, because it serves its own task.

    Args:
        model: a grown model.
        sensitivity: the shares of the columns by block, from ``fisher_sensitivity`` or ``perturbation_sensitivity``.
        below: the smallest share that is kept.

    Raises:
        ValueError: the model has not grown, or ``sensitivity`` lacks a block or is for another number of columns.
    """
    technique = next((t for t in model.techniques if isinstance(t, Columns)), None)
    if technique is None:
        raise InputError("the model has one column, and nothing to prune: grow it first")
    number = len(technique.columns) + 1
    name, column = name_of(number), technique.columns[-1]
    params = tree.flatten(model.params)
    kept: list[Lateral] = []
    for lateral in column.laterals:
        if lateral.path not in sensitivity or len(sensitivity[lateral.path]) != number:
            raise InputError(
                f"the sensitivity of block {lateral.path!r} to {number} columns is needed; found blocks "
                f"{sorted(sensitivity)}: measure it on this model"
            )
        shares = sensitivity[lateral.path]
        keep = [place for place, source in enumerate(lateral.sources) if shares[source - 1] >= below]
        prefix = f"{name}/{LATERAL}/{lateral.path}/"
        own = {
            path.removeprefix(prefix): params.pop(path) for path in list(params) if path.startswith(prefix)
        }
        if keep:
            params |= {prefix + leaf: value for leaf, value in _rows(lateral, own, keep).items()}
            sources, widths = (tuple(x[place] for place in keep) for x in (lateral.sources, lateral.widths))
            kept.append(replace(lateral, sources=sources, widths=widths))
    pruned = Columns((*technique.columns[:-1], replace(column, laterals=tuple(kept))))
    techniques = tuple(pruned if t is technique else t for t in model.techniques)
    return model.with_params(tree.nest(params)).replace(techniques=techniques)


def _rows(lateral: Lateral, leaves: dict[str, Any], keep: list[int]) -> dict[str, Any]:
    """The leaves of a lateral for the sources at the indices ``keep``."""
    ends = np.cumsum([0, *lateral.widths])
    rows = np.concatenate([np.arange(ends[place], ends[place + 1]) for place in keep])
    if lateral.linear:
        return {"u": jnp.take(leaves["u"], rows, lateral.axis)}
    return {**leaves, "alpha": leaves["alpha"][np.array(keep)], "v": leaves["v"][rows]}
