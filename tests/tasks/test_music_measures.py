"""What is counted in pieces of music: hand-made cases, and the key of a known chorale."""

import numpy as np
import pytest

from experiments.music import measures

# Two voices: a C major scale, of which the last note has no partner, over a C that rests and an E flat.
NOTES = np.array(
    [[0, 4 * i, 4, pitch] for i, pitch in enumerate((60, 62, 64, 65, 67, 69, 71, 72))]
    + [[1, 0, 16, 48], [1, 20, 8, 63]],
    np.int32,
)


def test_measures_of_a_hand_made_piece():
    assert measures.in_range(NOTES, low=(62, 40), high=(70, 60)) == pytest.approx(6 / 10)
    assert measures.all_sound(NOTES, 2) == pytest.approx(24 / 32)
    assert measures.crossing(NOTES, 2) == 0
    assert measures.crossing(NOTES[:4], 2) == 0  # one that is silent crosses nothing
    assert measures.in_key(NOTES, measures.Key(0, "major", "C major", 1.0)) == pytest.approx(9 / 10)
    assert measures.in_key(NOTES, measures.Key(0, "minor", "C minor", 1.0)) == pytest.approx(
        9 / 10
    )  # but for E
    raised = NOTES.copy()
    raised[-1, 3] = 70
    assert measures.crossing(raised, 2) == pytest.approx(4 / 32)  # above A, below B


def test_keys():
    pytest.importorskip("music21")
    found = measures.find_key(NOTES[:9])
    assert (found.tonic, found.mode, found.name) == (0, "major", "C major") and 0.7 < found.correlation < 1
    up = NOTES[:9] + np.array([0, 0, 0, 3])
    assert measures.find_key(up).name == "Eb major" and measures.in_key(up, measures.find_key(up)) == 1
    minor = np.array([[0, i, 1, p] for i, p in enumerate((57, 59, 60, 64, 57, 56, 57, 65, 64, 57))], np.int32)
    found = measures.find_key(minor)
    assert found.name == "A minor" and measures.in_key(minor, found) == 1
