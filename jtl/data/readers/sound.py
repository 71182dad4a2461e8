"""Sound files: WAV files of any sample width and rate, and resampling."""

from __future__ import annotations

import os
import struct
import warnings
from math import gcd

import numpy as np
from jaxtyping import Float

from jtl.data.dataset import DataError

RATE = 16000  # samples per second, of every model here
FRAME, HOP = 400, 160  # window and hop length of spectrograms in samples: 25 and 10 ms


def read(file: str | os.PathLike, rate: int = RATE) -> Float[np.ndarray, " N"]:
    """Reads the samples of a WAV file (integers or floats of any width), scaled to [-1, 1]; channels are averaged.

    Args:
        file: the WAV file.
        rate: the expected sample rate in Hz.

    Raises:
        FileNotFoundError: the file does not exist.
        DataError: it is not a complete WAV file, or has another rate; ``resample`` converts it.
    """
    found, samples = read_any(file)
    if found != rate:
        raise DataError(
            f"{os.fspath(file)}: expected {rate} samples a second, found {found}: convert the file, or take "
            f"sound.resample(sound.read(file, rate={found}), {found})"
        )
    return samples


def read_any(file: str | os.PathLike) -> tuple[int, Float[np.ndarray, " N"]]:
    """Reads a WAV file of any rate; returns the rate in Hz and the samples as ``read`` does."""
    from scipy.io import wavfile

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", wavfile.WavFileWarning)
            warnings.filterwarnings("ignore", "Chunk", wavfile.WavFileWarning)  # such as a title tag
            rate, samples = wavfile.read(file)
    except (ValueError, struct.error, wavfile.WavFileWarning) as error:
        raise DataError(
            f"{os.fspath(file)}: not a whole WAV file ({error}); convert others, say by `ffmpeg -i IN -ar {RATE} "
            "-ac 1 OUT.wav`"
        ) from error
    if samples.dtype == np.uint8:
        samples = samples.astype(np.float32) / 128 - 1
    elif samples.dtype.kind == "i":
        samples = (samples / -float(np.iinfo(samples.dtype).min)).astype(np.float32)
    samples = samples.astype(np.float32)
    return int(rate), samples if samples.ndim == 1 else samples.mean(1)


def resample(audio: Float[np.ndarray, " N"], rate: int, to: int = RATE) -> Float[np.ndarray, " M"]:
    """Resamples ``audio`` from ``rate`` to ``to`` Hz by a polyphase filter; M = ceil(N to / rate)."""
    from scipy.signal import resample_poly

    shared = gcd(rate, to)
    return resample_poly(audio.astype(np.float32), to // shared, rate // shared).astype(np.float32)
