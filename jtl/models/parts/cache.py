"""Key-value cache of a decoder: the keys and values of the tokens read so far, and the position of the next one.

A ``cache`` collection has ``filled``, the number of tokens it holds; ``real``, which of them are not padding; and
``keys`` and ``values`` (B, H, T, E) at every attention layer. A module without a cache in its variables reads whole
texts.

The heads axis comes before the tokens, as the products of attention read them. In the other order a CPU transposes keys
and values for every generated token, and Whisper base took 240 ms per token for four recordings instead of 28 ms.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, Shaped


class Place(NamedTuple):
    """Where the L tokens of a forward are among the T tokens that attention sees: those of the cache, or their own L.

    Attributes:
        start: position of the first.
        real: which of the T are not padding.
        seen: whether token q may attend to token k: k is real and not after q.
    """

    start: Int[Array, ""]
    real: Bool[Array, "B T"]
    seen: Bool[Array, "B 1 L T"]


def place(module: nn.Module, new: Bool[Array, "B L"]) -> Place:
    """Append tokens to the module's cache, if it has one, and return where they are.

    Args:
        module: the module with the ``cache`` collection.
        new: which of the new tokens are not padding.
    """
    L, start, real = new.shape[1], jnp.zeros((), jnp.int32), new
    if module.has_variable("cache", "filled"):
        filled: nn.Variable = module.variable("cache", "filled")
        kept: nn.Variable = module.variable("cache", "real")
        start, real = filled.value, lax.dynamic_update_slice_in_dim(kept.value, new, filled.value, 1)
        filled.value, kept.value = start + L, real
    before = jnp.arange(real.shape[1])[None] <= start + jnp.arange(L)[:, None]
    return Place(start, real, (real[:, None] & before[None])[:, None])


def positions(real: Bool[Array, "B L"]) -> Int[Array, "B L"]:
    """Number the real tokens of each row 0, 1, 2, ...; padding takes the position of the token before it, at least 0.

    >>> positions(jnp.array([[0, 1, 1, 0]]) != 0).tolist()
    [[0, 0, 1, 1]]
    """
    return jnp.maximum(jnp.cumsum(real, 1) - 1, 0)


def remembered(
    module: nn.Module, name: str, new: Shaped[Array, "B L H E"], start: Int[Array, ""] | None
) -> Shaped[Array, "B T H E"]:
    """Return keys or values of all tokens of the module's cache, after writing the ``new`` ones at ``start``.

    Without ``start`` they replace the old ones. Without a cache the new ones are returned.

    Args:
        module: the attention layer.
        name: ``"keys"`` or ``"values"``.
        new: those of the new tokens.
        start: position of the first new token.
    """
    if not module.has_variable("cache", name):
        return new
    kept: nn.Variable = module.variable("cache", name)
    value = new.swapaxes(1, 2).astype(kept.value.dtype)
    if start is not None:
        value = lax.dynamic_update_slice_in_dim(kept.value, value, start, 2)
    kept.value = value
    return value.swapaxes(1, 2).astype(new.dtype)


def recalled(module: nn.Module, name: str, dtype: Any) -> Shaped[Array, "B T H E"]:
    """Return keys or values of all tokens of the module's cache when there are no new tokens."""
    return module.get_variable("cache", name).swapaxes(1, 2).astype(dtype)


def empty(rows: int, length: int, **layers: Any) -> dict[str, Any]:
    """Return an empty cache for ``length`` tokens of ``rows`` texts; ``layers`` are the parts of its submodules."""
    return {"filled": jnp.zeros((), jnp.int32), "real": jnp.zeros((rows, length), bool), **layers}


def keys_and_values(rows: int, length: int, heads: int, size: int, *, dtype: Any) -> dict[str, Array]:
    """Return the empty keys and values of one attention layer."""
    return {name: jnp.zeros((rows, heads, length, size), dtype) for name in ("keys", "values")}
