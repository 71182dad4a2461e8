"""The forward of an adapted layer: with an adapted weight, or low-rank products and factors of activations added."""

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

from jtl.adapters.method import Leaves, LowRank, Method, Scaling
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
    """Returns what ``module`` computes with the adapter's ``leaves`` in it.

    The module runs as a detached copy, so its own options (strides, dtype, precision, ...) apply.

    Args:
        site: the layer.
        method: the adapter.
        module: a bound module.
        params: its own leaves.
        leaves: the adapter's.
        call: the name of the module's method: ``__call__``, or ``attend`` of an embedding.
        args: positional arguments of that method.
        kwargs: keyword arguments of it.
        train: whether the method's dropout is on.
        fold: whether a low-rank method may multiply by W + A·B: see ``low_rank``.
    """
    params = dict(params)
    if "bias" in params:
        params["bias"] = method.bias(site, params["bias"].ravel(), leaves).reshape(params["bias"].shape)
    hooks: dict[str, Any] = {}
    weight = params[site.weight]
    factors = None
    if isinstance(method, Scaling) and call == "__call__" and _beside_weight(method, site, leaves):
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


def _beside_weight(method: Scaling, site: Site, leaves: Leaves) -> bool:
    """Whether scaling activations can replace scaling the weight: not in grouped layers, nor for rows of a kernel."""
    return site.groups == 1 and (site.kind == "dense" or method.rows(site, leaves) is None)


@dataclass(frozen=True)
class _Factors:
    """A method at one layer: the products and factors that replace the layer's own product."""

    a: Float[Array, "m r"] | None
    b: Float[Array, "r n"] | None
    rows: Float[Array, " m"] | None
    columns: Float[Array, " n"] | None
    drop: Drop | None
    fold: bool

    @classmethod
    def of(
        cls,
        method: Scaling,
        site: Site,
        weight: Array,
        leaves: Leaves,
        training: nn.Module | None,
        fold: bool,
    ) -> _Factors:
        a = b = drop = None
        if isinstance(method, LowRank):
            a, b = method.factors(site, leaves)
            if training is not None and method.dropout:
                drop = partial(_dropout, method.dropout, training.make_rng("dropout"))
        return cls(a, b, method.rows(site, leaves), method.columns(site, weight, leaves), drop, fold)

    def dot(self, x: Array, kernel: Array, dimensions: Any, precision: Any = None, **_: Any) -> Array:
        """Replaces ``lax.dot_general`` in Dense and DenseGeneral."""
        axes = dimensions[0][0]
        x = jnp.moveaxis(x, axes, range(-len(axes), 0))
        before, rows = x.shape[: -len(axes)], math.prod(x.shape[-len(axes) :])
        x, weight = _times(x.reshape(*before, rows), self.rows), kernel.reshape(rows, -1)
        if self.a is None or self.b is None:
            y = jnp.matmul(x, weight, precision=precision)
        else:
            y = low_rank(x, weight, self.a, self.b, self.drop, precision, fold=self.fold)
        return _times(y, self.columns).reshape(*before, *kernel.shape[len(axes) :])

    def conv(
        self, conv: Any, shape: tuple[int, ...], x: Array, kernel: Array, *args: Any, **options: Any
    ) -> Array:
        """Replaces ``lax.conv_general_dilated`` in Conv: A is a convolution to r channels, B a 1 x 1 convolution."""
        conv = conv or lax.conv_general_dilated
        y = conv(x, kernel, *args, **options)
        if self.a is None or self.b is None:
            return _times(y, self.columns)
        narrow = self.a.reshape(*shape[:-1], -1).astype(x.dtype)
        inner = conv(x if self.drop is None else self.drop(x), narrow, *args, **options)
        return _times(y + inner @ self.b.astype(x.dtype), self.columns)

    def beside(self, outputs: Array, ids: Array) -> Array:
        """Returns an embedding's outputs with the rows of A·B added."""
        if self.a is None or self.b is None:
            return _times(outputs, self.columns)
        rows = jnp.take(self.a, ids, axis=0)
        rows = rows if self.drop is None else self.drop(rows)
        return _times(outputs + (rows @ self.b).astype(outputs.dtype), self.columns)


def _times(x: Array, factors: Array | None) -> Array:
    """``x`` with its last axis scaled."""
    if factors is None:
        return x
    return x * jnp.expand_dims(factors, range(x.ndim - 1)).astype(x.dtype)


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
    """Computes ``x W + drop(x) A B``.

    With at least as many rows in x as in W, in float32 and without dropout, a CPU computes this as one product with W
    + A·B; the gradient is still taken through the factors. Other platforms compute the three products, because they
    round operands, and small factors would be lost in the sum. In this case the function is a ``jax.custom_vjp``:
    differentiate it again in reverse mode, not by ``jax.jvp``.

    Args:
        x: inputs.
        weight: W.
        a: A.
        b: B.
        drop: dropout on the input of A.
        precision: of the products.
        fold: turn off for rows that each have their own factors; then W + A·B is never formed.
    """
    if fold and drop is None and x.dtype == jnp.float32 and math.prod(x.shape[:-1]) >= len(weight):
        return _folded(x, weight, a.astype(x.dtype), b.astype(x.dtype), precision)
    low = x if drop is None else drop(x)
    return jnp.matmul(x, weight, precision=precision) + (low @ a.astype(x.dtype)) @ b.astype(x.dtype)


def _product(x: Array, weight: Array, a: Array, b: Array, precision: Any) -> Array:
    """x (W + A·B): one product on CPU, where that is exact, and three elsewhere."""
    dot = partial(jnp.matmul, precision=precision)
    return lax.platform_dependent(
        x, weight, a, b,
        cpu=lambda x, weight, a, b: dot(x, weight + dot(a, b)),
        default=lambda x, weight, a, b: dot(x, weight) + dot(dot(x, a), b),
    )  # fmt: skip


def _forward(x: Array, weight: Array, a: Array, b: Array, precision: Any) -> tuple[Array, Any]:
    return _product(x, weight, a, b, precision), (x, weight, a, b)


def _backward(precision: Any, saved: Any, dy: Array) -> tuple[Array, ...]:
    x, weight, a, b = saved
    dot = partial(jnp.matmul, precision=precision)
    rows, drows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    # While W is frozen the second is unused, so XLA does not compute it.
    return (
        _product(dy, weight.T, b.T, a.T, precision),
        dot(rows.T, drows),
        dot(rows.T, dot(drows, b.T)),
        dot(dot(rows, a).T, drows),
    )


_folded = jax.custom_vjp(_product, nondiff_argnums=(4,))
_folded.defvjp(_forward, _backward)
