"""Layers that the transformers share: activations, MLP, masked mean.

Parameters may be bfloat16: matrix products then run in bfloat16, softmax and layer norm in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jtl import tree
from jtl.errors import InputError

Ids = Int[Array | np.ndarray, "B L"]  # token ids and masks, as they come from a loader
Images = Float[Array | np.ndarray, "B H W C"]


@jax.custom_jvp
def _gelu(x):
    # jax.nn.gelu computes erfc, which takes 1.7 times as long in XLA on a CPU.
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


@_gelu.defjvp
def _gelu_jvp(primals, tangents):
    # The backward pass needs erf again. A factor that differs in the last bit makes XLA recompute it from x, where it
    # would otherwise store two more arrays of x's size in every layer.
    (x,), (dx,) = primals, tangents
    again = jax.lax.erf(x * float(np.nextafter(np.float32(0.5**0.5), np.float32(0))))
    density = jnp.exp(-0.5 * x * x) * (2 * jnp.pi) ** -0.5
    return _gelu(x), (0.5 * (1 + again) + x * density) * dx


def _gelu_tanh(x):
    return nn.gelu(x, approximate=True)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {  # values of ``hidden_act`` in config.json
    "gelu": _gelu,
    "gelu_python": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_accurate": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "mish": jax.nn.mish,
    "hardswish": jax.nn.hard_swish,
    "leaky_relu": lambda x: jax.nn.leaky_relu(x, 0.01),
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "linear": lambda x: x,
}


def activation(name: str) -> Callable[[Array], Array]:
    """Return the activation function that config.json calls ``name``.

    Raises:
        ValueError: there is none; the message lists near misses.
    """
    if name not in ACTIVATIONS:
        near = tree.near_misses(str(name), ACTIVATIONS) or sorted(ACTIVATIONS)
        raise InputError(f"activation {name!r} is unknown; did you mean {', '.join(near)}?")
    return ACTIVATIONS[name]


def dense(features: int, name: str, std: float, bias: bool = True) -> nn.Dense:
    """Return a dense layer initialised as in BERT: normal kernel, zero bias."""
    return nn.Dense(features, use_bias=bias, kernel_init=nn.initializers.normal(std), name=name)


def mean_over(sequence: Float[Array, "B L D"], mask: Ids | None) -> Float[Array, "B D"]:
    """Mean over the positions whose mask is set (all without a mask); zero if none is."""
    if mask is None:
        return sequence.mean(1)
    weight = mask.astype(sequence.dtype)
    return jnp.einsum("bld,bl->bd", sequence, weight) / jnp.maximum(weight.sum(1, keepdims=True), 1)


def last_over(sequence: Float[Array, "B L D"], real: Bool[Array, "B L"]) -> Float[Array, "B D"]:
    """Return the entry at the last real position of each row; at the very last position if none is real."""
    last = real.shape[1] - 1 - jnp.argmax(real[:, ::-1], 1)
    return jnp.take_along_axis(sequence, last[:, None, None], 1)[:, 0]


class Mlp(nn.Module):
    """Two dense layers with an activation between them, on the last axis."""

    hidden: int
    act: str
    std: float = 0.02
    output_std: float | None = None  # None: std

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Apply both layers."""
        h = activation(self.act)(dense(self.hidden, "intermediate", self.std)(x))
        return dense(x.shape[-1], "output", self.std if self.output_std is None else self.output_std)(h)
