"""The forward of an adapted layer: the layer itself with another weight, or with low-rank products in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jtl.adapters.method import Leaves, LowRank, Method
from jtl.adapters.site import Site

Drop = Callable[[Array], Array]


def run(
    site: Site,
    method: Method,
    module: nn.Module,
    params: Mapping[str, Array],
    leaves: Leaves,
    call: str,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    train: bool,
    fold: bool = True,
) -> Any:
    """What ``module`` computes on ``args`` with the adapter's ``leaves`` in it.

    The module runs as a detached copy, so its own options (strides, dtype, precision, ...) hold.

    Args:
        site: the layer.
        method: the adapter.
        module: bound.
        params: its own leaves.
        leaves: the adapter's.
        call: the name of the module's method: ``__call__``, or ``attend`` of an embedding.
        args: of that method.
        kwargs: likewise.
        train: whether the method's dropout is on.
        fold: whether a low-rank method may multiply by W + A·B: see ``low_rank``.
    """
    params = dict(params)
    if "bias" in params:
        params["bias"] = method.bias(site, params["bias"].ravel(), leaves).reshape(params["bias"].shape)
    hooks: dict[str, Any] = {}
    weight = params[site.weight]
    factors = None
    if isinstance(method, LowRank) and call == "__call__" and site.groups == 1:
        factors = _Factors.of(method, site, site.matrix(weight), leaves, module if train else None, fold)
        if site.kind == "dense":
            hooks["dot_general"] = factors.dot
        elif site.kind == "conv":
            hooks["conv_general_dilated"] = partial(factors.conv, module.conv_general_dilated, site.shape)
    else:
        params[site.weight] = method.weight(site, site.matrix(weight), leaves).reshape(weight.shape)
    outputs: Any = module.clone(parent=None, name=None, **hooks).apply(
        {"params": params}, *args, method=call, **kwargs
    )
    return (
        factors.beside(outputs, *args, *kwargs.values())
        if factors is not None and site.kind == "embed"
        else outputs
    )


@dataclass(frozen=True)
class _Factors:
    """A low-rank method at one layer: the products that take the place of the layer's own."""

    a: Float[Array, "m r"]
    b: Float[Array, "r n"]
    columns: Float[Array, " n"] | None
    drop: Drop | None
    fold: bool

    @classmethod
    def of(
        cls,
        method: LowRank,
        site: Site,
        weight: Array,
        leaves: Leaves,
        training: nn.Module | None,
        fold: bool,
    ) -> _Factors:
        drop = None
        if training is not None and method.dropout:
            drop = partial(_dropout, method.dropout, training.make_rng("dropout"))
        return cls(*method.factors(site, leaves), method.columns(site, weight, leaves), drop, fold)

    def dot(self, x: Array, kernel: Array, dimensions: Any, precision: Any = None, **_: Any) -> Array:
        """In place of ``lax.dot_general`` in Dense and DenseGeneral."""
        axes = dimensions[0][0]
        x = jnp.moveaxis(x, axes, range(-len(axes), 0))
        before, rows = x.shape[: -len(axes)], math.prod(x.shape[-len(axes) :])
        x, weight = x.reshape(*before, rows), kernel.reshape(rows, -1)
        y = low_rank(x, weight, self.a, self.b, self.drop, precision, fold=self.fold)
        return self._scaled(y).reshape(*before, *kernel.shape[len(axes) :])

    def conv(
        self, conv: Any, shape: tuple[int, ...], x: Array, kernel: Array, *args: Any, **options: Any
    ) -> Array:
        """In place of ``lax.conv_general_dilated`` in Conv: A is a convolution to r channels, B one of 1 x 1."""
        conv = conv or lax.conv_general_dilated
        narrow = self.a.reshape(*shape[:-1], -1).astype(x.dtype)
        inner = conv(x if self.drop is None else self.drop(x), narrow, *args, **options)
        return self._scaled(conv(x, kernel, *args, **options) + inner @ self.b.astype(x.dtype))

    def beside(self, outputs: Array, ids: Array) -> Array:
        """An embedding's outputs with the rows of A·B added."""
        rows = jnp.take(self.a, ids, axis=0)
        rows = rows if self.drop is None else self.drop(rows)
        return self._scaled(outputs + (rows @ self.b).astype(outputs.dtype))

    def _scaled(self, y: Array) -> Array:
        if self.columns is None:
            return y
        return y * jnp.expand_dims(self.columns, range(y.ndim - 1)).astype(y.dtype)


def _dropout(rate: float, key: Array, x: Array) -> Array:
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def low_rank(
    x: Float[Array, "*B m"],
    weight: Float[Array, "m n"],
    a: Float[Array, "m r"],
    b: Float[Array, "r n"],
    drop: Drop | None = None,
    precision: Any = None,
    *,
    fold: bool = True,
) -> Float[Array, "*B n"]:
    """``x W + drop(x) A B``.

    With more rows than W has, in float32 and without dropout, it is one product by W + A·B, whose gradient is
    nevertheless taken through the factors; bfloat16 would round small factors away in that sum. Not with ``fold``
    off, which is for rows that each have factors of their own.
    """
    if fold and drop is None and x.dtype == jnp.float32 and math.prod(x.shape[:-1]) >= len(weight):
        return _folded(x, weight, a.astype(x.dtype), b.astype(x.dtype), precision)
    low = x if drop is None else drop(x)
    return jnp.matmul(x, weight, precision=precision) + (low @ a.astype(x.dtype)) @ b.astype(x.dtype)


def _fold(x: Array, weight: Array, a: Array, b: Array, precision: Any) -> Array:
    return jnp.matmul(x, weight + a @ b, precision=precision)


def _forward(x: Array, weight: Array, a: Array, b: Array, precision: Any) -> tuple[Array, Any]:
    return _fold(x, weight, a, b, precision), (x, weight, a, b)


def _backward(precision: Any, saved: Any, dy: Array) -> tuple[Array, ...]:
    x, weight, a, b = saved
    dx = jnp.matmul(dy, (weight + a @ b).T, precision=precision)
    rows, drows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    # Unused, and so never computed, while W is frozen.
    dweight = jnp.matmul(rows.T, drows, precision=precision)
    return dx, dweight, rows.T @ (drows @ b.T), (rows @ a).T @ drows


_folded = jax.custom_vjp(_fold, nondiff_argnums=(4,))
_folded.defvjp(_forward, _backward)
