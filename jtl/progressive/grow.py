"""``grow``: one more column for a new task. Rusu et al. 2016, https://arxiv.org/abs/1606.04671.

With columns 1 ... k - 1 trained and frozen, block i of column k computes

    h_i^k = σ(W_i h_{i-1}^k + U_i σ(V_i [α_1 h_{i-1}^1, ..., α_{k-1} h_{i-1}^{k-1}]))

U starts at 0, so that a new column computes, to the bit, what it would alone; the paper draws U and takes α small.
A column is a whole model, its head included. The leaves of the first stay where they are, those of column k lie under
``column_k`` and its laterals under ``column_k/lateral``: a model of k columns is a part of the one grown from it.
"""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax
from jaxtyping import Array, PyTree

from jtl import measure, tree
from jtl.errors import InputError
from jtl.heads import Head, attach
from jtl.model import Batch, Linen, Model, arguments
from jtl.progressive import blocks
from jtl.progressive.columns import LATERAL, Column, Columns, Lateral, name_of, part

BODY = {"features", "pooled", "sequence", "map"}  # outputs that answer no task


def grow(
    model: Model,
    column: Model | None = None,
    *,
    where: str,
    batch: Batch,
    key: Array,
    laterals: Literal["nonlinear", "linear", "off"] = "nonlinear",
    alpha: float = 0.1,
) -> Model:
    """``model`` with one more column, whose outputs are the model's from now on.

    Train it with ``labels(model)``, which freeze the columns before; ``task(model, k)`` is the model of task k.
    Adapters go into a model before it becomes a column; adapters of a grown model would meet every column.

    Args:
        model: a model with a head, or one that has grown already.
        column: the new column, a model with a head; its blocks may be of other widths. By default one like the last,
            drawn anew from ``key``: Linen modules, whose only techniques are heads.
        where: a regular expression of the paths of blocks, such as ``"dense_.*|head"`` or
            ``"encoder/layer_[0-9]+|head"``. Laterals lead into all of them but the first, whose input is the data;
            each reads the inputs of the same block in all earlier columns. A layer within ``nn.scan`` is no block.
        batch: a smallest batch to trace the columns with; its values do not matter.
        key: for the new leaves.
        laterals: the paper's adapters, the plain connections of its equation 1, or none: independent columns.
        alpha: where every α starts; the paper searches 1, 0.1 and 0.01.

    Raises:
        RuleError: ``where`` meets fewer than two blocks of the new column.
        ValueError: a column has no head, lacks a block that the new one has, or has it over other positions; a block
            gives no single array or runs twice; or the last column cannot be drawn anew.
    """
    if laterals not in ("nonlinear", "linear", "off"):
        raise InputError(f"laterals must be 'nonlinear', 'linear' or 'off', got {laterals!r}")
    number = columns(model) + 1
    name = name_of(number)
    earlier = [single_column(model, k) for k in range(1, number)]
    new_key, lateral_key = jax.random.split(key)
    new = reinitialise(earlier[-1], batch, key=new_key) if column is None else column
    for k, one in enumerate([*earlier, new], 1):
        _check_head(one, k, batch)
    if name in model.params or LATERAL in new.params:
        raise InputError(f"{name!r} and {LATERAL!r} name parts of a grown model: rename yours")

    leaves: dict[str, Array] = {}
    built: list[Lateral] = []
    if laterals != "off":
        own, *others = [
            blocks.find(one, where, batch, k) for k, one in ((number, new), *enumerate(earlier, 1))
        ]
        if len(own) < 2:
            raise tree.RuleError(
                f"where={where!r} meets the blocks {list(own)} of the new column: it should meet two or more, "
                "since the first, whose input is the data, gets no lateral"
            )
        for path in list(own)[1:]:
            widths = [blocks.width_of(path, own[path], other, k) for k, other in enumerate(others, 1)]
            values = blocks.init(own[path], path, widths, laterals, alpha, tree.fold_path(lateral_key, path))
            leaves |= {f"{LATERAL}/{path}/{leaf}": value for leaf, value in values.items()}
            linear = laterals == "linear"
            axis = -2 if linear and isinstance(own[path].layer, nn.Conv) else 0
            built.append(Lateral(path, tuple(range(1, number)), tuple(widths), linear, axis))

    placed = {**new.variables, "params": {**new.params, **tree.nest(leaves)}}
    variables = dict(model.variables)
    for collection, values in placed.items():
        variables[collection] = {**variables.get(collection, {}), name: values}
    added = Column(new.base, new.techniques, new.config, tuple(built))
    return _with_columns(model.replace(variables=variables), (*_columns(model), added))


def columns(model: Model) -> int:
    """How many columns the model has: 1 before it has grown."""
    return len(_columns(model)) + 1


def task(model: Model, number: int) -> Model:
    """The model of one task: columns 1 ... ``number`` alone, the very model that it was before it grew further.

    Raises ValueError if there is no such column.
    """
    _check_number(model, number)
    variables = {
        collection: {name: leaf for name, leaf in leaves.items() if name not in _after(model, number)}
        for collection, leaves in model.variables.items()
    }
    kept = {collection: leaves for collection, leaves in variables.items() if leaves}
    return _with_columns(model.replace(variables=kept), _columns(model)[: number - 1])


def single_column(model: Model, number: int) -> Model:
    """One column as a model of its own, without its laterals. ValueError if there is no such column."""
    _check_number(model, number)
    variables = part(model.variables, number)
    if number == 1:
        before = [i for i, t in enumerate(model.techniques) if isinstance(t, Columns)]
        own = model.techniques[: before[0]] if before else model.techniques
        return model.replace(variables=variables, techniques=own)
    column = _columns(model)[number - 2]
    variables["params"] = {name: leaf for name, leaf in variables["params"].items() if name != LATERAL}
    return Model(variables, column.base, column.techniques, column.config)


def labels(model: Model) -> PyTree:
    """Labels for the train step: the newest column with its laterals at the full rate, all before it frozen."""
    newest = name_of(columns(model)) + "/"
    return tree.map_with_path(
        lambda path, _: float(columns(model) == 1 or path.startswith(newest)), model.params
    )


def replace_columns(model: Model, earlier: Model) -> Model:
    """``model`` with the columns of ``earlier``, one of fewer columns, in place of its own first ones.

    So a checkpoint of k columns goes into a model of more: restore it into ``task(model, k)`` and put that.

    Raises ValueError if the first columns of ``model`` are others than those of ``earlier``, naming what differs.
    """
    number = columns(earlier)
    if number > columns(model):
        raise InputError(f"earlier has {number} columns, the model {columns(model)}: grow it first")
    like = task(model, number)
    if differs := tree.diff(like.variables, earlier.variables):
        raise InputError(f"the first {number} columns differ from earlier's: {', '.join(differs[:5])}")
    if (like.base, like.techniques) != (earlier.base, earlier.techniques):
        raise InputError(f"the first {number} columns compute another function than earlier's")
    variables = {
        name: tree.overlay(leaves, earlier.variables.get(name, {}), replace=True)
        for name, leaves in model.variables.items()
    }
    return model.replace(variables=variables)


def cost(model: Model, batch: Batch) -> list[dict[str, int | float]]:
    """What each column costs: a row of ``column``, its ``parameters`` and ``lateral_parameters``, and ``flops``.

    ``flops`` are those of one forward of ``task(model, column)`` on ``batch``, as XLA counts them before it optimises.
    """
    rows: list[dict[str, int | float]] = []
    for number in range(1, columns(model) + 1):
        one = task(model, number)
        params = part(one.variables, number)["params"]
        answer = lambda one, batch: _answers(one(batch))  # noqa: E731
        rows.append(
            {
                "column": number,
                "parameters": tree.size(params),
                "lateral_parameters": tree.size(params.get(LATERAL, {})),
                "flops": measure.flops(jax.jit(answer).lower(one, batch)),
            }
        )
    return rows


# --- columns ---------------------------------------------------------------------------------------


def _columns(model: Model) -> tuple[Column, ...]:
    found = [technique for technique in model.techniques if isinstance(technique, Columns)]
    return found[0].columns if found else ()


def _with_columns(model: Model, columns: tuple[Column, ...]) -> Model:
    """The model with these columns past the first, in the place of those it has."""
    technique = (Columns(columns),) if columns else ()
    there = [i for i, t in enumerate(model.techniques) if isinstance(t, Columns)]
    at = there[0] if there else len(model.techniques)
    return model.replace(
        techniques=(*model.techniques[:at], *technique, *model.techniques[at + len(there) :])
    )


def _after(model: Model, number: int) -> set[str]:
    return {name_of(later) for later in range(number + 1, columns(model) + 1)}


def _check_number(model: Model, number: int) -> None:
    if not 1 <= number <= columns(model):
        raise InputError(
            f"there is no column for task {number}: the model has {columns(model)}, tasks 1 to {columns(model)}; "
            "grow it first"
        )


def _answers(outputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in outputs.items() if name not in BODY}


def _check_head(model: Model, number: int, batch: Batch) -> None:
    outputs = jax.eval_shape(lambda model, batch: model(batch), model, batch)
    if not _answers(outputs):
        raise InputError(
            f"column {number} has no head: it gives {sorted(outputs)} alone; attach one before you grow, "
            "jtl.heads.classifier(model, classes, ...)"
        )


def reinitialise(model: Model, batch: Batch, *, key: Array) -> Model:
    """A model of the same Linen modules, their leaves drawn anew.

    Raises ValueError for a model outside Linen, or one with techniques other than heads.
    """
    others = [type(t).__name__ for t in model.techniques if not isinstance(t, Head)]
    if not isinstance(model.base, Linen) or others:
        what = f"has {', '.join(others)}" if others else f"wraps {type(model.base).__name__}"
        raise InputError(
            f"the last column {what}, so it cannot be drawn anew: pass column=, a model with a head"
        )
    module = model.base.module
    inputs = arguments(type(module).__call__, batch, type(module).__name__)
    drawn = jax.jit(lambda key, inputs: module.init(key, **inputs))(key, inputs)
    new = Model({name: dict(leaves) for name, leaves in drawn.items()}, model.base, (), model.config)
    for number, head in enumerate(t for t in model.techniques if isinstance(t, Head)):
        width = jax.eval_shape(lambda model, batch: model(batch), new, batch)[head.on].shape[-1]
        own = jax.random.fold_in(key, number)
        new = attach(new, head.module, on=head.on, width=width, key=own, name=head.name, output=head.output)
    return new
