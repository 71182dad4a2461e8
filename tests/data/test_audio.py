"""Sound files and what models take, against scipy's own files, formulas and the extractors of `transformers`."""

import numpy as np
import pytest
from scipy.io import wavfile

from jtl.data import DataError
from jtl.data.encode import spectrograms
from jtl.data.readers import sound


def tone(seconds, rate=sound.RATE, hertz=440.0):
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


@pytest.mark.parametrize(
    ("kind", "scale"), [("int16", 2**15), ("int32", 2**31), ("float32", 1), ("uint8", 2**7)]
)
def test_read(tmp_path, kind, scale):
    samples, steps = tone(0.1), 128 if kind == "uint8" else 2**15
    stored = np.round(samples * scale) if kind != "float32" else samples
    stored = (stored + 128 if kind == "uint8" else stored).astype(kind)
    wavfile.write(tmp_path / "one.wav", sound.RATE, stored)
    found = sound.read(tmp_path / "one.wav")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, samples, atol=1 / steps)
    wavfile.write(tmp_path / "two.wav", sound.RATE, np.stack([stored, np.full_like(stored, stored[0])], 1))
    np.testing.assert_allclose(sound.read(tmp_path / "two.wav"), found / 2, atol=1e-6)


def test_another_rate_is_refused_and_resampled(tmp_path):
    wavfile.write(tmp_path / "a.wav", 22050, tone(0.5, 22050))
    with pytest.raises(
        DataError, match=r"a.wav: expected 16000 samples a second, found 22050: .*sound.resample"
    ):
        sound.read(tmp_path / "a.wav")
    found = sound.resample(sound.read(tmp_path / "a.wav", rate=22050), 22050)
    assert len(found) == 8000 and sound.read_any(tmp_path / "a.wav")[0] == 22050
    np.testing.assert_allclose(found[500:-500], tone(0.5)[500:-500], atol=5e-3)


def test_damaged_files(tmp_path):
    wavfile.write(tmp_path / "a.wav", sound.RATE, tone(0.1))
    whole = (tmp_path / "a.wav").read_bytes()
    for name, content in {
        "cut.wav": whole[:-100],
        "head.wav": whole[:20],
        "song.mp3": b"ID3" + bytes(99),
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name}: not a whole WAV file .*ffmpeg"):
            sound.read(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        sound.read(tmp_path / "none.wav")


def test_log_mel_of_a_tone():
    """The band of its frequency is the loudest; silence lies 8 decades below it, which is 2 after scaling."""
    found = spectrograms.log_mel(tone(1, hertz=1000.0), seconds=2)
    assert found.shape == (200, 80) and found.dtype == np.float32
    # Slaney's scale is linear up to 1 kHz, the 15th of its mels; 8 kHz is 45.2 mels, in 81 steps.
    assert set(found[5:95].argmax(1)) <= {25, 26}
    np.testing.assert_allclose(found[105:], found.max() - 2, atol=1e-6)


def test_waveforms():
    rng = np.random.default_rng(0)
    first, second = rng.normal(3, 2, 50).astype(np.float32), rng.normal(size=30).astype(np.float32)
    batch = spectrograms.waveforms([first, second], 60)
    assert batch["audio"].shape == batch["attention_mask"].shape == (2, 60)
    np.testing.assert_array_equal(batch["attention_mask"].sum(1), [50, 30])
    np.testing.assert_allclose(batch["audio"][0, :50], (first - first.mean()) / first.std(), atol=1e-5)
    assert not batch["audio"][1, 30:].any()
    assert spectrograms.waveforms([first, second])["audio"].shape == (2, 50)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.zeros((10, 2), np.float32), r"float32 \(10, 2\): average the channels"),
        (np.zeros(10, np.int16), r"int16 \(10,\)"),
        (np.zeros(0, np.float32), r"float32 \(0,\)"),
    ],
)
def test_what_is_no_audio(samples, message):
    for function in (spectrograms.log_mel, lambda samples: spectrograms.waveforms([samples])):
        with pytest.raises(DataError, match=message):
            function(samples)


def test_too_long():
    with pytest.raises(DataError, match="at most 1 s .*found 1.5 s: cut it"):
        spectrograms.log_mel(tone(1.5), seconds=1)
    with pytest.raises(DataError, match="at most 100 samples, found 160"):
        spectrograms.waveforms([tone(0.01)], 100)


@pytest.mark.parity
@pytest.mark.parametrize("mels", [80, 128])
def test_log_mel_is_that_of_transformers(mels):
    from transformers import WhisperFeatureExtractor

    rng = np.random.default_rng(mels)
    extractor = WhisperFeatureExtractor(feature_size=mels)
    clips = [0.1 * rng.normal(size=n).astype(np.float32) for n in (4567, 480000)]
    for clip in clips:
        theirs = extractor(clip, sampling_rate=16000, return_tensors="np")["input_features"][0].T
        np.testing.assert_allclose(spectrograms.log_mel(clip, mels), theirs, atol=2e-4)


@pytest.mark.parity
def test_waveforms_are_those_of_transformers():
    from transformers import Wav2Vec2FeatureExtractor

    rng = np.random.default_rng(0)
    clips = [rng.normal(0.1, 0.3, n).astype(np.float32) for n in (400, 731)]
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
    theirs = extractor(clips, sampling_rate=16000, padding=True, return_tensors="np")
    ours = spectrograms.waveforms(clips)
    np.testing.assert_allclose(ours["audio"], theirs["input_values"], atol=1e-5)
    np.testing.assert_array_equal(ours["attention_mask"], theirs["attention_mask"])
