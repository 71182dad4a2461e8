"""Rotary position embedding: queries and keys are turned by angles that grow with their position.

Su et al.: "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021, https://arxiv.org/abs/2104.09864,
section 3.2, with the two halves of a head as its pairs, as `transformers` has them. Scalings for texts longer than
those of pretraining: linear (Chen et al. 2023, https://arxiv.org/abs/2306.15595, eq. 4) and that of Llama 3.1
(https://arxiv.org/abs/2407.21783), whose formula only its code gives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

LLAMA3 = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How frequencies are lowered, under the names of `rope_scaling` in config.json.

    `linear` divides all by `factor`. `llama3` divides those whose wavelength exceeds
    `original_max_position_embeddings / low_freq_factor` positions, keeps those with one below
    `original_max_position_embeddings / high_freq_factor`, and goes over from one to the other in between.
    """

    rope_type: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None

    def __post_init__(self):
        needed = {"linear": (), "llama3": LLAMA3}.get(self.rope_type)
        if needed is None:
            raise ValueError(
                f"config.json: rope_type={self.rope_type!r} is not supported; supported: 'default', 'linear', 'llama3'"
            )
        if lacking := [name for name in needed if getattr(self, name) is None]:
            raise ValueError(f"config.json: rope_type {self.rope_type!r} lacks {', '.join(lacking)}")


def from_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings `rope_theta` and `rope_scaling` of a config.json of `transformers` v4 or v5.

    v4 has both at the top, v5 one dict `rope_parameters`. Raises ValueError for a scaling that is not computed here.
    """
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = found.pop("rope_theta", config.get("rope_theta", 10000.0))
    kind = found.pop("rope_type", None) or found.get("type", "default")
    found.pop("type", None)
    if found.pop("partial_rotary_factor", config.get("partial_rotary_factor")) not in (None, 1.0):
        raise ValueError("config.json: partial_rotary_factor is not supported: whole heads are turned")
    if kind == "default":
        return {"rope_theta": float(theta), "rope_scaling": None}
    known = {field.name for field in dataclasses.fields(RopeScaling)}
    if "factor" not in found:
        raise ValueError(f"config.json: rope_type {kind!r} lacks factor")
    scaling = RopeScaling(kind, **{name: value for name, value in found.items() if name in known})
    return {"rope_theta": float(theta), "rope_scaling": scaling}


def frequencies(size: int, theta: float, scaling: RopeScaling | None) -> Float[np.ndarray, " R"]:
    """Radians per position of each of the R = E / 2 pairs of a head of `size` E: `theta^(-2i / E)`, scaled."""
    turns = theta ** (-np.arange(0, size, 2) / size)
    if scaling is None:
        return turns.astype(np.float32)
    low = turns / scaling.factor
    if scaling.rope_type == "llama3":
        first, last = scaling.low_freq_factor, scaling.high_freq_factor
        periods = scaling.original_max_position_embeddings * turns / (2 * np.pi)  # in a text of pretraining
        share = np.clip((periods - first) / (last - first), 0, 1)
        low = (1 - share) * low + share * turns
    return low.astype(np.float32)


def rotate(x: Float[Array, "B L N E"], angles: Float[Array, "B L R"]) -> Float[Array, "B L N E"]:
    """Turn each pair (i, i + R) of every head by its angle, in float32; E = 2R."""
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = jnp.split(x, 2, -1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.astype(x.dtype)


def positions(real: Bool[Array, "B L"]) -> Int[Array, "B L"]:
    """0, 1, 2, ... along the real tokens of each row; padding takes the position of the token before it, at least 0.

    >>> positions(jnp.array([[0, 1, 1, 0]]) != 0).tolist()
    [[0, 0, 1, 1]]
    """
    return jnp.maximum(jnp.cumsum(real, 1) - 1, 0)
