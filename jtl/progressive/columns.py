"""The forward of a progressive network: columns run in order, each reading activations of the earlier ones.

Rusu et al. 2016, "Progressive Neural Networks", https://arxiv.org/abs/1606.04671.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jtl.model import Batch, Forward, Mode, Model, Outputs, State, Technique, Variables

LAYERS = (nn.Dense, nn.DenseGeneral, nn.Conv)  # blocks of these kinds have a U of the same kind
LATERAL = "lateral"  # where a column's laterals lie among its leaves
SHIFT = "shift"  # a collection {column: {block: array}}, added to the inputs of blocks; see sensitivity.py
Hidden = dict[str, Array]


def name_of(number: int) -> str:
    """Returns the name under which a column's leaves lie; those of column 1 have no such prefix.

    >>> name_of(2)
    'column_2'
    """
    return f"column_{number}"


@dataclass(frozen=True)
class Lateral:
    """What one block of column k receives from earlier columns, added to its output before the nonlinearity.

    ``U σ(V [α_j h_j])`` over the sources j (section 2, "Adapters"), σ a ReLU; or, linear, ``U [h_j]`` (equation 1).
    h_j is the input of the same block in column j. V is a matrix on the last axis, which for a convolution is a 1 × 1
    convolution. U is of the block's kind, a dense layer or a convolution, without bias; for other blocks it is a
    matrix on the last axis.

    Attributes:
        path: of the block.
        sources: numbers of the columns, from 1.
        widths: features of each source.
        linear: whether only U connects.
        axis: the axis of V, or of a linear U, along which the sources are concatenated.
    """

    path: str
    sources: tuple[int, ...]
    widths: tuple[int, ...]
    linear: bool
    axis: int

    def __call__(self, module: nn.Module, leaves: Mapping[str, Array], hidden: Sequence[Array]) -> Array:
        """Returns the sum to add, from the activations of the sources in order."""
        x = jnp.concatenate(hidden, -1)
        if self.linear:
            return _through(module, leaves["u"], x)
        # α scales the rows of V, not x, whose gradient would cost as much as x V and is not needed.
        rows = jnp.repeat(leaves["alpha"], np.array(self.widths), total_repeat_length=sum(self.widths))
        return _through(module, leaves["u"], jax.nn.relu(x @ (rows[:, None] * leaves["v"])))


def _through(module: nn.Module, u: Array, x: Array) -> Array:
    if isinstance(module, LAYERS):
        # A detached copy, so that strides, padding and so on are those of the block.
        layer: Any = module.clone(parent=None, name=None, use_bias=False)
        return layer.apply({"params": {"kernel": u}}, x)
    return x @ u


@dataclass(frozen=True)
class Column:
    """A column after the first: a whole model, including its head, and its laterals.

    Attributes:
        base: of the model.
        techniques: of the model.
        config: of the model.
        laterals: what it reads from earlier columns, in the order of its blocks.
    """

    base: Forward
    techniques: tuple[Technique, ...]
    config: Any
    laterals: tuple[Lateral, ...]


@dataclass(frozen=True)
class Columns:
    """The technique: column 1 is the forward it wraps; the outputs are those of the last column.

    Earlier columns run once each, without dropout and with running normalisation statistics, and only if the last one
    reads them, directly or through others. Taps are named like the leaves: ``dense_0`` of column 1,
    ``column_2/dense_0`` of column 2.

    Attributes:
        columns: those after the first.
    """

    columns: tuple[Column, ...]

    def needed(self) -> set[int]:
        """Returns the numbers of the columns that the last one reads, including itself."""
        last = len(self.columns) + 1
        found: set[int] = set()
        waiting = [last]
        while waiting:
            number = waiting.pop()
            if number not in found:
                found.add(number)
                waiting += [source for lateral in self.laterals(number) for source in lateral.sources]
        return found

    def laterals(self, number: int) -> tuple[Lateral, ...]:
        """Returns the laterals of a column."""
        return () if number == 1 else self.columns[number - 2].laterals

    def blocks(self, number: int) -> set[str]:
        """Returns the blocks of a column whose inputs later columns read, or that have a lateral."""
        later = [lateral for other in self.needed() if other > number for lateral in self.laterals(other)]
        read = {lateral.path for lateral in later if number in lateral.sources}
        return read | {lateral.path for lateral in self.laterals(number)}

    def wrap(self, forward: Forward) -> Forward:
        """Returns ``forward`` followed by the later columns."""
        last = len(self.columns) + 1

        def run(variables: Variables, batch: Batch, mode: Mode, key: Array | None) -> tuple[Outputs, State]:
            shifts = variables.get(SHIFT, {})
            tapped = _by_column(mode.taps, last)
            hidden: dict[int, Hidden] = {}
            taps: dict[str, Any] = {}
            for number in sorted(self.needed() | set(tapped)):
                final, own = number == last, tapped.get(number, ())
                how = replace(mode, taps=own) if final else Mode(taps=own)
                leaves = part(variables, number)
                below = forward if number == 1 else _forward(leaves, self.columns[number - 2])
                hidden[number] = {}
                intercept = self._interceptor(number, leaves["params"], shifts.get(str(number), {}), hidden)
                with nn.intercept_methods(intercept):
                    outputs, state = below(leaves, batch, how, key if final else None)
                prefix = "" if number == 1 else name_of(number) + "/"
                taps |= {prefix + path: found for path, found in outputs.pop("taps", {}).items()}
            if SHIFT in variables:
                outputs = {**outputs, "hidden": {str(number): own for number, own in hidden.items()}}
            whole = {name: {**variables[name], name_of(last): leaves} for name, leaves in state.items()}
            return {**outputs, **({"taps": taps} if taps else {})}, whole

        return run

    def _interceptor(
        self, number: int, params: Variables, shift: Mapping[str, Array], hidden: dict[int, Hidden]
    ) -> Callable[..., Any]:
        """Stores the inputs of this column's blocks in ``hidden`` and adds its laterals to their outputs."""
        blocks, laterals = self.blocks(number), {lateral.path: lateral for lateral in self.laterals(number)}

        def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            path = "/".join(context.module.path)
            if context.method_name != "__call__" or path not in blocks:
                return call(*args, **kwargs)
            (x, *others), structure = jax.tree.flatten((args, kwargs))
            if path in shift:
                x = x + shift[path]
                args, kwargs = jax.tree.unflatten(structure, (x, *others))
            hidden[number][path] = x
            y = call(*args, **kwargs)
            if path not in laterals:
                return y
            own: Any = params[LATERAL]
            for name in path.split("/"):
                own = own[name]
            read = [hidden[source][path] for source in laterals[path].sources]
            return y + laterals[path](context.module, own, read).astype(y.dtype)

        return intercept


def part(variables: Variables, number: int) -> dict[str, Any]:
    """Returns the collections of one column, as a model of its own would have them."""
    if number > 1:
        name = name_of(number)
        return {own: leaves[name] for own, leaves in variables.items() if name in leaves}
    return {
        own: {name: leaf for name, leaf in leaves.items() if not name.startswith("column_")}
        for own, leaves in variables.items()
        if own != SHIFT
    }


def _forward(variables: dict[str, Any], column: Column) -> Forward:
    def run(_: Variables, batch: Batch, mode: Mode, key: Array | None) -> tuple[Outputs, State]:
        return Model(variables, column.base, column.techniques).run(batch, mode, key)

    return run


def _by_column(taps: Sequence[str], last: int) -> dict[int, tuple[str, ...]]:
    """The taps of each column, by its own paths."""
    found: dict[int, tuple[str, ...]] = {}
    names = {name_of(number): number for number in range(2, last + 1)}
    for tap in taps:
        first, _, rest = tap.partition("/")
        number, own = (names[first], rest) if first in names else (1, tap)
        found[number] = (*found.get(number, ()), own)
    return found
