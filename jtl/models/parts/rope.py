"""Rotary position embedding (RoPE): queries and keys are rotated by angles proportional to their position.

Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding", https://arxiv.org/abs/2104.09864,
section 3.2, with the two halves of a head as the pairs, as in ``transformers``. Scalings for texts longer than in
pretraining: linear (Chen et al. 2023, https://arxiv.org/abs/2306.15595, eq. 4) and that of Llama 3.1
(https://arxiv.org/abs/2407.21783), whose formula is only in its code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jtl.errors import InputError


@dataclasses.dataclass(frozen=True)
class Linear:
    """Divides all frequencies by ``factor``."""

    rope_type: ClassVar[str] = "linear"
    factor: float

    def lower(self, turns: Float[np.ndarray, " R"]) -> Float[np.ndarray, " R"]:
        """Return the scaled frequencies in radians per position."""
        return turns / self.factor


@dataclasses.dataclass(frozen=True)
class Llama3:
    """Divides low frequencies by ``factor`` and keeps high ones, with a linear transition in between.

    Attributes:
        factor: divisor of the low frequencies.
        low_freq_factor: a frequency with fewer periods in the original text length is low.
        high_freq_factor: one with more periods is high.
        original_max_position_embeddings: the original text length in tokens.
    """

    rope_type: ClassVar[str] = "llama3"
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def lower(self, turns: Float[np.ndarray, " R"]) -> Float[np.ndarray, " R"]:
        """Return the scaled frequencies in radians per position."""
        periods = self.original_max_position_embeddings * turns / (2 * np.pi)
        share = np.clip(
            (periods - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1
        )
        return (1 - share) * turns / self.factor + share * turns


SCALINGS = {scaling.rope_type: scaling for scaling in (Linear, Llama3)}


def from_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings ``rope_theta`` and ``rope_scaling`` (a scaling or None) of a ``transformers`` config.json.

    In v4 of ``transformers`` both are at the top level, in v5 in one dict ``rope_parameters``.

    Raises:
        ValueError: a setting is not supported.
    """
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if found.get("partial_rotary_factor", config.get("partial_rotary_factor")) not in (None, 1.0):
        raise InputError("config.json: partial_rotary_factor is not supported: whole heads are turned")
    theta = float(found.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = found.get("rope_type", found.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if kind not in SCALINGS:
        raise InputError(
            f"config.json: rope_type={kind!r} is not supported; supported: 'default', {', '.join(map(repr, SCALINGS))}"
        )
    names = [field.name for field in dataclasses.fields(SCALINGS[kind])]
    if lacking := [name for name in names if found.get(name) is None]:
        raise InputError(f"config.json: rope_type {kind!r} lacks {', '.join(lacking)}")
    return {"rope_theta": theta, "rope_scaling": SCALINGS[kind](**{name: found[name] for name in names})}


def to_hf(scaling: Linear | Llama3 | None) -> dict[str, Any] | None:
    """Return the content of ``rope_scaling`` in config.json."""
    return None if scaling is None else {"rope_type": scaling.rope_type, **dataclasses.asdict(scaling)}


def frequencies(size: int, theta: float, scaling: Linear | Llama3 | None) -> Float[np.ndarray, " R"]:
    """Return the radians per position of the R = E / 2 pairs of a head of size E: ``theta^(-2i / E)``, scaled.

    Args:
        size: E.
        theta: the base.
        scaling: for texts longer than in pretraining; None for none.
    """
    turns = theta ** (-np.arange(0, size, 2) / size)
    return (turns if scaling is None else scaling.lower(turns)).astype(np.float32)


def rotate(x: Float[Array, "B L N E"], angles: Float[Array, "B L R"]) -> Float[Array, "B L N E"]:
    """Rotate each pair (i, i + R) of every head by its angle, in float32; E = 2R."""
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = jnp.split(x, 2, -1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.astype(x.dtype)
