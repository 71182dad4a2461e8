"""Sound encoded for a model: Whisper's log-mel spectrograms, and waveforms normalised for Wav2Vec2 and HuBERT."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Float

from jtl.data.dataset import DataError
from jtl.data.readers.sound import FRAME, HOP, RATE


def log_mel(audio: np.ndarray, mels: int = 80, seconds: int | None = 30) -> Float[np.ndarray, "T M"]:
    """Computes the log-mel spectrogram that Whisper reads, at T = 100 frames a second.

    ``audio`` is padded with silence to ``seconds``. Powers in Hann windows of 25 ms, every 10 ms, are summed in M bands
    of Slaney's mel scale. Their log10 x is clipped to at most 8 below the maximum and scaled to (x + 4) / 4. It equals
    ``WhisperFeatureExtractor`` of ``transformers``, whose arrays are (M, T); computed in float64. Radford et al. 2022,
    "Robust Speech Recognition via Large-Scale Weak Supervision", https://arxiv.org/abs/2212.04356, section 2.2.

    Args:
        audio: (N,), at 16 kHz, in [-1, 1].
        mels: M, the model's ``config.num_mel_bins``: 80, or 128 for large-v3.
        seconds: the input length the model was trained on; None for the length of ``audio``, for
            ``jtl.tasks.transcribe_long``.

    Raises:
        DataError: ``audio`` is longer than ``seconds``, not one row of floating-point samples, or no longer than half a
            window.
    """
    _check(audio)
    length = len(audio) if seconds is None else seconds * RATE
    if length <= FRAME // 2:
        raise DataError(f"expected more than {FRAME // 2} samples, half a window, found {length}")
    if len(audio) > length:
        raise DataError(
            f"expected at most {seconds} s of audio ({length} samples), found {len(audio) / RATE:.1f} s: cut it into "
            "pieces, best at pauses"
        )
    silent = np.pad(audio.astype(np.float64), (0, length - len(audio)))
    signal = np.pad(silent, FRAME // 2, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(signal, FRAME)[::HOP][:-1]
    spectrum = np.fft.rfft(windows * np.hanning(FRAME + 1)[:-1])
    log = np.log10(np.maximum(np.square(np.abs(spectrum)) @ _filters(mels), 1e-10))
    return ((np.maximum(log, log.max() - 8) + 4) / 4).astype(np.float32)


@lru_cache(maxsize=4)
def _filters(mels: int) -> Float[np.ndarray, "F M"]:
    from transformers.audio_utils import mel_filter_bank

    return mel_filter_bank(1 + FRAME // 2, mels, 0.0, RATE / 2, RATE, norm="slaney", mel_scale="slaney")


def waveforms(audios: Sequence[np.ndarray], length: int | None = None) -> dict[str, np.ndarray]:
    """Returns the input of Wav2Vec2 and HuBERT: audios of zero mean and unit variance, padded with zeros to one length.

    Equals ``Wav2Vec2FeatureExtractor`` of ``transformers`` with ``do_normalize``.

    Args:
        audios: each (N,) of its own length, at 16 kHz.
        length: L, of the rows; by default that of the longest audio.

    Returns:
        ``audio`` (B, L), and ``attention_mask`` (B, L), 1 at samples.

    Raises:
        DataError: an audio is longer than ``length``, empty, or not one row of floating-point samples.
    """
    longest = max(map(len, audios))
    length = longest if length is None else length
    if longest > length:
        raise DataError(f"expected at most {length} samples, found {longest}: cut the audio")
    rows, mask = np.zeros((len(audios), length), np.float32), np.zeros((len(audios), length), np.int32)
    for row, real, audio in zip(rows, mask, audios, strict=True):
        _check(audio)
        exact = audio.astype(np.float64)
        row[: len(audio)] = (exact - exact.mean()) / np.sqrt(exact.var() + 1e-7)
        real[: len(audio)] = 1
    return {"audio": rows, "attention_mask": mask}


def _check(audio: np.ndarray) -> None:
    """Raises DataError unless ``audio`` is one row of floating-point samples."""
    if audio.ndim != 1 or not len(audio) or audio.dtype.kind != "f":
        raise DataError(
            f"expected one row of floating-point samples in [-1, 1], found {audio.dtype} {audio.shape}: average the "
            "channels, and divide integers by the largest they can be"
        )
