"""Pruning: laterals that carry nothing go, and columns that nothing reads no longer run.

Rusu et al. 2016, https://arxiv.org/abs/1606.04671, appendix B, find most of the capacity unused and leave this open.
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
    """``model`` without the sources of its last column's laterals whose sensitivity is under ``below``.

    It computes what it would with α_j = 0 at these sources, and has fewer leaves. A lateral without sources is gone;
    a column that the last reads no more, through others either, does not run for its task. It keeps its leaves, as it
    answers its own.

    Args:
        model: a grown model.
        sensitivity: by block the shares of the columns, from ``fisher_sensitivity`` or ``perturbation_sensitivity``.
        below: the least share that is kept.

    Raises:
        ValueError: the model has not grown, or ``sensitivity`` lacks a block or speaks of other columns.
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
    """The leaves of a lateral for the sources at the places ``keep``."""
    ends = np.cumsum([0, *lateral.widths])
    rows = np.concatenate([np.arange(ends[place], ends[place + 1]) for place in keep])
    if lateral.linear:
        return {"u": jnp.take(leaves["u"], rows, lateral.axis)}
    return {**leaves, "alpha": leaves["alpha"][np.array(keep)], "v": leaves["v"][rows]}
