"""Transcripts of long sounds: how a window is cut, where the next begins, and Whisper base beside `transformers`."""

import dataclasses
import sys

import numpy as np
import pytest
from test_transcribe import RULES, SENTENCES, whisper  # noqa: F401  (a fixture)

from experiments.models.check import plain
from jtl import pretrained
from jtl.data.encode import spectrograms
from jtl.data.readers.sound import RATE
from jtl.data.sets import espeak
from jtl.models.whisper_config import WhisperConfig
from jtl.tasks import transcribe_long, word_error_rate
from jtl.wrap import function

module = sys.modules["jtl.tasks.transcribe_long"]  # in jtl.tasks the name is the function's


@pytest.mark.parametrize(
    ("row", "stretches", "heard"),
    [
        # Two times side by side: what follows them is not whole, so that the next window begins there.
        ([10, 1, 4, 60, 60, 5], [(0, 50, [10, 1, 4, 60])], 100),
        ([10, 1, 4, 60, 60], [(0, 50, [10, 1, 4, 60])], 100),
        ([10, 1, 20, 25, 2, 40, 41, 3], [(0, 10, [10, 1, 20]), (15, 30, [25, 2, 40])], 60),
        # It is whole, and then nobody speaks: the window is done.
        ([10, 1, 4, 60, 70, 5, 80], [(0, 50, [10, 1, 4, 60]), (60, 70, [70, 5, 80])], 300),
        # One stretch, to its end or to that of the window.
        ([12, 1, 4, 60], [(2, 50, [12, 1, 4, 60])], 300),
        ([10, 1], [(0, 150, [10, 1])], 300),
        ([1, 4], [(0, 150, [1, 4])], 300),
        ([], [], 300),
        # Times past the end of the sound: nothing is skipped that was not heard.
        ([10, 1, 215, 215, 4], [(0, 205, [10, 1, 215])], 300),
    ],
)
def test_where_a_window_is_cut(row, stretches, heard):
    assert module.cut(row, 300, RULES) == (stretches, heard)


def test_windows_follow_each_other(monkeypatch):
    """Three windows over 250 frames by what a Whisper is made to write; each sees what follows the last stretch."""
    rows = iter([[10, 1, 20, 30, 2, 45, 45, 3], [11, 3, 50], [10, 4, 15]])
    seen = []

    def write(model, tokenizer, log_mel, language, task, timestamps, max_new_tokens):
        seen.append((np.asarray(log_mel)[0], language))
        assert timestamps and task == "translate" and max_new_tokens == 7
        return [next(rows)], ["fr"], RULES

    class Words:
        def decode(self, tokens):
            return "".join(f" {token}" for token in tokens)

    monkeypatch.setattr(module, "tokens", write)
    model = function(lambda params, x: x, {"w": np.ones(1)}).replace(
        config=WhisperConfig(max_source_positions=50)
    )
    sound = np.arange(250, dtype=np.float32)[:, None] * np.ones((1, 3), np.float32)
    found = transcribe_long(model, Words(), sound, task="translate", max_new_tokens=7)
    starts = [0, 70, 170]  # 35 ticks of two frames; then a whole window of 100
    for (window, language), start in zip(seen, starts, strict=True):
        piece = sound[start : start + 100]
        np.testing.assert_array_equal(window[: len(piece)], piece)
        assert window.shape == (100, 3) and not window[len(piece) :].any()
        assert language == (None if start == 0 else "fr")
    assert [dataclasses.astuple(s) for s in found.segments] == [
        (0.0, 0.2, "1"),
        (0.4, 0.7, "2"),
        (0.72, 1.5, "3"),
        (1.7, 1.8, "4"),
    ]
    assert (found.text, found.language) == ("1 2 3 4", "fr")


@pytest.fixture(scope="module")
def clip():
    """Over a minute: the sentences twice, in two voices, with pauses."""
    pause = np.zeros(RATE, np.float32)
    spoken = [c for voice in ("en-us", "en-us+f2") for c in espeak.synthesise(SENTENCES, voice, speed=120)]
    return np.concatenate([part for one in spoken for part in (one, pause)])


@pytest.mark.slow
def test_more_than_a_minute_is_understood(whisper, clip):  # noqa: F811
    assert len(clip) > 50 * RATE
    found = transcribe_long(*whisper, spectrograms.log_mel(clip, seconds=None))
    said = " ".join([*SENTENCES, *SENTENCES])
    assert found.language == "en" and word_error_rate(plain([said]), plain([found.text])) < 0.1
    times = [time for segment in found.segments for time in (segment.start, segment.end)]
    assert times == sorted(times) and abs(times[-1] - len(clip) / RATE) < 2.5


@pytest.mark.slow
@pytest.mark.parity
def test_transformers_writes_the_same(whisper, clip, tmp_path):  # noqa: F811
    import torch
    from transformers import WhisperForConditionalGeneration

    model, words = whisper
    theirs = WhisperForConditionalGeneration.from_pretrained(
        pretrained.save(model, tmp_path / "saved")
    ).eval()
    sound = spectrograms.log_mel(clip, seconds=None)
    with torch.no_grad():
        out = theirs.generate(
            torch.tensor(sound).T[None], attention_mask=torch.ones(1, len(sound)), return_timestamps=True,
            language="en", task="transcribe", return_segments=True,
        )  # fmt: skip
    found = transcribe_long(model, words, sound, language="en", max_new_tokens=400)
    segments = out["segments"][0]
    assert len(segments) == len(found.segments) > 4
    for ours, other in zip(found.segments, segments, strict=True):
        assert ours.text == words.decode(other["tokens"], skip_special_tokens=True).strip()
        assert abs(ours.end - float(other["end"])) < 0.02
