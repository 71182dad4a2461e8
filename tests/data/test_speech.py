"""Synthesised speech: the real library, in several voices."""

import numpy as np
import pytest

from jtl.data import DataError
from jtl.data.readers import sound
from jtl.data.sets import espeak

TEXTS = ["She opened the window.", "The train to London leaves at half past nine."]


def test_the_same_text_sounds_the_same_whatever_was_spoken_before():
    first, again = espeak.synthesise(TEXTS), espeak.synthesise(TEXTS[::-1])[::-1]
    for clip, same in zip(first, again, strict=True):
        np.testing.assert_array_equal(clip, same)
        assert clip.dtype == np.float32 and 0.3 < np.abs(clip).max() <= 1
    short, long = (len(clip) / sound.RATE for clip in first)
    assert 1 < short < long < 4


def test_voice_speed_pitch_and_rate_are_heard():
    (plain,) = espeak.synthesise(TEXTS[:1])
    for voice in ("en-us+f2", "de", "fr"):
        (other,) = espeak.synthesise(TEXTS[:1], voice)
        assert len(other) != len(plain) or not np.array_equal(other, plain), voice
    (slow,) = espeak.synthesise(TEXTS[:1], speed=100)
    assert len(slow) > 1.2 * len(plain)
    (native,) = espeak.synthesise(TEXTS[:1], rate=22050)
    assert abs(len(native) / 22050 - len(plain) / sound.RATE) < 1e-3
    (high,) = espeak.synthesise(TEXTS[:1], pitch=90)

    def period(clip):  # of the voice, in samples: where the waveform is most like itself, from 60 to 400 Hz
        similar = np.fft.irfft(np.abs(np.fft.rfft(clip, 2 * len(clip))) ** 2)
        return 40 + similar[40:267].argmax()

    assert period(high) < 0.8 * period(plain)


def test_errors():
    with pytest.raises(DataError, match="unknown voice 'en-usa'; did you mean en-us"):
        espeak.synthesise(TEXTS, "en-usa")
    with pytest.raises(DataError, match="nothing is spoken of ' '"):
        espeak.synthesise([" "])
    with pytest.raises(DataError, match="got speed=10, pitch=50"):
        espeak.synthesise(TEXTS, speed=10)
    assert len(espeak.synthesise(TEXTS)) == 2  # an error leaves the library usable
