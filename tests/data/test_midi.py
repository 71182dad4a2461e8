"""MIDI files there and back, dense music dealt out to voices, a folder of your own, and the synthesiser."""

import numpy as np
import pytest

from jtl.data import DataError, midi
from jtl.data.readers.midi import Piece

mido = pytest.importorskip("mido")

CHORD = np.array([[0, 0, 8, 72], [1, 0, 8, 67], [0, 8, 4, 74], [1, 8, 8, 65], [0, 14, 2, 71]], np.int32)


def test_a_piece_comes_back_from_its_file(tmp_path):
    made = Piece("made", 12, 8, 2, CHORD)
    midi.write(tmp_path / "made.mid", made, names=("high", "low"))
    found, count = midi.read(tmp_path / "made.mid", voices=2)
    assert found is not None and (found.title, found.bar, found.upbeat, found.voices) == ("made", 12, 8, 2)
    np.testing.assert_array_equal(found.notes, made.notes)
    assert count == 5 and [track.name for track in mido.MidiFile(tmp_path / "made.mid").tracks[1:]] == [
        "high",
        "low",
    ]


def test_chords_are_dealt_out_to_the_nearest_voices(tmp_path):
    track = mido.MidiTrack()
    for pitches in ((60, 64, 67, 72), (59, 62, 67)):
        track += [mido.Message("note_on", note=p, velocity=9, time=0) for p in pitches]
        off = [mido.Message("note_on", note=p, velocity=0, time=0) for p in pitches]
        off[0].time = 480
        track += off
    mido.MidiFile(tracks=[track], ticks_per_beat=480).save(tmp_path / "piano.mid")
    found, count = midi.read(tmp_path / "piano.mid", voices=3)
    assert found is not None and count == 7 and found.bar == 16
    assert found.notes.tolist() == [[0, 0, 4, 72], [1, 0, 4, 67], [2, 0, 4, 60],
                                    [0, 4, 4, 67], [1, 4, 4, 62], [2, 4, 4, 59]]  # fmt: skip
    four, _ = midi.read(tmp_path / "piano.mid", voices=4)
    assert four is not None and four.notes[4:].tolist() == [[1, 4, 4, 67], [2, 4, 4, 62], [3, 4, 4, 59]]


def test_a_folder_of_your_own(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder at"):
        midi.load_midi(tmp_path / "nowhere")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "readme.txt").write_text("no music")
    with pytest.raises(
        DataError, match=r"expected .mid or .midi files, in it or below; it holds \['readme.txt'\]"
    ):
        midi.load_midi(tmp_path / "own")
    midi.write(tmp_path / "own" / "one.mid", Piece("one", 16, 0, 2, CHORD))
    with pytest.raises(DataError, match="none of 1 MIDI files .* for 8 voices: set --voices"):
        midi.load_midi(tmp_path / "own", voices=8)
    (tmp_path / "own" / "deep").mkdir()
    midi.write(tmp_path / "own" / "deep" / "two.MIDI", Piece("two", 16, 0, 2, CHORD))
    pieces, notes = midi.load_midi(tmp_path / "own", voices=2)
    assert [piece.title for piece in pieces] == ["deep/two", "one"] and notes == ()
    pieces, notes = midi.load_midi(tmp_path / "own", voices=1)
    assert len(pieces[0].notes) == 3 and notes[0].startswith("4 of 10 notes left out")
    (tmp_path / "own" / "broken.mid").write_bytes(b"MThd but no more")
    with pytest.raises(DataError, match="broken.mid: not a whole MIDI file"):
        midi.load_midi(tmp_path / "own", voices=2)


def test_what_is_written_sounds(tmp_path):
    from scipy.io import wavfile

    midi.write_wav(
        tmp_path / "a.wav", Piece("a", 16, 0, 1, np.array([[0, 0, 8, 69]], np.int32)), tempo=60.0, rate=16000
    )
    rate, sound = wavfile.read(tmp_path / "a.wav")
    assert rate == 16000 and sound.dtype == np.int16 and len(sound) == 3 * 16000
    spectrum = np.abs(np.fft.rfft(sound[:16000].astype(float)))  # a bin a hertz
    assert spectrum.argmax() == 440 and spectrum[880] > 10 * spectrum[660]
    assert abs(sound).max() == round(0.9 * 32767) and not sound[-8000:].any()
