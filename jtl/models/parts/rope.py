"""Rotary position embedding: queries and keys are turned by angles that grow with their position.

Su et al.: "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021, https://arxiv.org/abs/2104.09864,
section 3.2, with the two halves of a head as its pairs, as `transformers` has them. Scalings for texts longer than
those of pretraining: linear (Chen et al. 2023, https://arxiv.org/abs/2306.15595, eq. 4) and that of Llama 3.1
(https://arxiv.org/abs/2407.21783), whose formula only its code gives.
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
    """Divides all frequencies by `factor`."""

    rope_type: ClassVar[str] = "linear"
    factor: float

    def lower(self, turns: Float[np.ndarray, " R"]) -> Float[np.ndarray, " R"]:
        """The scaled frequencies, radians per position."""
        return turns / self.factor


@dataclasses.dataclass(frozen=True)
class Llama3:
    """Divides low frequencies by `factor` and keeps high ones.

    Low are those with less than `low_freq_factor` periods in a text of `original_max_position_embeddings` tokens, high
    those with more than `high_freq_factor`; in between the one goes over into the other.
    """

    rope_type: ClassVar[str] = "llama3"
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def lower(self, turns: Float[np.ndarray, " R"]) -> Float[np.ndarray, " R"]:
        """The scaled frequencies, radians per position."""
        periods = self.original_max_position_embeddings * turns / (2 * np.pi)
        share = np.clip(
            (periods - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1
        )
        return (1 - share) * turns / self.factor + share * turns


SCALINGS = {scaling.rope_type: scaling for scaling in (Linear, Llama3)}


def from_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings `rope_theta` and `rope_scaling` (a scaling or None) of a config.json of `transformers` v4 or v5.

    v4 has both at the top, v5 one dict `rope_parameters`. Raises ValueError for what is not computed here.
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
    """What config.json has at `rope_scaling`."""
    return None if scaling is None else {"rope_type": scaling.rope_type, **dataclasses.asdict(scaling)}


def frequencies(size: int, theta: float, scaling: Linear | Llama3 | None) -> Float[np.ndarray, " R"]:
    """Radians per position of each of the R = E / 2 pairs of a head of `size` E: `theta^(-2i / E)`, scaled."""
    turns = theta ** (-np.arange(0, size, 2) / size)
    return (turns if scaling is None else scaling.lower(turns)).astype(np.float32)


def rotate(x: Float[Array, "B L N E"], angles: Float[Array, "B L R"]) -> Float[Array, "B L N E"]:
    """Turn each pair (i, i + R) of every head by its angle, in float32; E = 2R."""
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = jnp.split(x, 2, -1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.astype(x.dtype)
