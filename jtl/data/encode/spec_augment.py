"""SpecAugment: masks bands of frequency and spans of time in spectrograms, as data augmentation for training.

Park et al. 2019, "SpecAugment: A Simple Data Augmentation Method for Automatic Speech Recognition",
https://arxiv.org/abs/1904.08779, section 2. Its third part, time warping, is left out: according to the paper it helps
least and costs most (section 5).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jtl.errors import InputError


def spec_augment(
    log_mel: Float[Array | np.ndarray, "B T M"],
    key: Array,
    *,
    frequency: int = 27,
    frequencies: int = 2,
    time: int = 100,
    times: int = 2,
    share: float = 1.0,
    lengths: Int[Array | np.ndarray, " B"] | None = None,
) -> Float[Array, "B T M"]:
    """Returns ``log_mel`` with masked regions set to the spectrogram's mean; each row has its own masks.

    A mask hides f adjacent bands, f uniform from 0 to ``frequency`` (the paper's F), or t frames, t uniform from 0 to
    ``time`` (T); its position is uniform. The paper masks with 0, the mean of its normalised spectrograms. The defaults
    are its policy LD without time warping.

    Args:
        log_mel: spectrograms, such as those of ``jtl.data.spectrograms.log_mel``.
        key: for the masks.
        frequency: F, at most M.
        frequencies: number of frequency masks (m_F).
        time: T, in frames.
        times: number of time masks (m_T).
        share: p; no time mask is longer than this share of the frames.
        lengths: number of real frames of each row, which come first; None if all are real.

    Raises:
        ValueError: F is above M, or ``share`` is outside (0, 1].
    """
    B, T, M = log_mel.shape
    if not 0 <= frequency <= M or not 0 < share <= 1:
        raise InputError(
            f"frequency is 0 to the {M} bands and share in (0, 1], got frequency={frequency}, share={share}"
        )
    x = jnp.asarray(log_mel)
    real = jnp.full(B, T) if lengths is None else jnp.asarray(lengths)
    first, second = jax.random.split(key)
    bands = _spans(first, frequencies, jnp.full(B, frequency), jnp.full(B, M), M)
    longest = jnp.minimum(time, jnp.floor(share * real).astype(int))
    frames = _spans(second, times, longest, real, T)
    is_real = (jnp.arange(T)[None] < real[:, None])[..., None]
    mean = jnp.mean(x, (1, 2), keepdims=True, where=jnp.broadcast_to(is_real, x.shape))
    return jnp.where((bands[:, None] | frames[:, :, None]) & is_real, mean, x)


def _spans(
    key: Array, count: int, longest: Int[Array, " B"], places: Int[Array, " B"], length: int
) -> Bool[Array, "B L"]:
    """Positions covered by ``count`` random spans of up to ``longest`` among the first ``places`` of ``length``."""
    for_width, for_start = jax.random.uniform(key, (2, len(places), count))
    width = jnp.floor(for_width * (longest[:, None] + 1))
    start = jnp.floor(for_start * (places[:, None] - width))
    at = jnp.arange(length)[None, None]
    return ((at >= start[..., None]) & (at < (start + width)[..., None])).any(1)
