"""Many adapters in one forward: each row of a batch runs with its own adapter and head over a shared backbone.

The leaves of N adapters are stacked (N, ...). Each row selects its own by index, and the model is mapped over rows:
XLA computes one product of all rows with each shared W, and a batched product with the rows' own factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jtl import tree
from jtl.adapters.insert import Adapter
from jtl.errors import InputError, MissingError
from jtl.model import Batch, Forward, Mode, Model, Outputs, State, Variables

INDEX = "adapter"


@dataclass(frozen=True)
class PerRow:
    """The technique behind ``serve``; the outermost of its model.

    Attributes:
        own: a regular expression of the paths of the stacked leaves.
        count: how many are stacked, N.
    """

    own: str
    count: int

    def wrap(self, forward: Forward) -> Forward:
        """Returns ``forward`` mapped over rows that each have their own leaves."""

        def run(variables: Variables, batch: Batch, mode: Mode, key: Array | None) -> tuple[Outputs, State]:
            index, fields = self._index(batch)
            if mode.stats == "batch":
                raise InputError(
                    "rows with adapters of their own share no batch statistics: ask for stats='running'"
                )
            mask = tree.matches(self.own, variables["params"])
            stacked, shared = tree.partition(variables["params"], mask)

            def one(own: PyTree, row: PyTree, key: Array | None) -> Outputs:
                params = tree.combine(own, shared)
                row = jax.tree.map(lambda field: field[None], row)
                return forward({**variables, "params": params}, row, mode, key)[0]

            keys = None if key is None else jax.random.split(key, len(index))
            own = jax.tree.map(lambda leaf: _rows_of(leaf, index), stacked)
            outputs = jax.vmap(one)(own, fields, keys)
            return tree.map_with_path(_joined, outputs), {}

        return run

    def _index(self, batch: Batch) -> tuple[Array, dict[str, Any]]:
        """Each row's adapter index, and the other fields."""
        if INDEX not in batch:
            found = sorted(batch)
            raise MissingError(
                f"the model serves {self.count} adapters and needs the batch field {INDEX!r}, the index (B,) of each "
                f"row's; the batch has {found}"
            )
        index, fields = batch[INDEX], {name: field for name, field in batch.items() if name != INDEX}
        if index.ndim != 1 or not jnp.issubdtype(index.dtype, jnp.integer):
            raise InputError(
                f"batch[{INDEX!r}] must be integers (B,), found {index.dtype}{list(index.shape)}"
            )
        for path, field in tree.flatten(fields).items():
            if field.shape[:1] != index.shape:
                raise InputError(
                    f"batch[{INDEX!r}] has {len(index)} rows, but {path!r} the shape {field.shape}"
                )
        if not isinstance(index, jax.core.Tracer):
            outside = sorted({int(i) for i in np.asarray(index) if not 0 <= i < self.count})
            if outside:
                raise InputError(
                    f"batch[{INDEX!r}] has {outside}; the model serves the adapters 0 to {self.count - 1}"
                )
        return index, fields


def serve(models: Sequence[Model], *, own: str) -> Model:
    """Combines N models into one: row i of a batch computes what ``models[batch["adapter"][i]]`` does.

    The backbone is stored and run once. Low-rank methods (``lora``, ``dora``, ``vera``), small activation adapters,
    prompts and heads cost a few operations of their own per row. A method that makes a whole weight (``loha``,
    ``lokr``, ``ia3``, and everything reparametrised) makes one for each row. The result is a model like any other: it
    also trains on batches of mixed rows, with ``train_only(model, own)``.

    ``batch["adapter"]`` holds integers (B,). An index outside 0 to N - 1 raises outside of ``jit``; inside, where its
    value is unknown, the row's outputs are NaN.

    Args:
        models: models with the same function, such as adapters of equal rank and heads with equally many classes
            inserted into one model, or ``jtl.train.run_of`` a sweep.
        own: a regular expression of the leaves that each model has for itself, for example ``".*/lora/.*|head/.*"``.

    Raises:
        RuleError: ``own`` matches no leaf.
        ValueError: there is no model; or a model computes another function, has leaves of other shapes, or differs in
            a leaf that ``own`` does not match.
    """
    if not models:
        raise InputError("serve needs at least one model")
    first = models[0]
    if any(isinstance(technique, PerRow) for technique in first.techniques):
        raise InputError("model 0 serves many adapters already: serve [pick(model, i), ...]")
    mask = tree.matches(own, first.params)
    for i, model in enumerate(models[1:], start=1):
        _check_alike(first, model, own, f"model {i}")
    trees = [model.params for model in models]
    params = jax.tree.map(lambda keep, *leaves: jnp.stack(leaves) if keep else leaves[0], mask, *trees)
    techniques = (*_marked(first, served=True), PerRow(own, len(models)))
    return first.with_params(params).replace(techniques=techniques)


def pick(model: Model, index: int) -> Model:
    """Returns one model, the one that rows with this ``index`` compute with: the inverse of ``serve``."""
    technique = _served(model, index)
    mask = tree.matches(technique.own, model.params)
    params = jax.tree.map(lambda leaf, own: leaf[index] if own else leaf, model.params, mask)
    alone = model.replace(techniques=model.techniques[:-1])
    return alone.replace(techniques=_marked(alone, served=False)).with_params(params)


def swap(model: Model, index: int, new: Model) -> Model:
    """Returns ``model`` with ``new`` in place of adapter ``index``; raises as ``serve`` does.

    Shapes and static parts do not change, so a compiled forward can be reused.
    """
    technique = _served(model, index)
    _check_alike(pick(model, index), new, technique.own, "the new model")
    mask = tree.matches(technique.own, new.params)
    put = lambda leaves, own, leaf: leaves.at[index].set(leaf) if own else leaves  # noqa: E731
    return model.with_params(jax.tree.map(put, model.params, mask, new.params))


def _marked(model: Model, *, served: bool) -> tuple[Any, ...]:
    return tuple(replace(t, served=served) if isinstance(t, Adapter) else t for t in model.techniques)


def _served(model: Model, index: int) -> PerRow:
    technique = model.techniques[-1] if model.techniques else None
    if not isinstance(technique, PerRow):
        raise InputError(
            "this model serves no adapters: make one by jtl.adapters.serve, and put nothing on top of it"
        )
    if not 0 <= index < technique.count:
        raise InputError(f"adapter {index}: the model serves the adapters 0 to {technique.count - 1}")
    return technique


def _check_alike(first: Model, other: Model, own: str, name: str) -> None:
    """Raises ValueError unless the two are one function and differ only in leaves that ``own`` matches."""
    if other.replace(variables={}) != first.replace(variables={}):
        raise InputError(
            f"{name} computes another function than the first: base, techniques and config must be equal"
        )
    if lines := tree.diff(first.variables, other.variables):
        raise InputError(f"{name} has other leaves than the first: {'; '.join(lines[:5])}")
    mask = tree.flatten({"params": tree.matches(own, first.params)})
    one, two = tree.flatten(first.variables), tree.flatten(other.variables)
    differ = [
        path for path in one
        if not mask.get(path) and one[path] is not two[path] and not jnp.array_equal(one[path], two[path])
    ]  # fmt: skip
    if differ:
        raise InputError(
            f"{name} differs from the first in {len(differ)} leaves that own={own!r} does not meet, such as "
            f"{differ[0]!r}: those that rows have for themselves are stacked, all others shared"
        )


def _rows_of(leaf: Array, index: Array) -> Array:
    """``leaf[index]``, with NaN for an index out of range, where JAX would otherwise return a neighbour's leaf."""
    return leaf.at[index].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def _joined(path: str, rows: Array) -> Array:
    """(B, 1, ...) as (B, ...)."""
    if rows.shape[1:2] != (1,):
        raise InputError(
            f"output {path!r} of one row has the shape {rows.shape[1:]}; its first axis must be the rows'"
        )
    return rows[:, 0]
