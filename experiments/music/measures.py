"""What can be counted in a piece of music: notes in range, voices that sound, its key and the notes that belong to it.

A piece is its notes (N, 4): voice, start, length and MIDI pitch, times in any unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

Notes = Int[np.ndarray, "N 4"]
# Degrees of a key in semitones above its tonic; the minor has both its sixths and sevenths.
DEGREES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 9, 10, 11)}


class Key(NamedTuple):
    """A key.

    Attributes:
        tonic: pitch class, 0 for C.
        mode: ``"major"`` or ``"minor"``.
        name: ``"A minor"``.
        correlation: of the piece's pitch classes with those of the key, at most 1.
    """

    tonic: int
    mode: str
    name: str
    correlation: float


def find_key(notes: Notes) -> Key:
    """The key whose profile the lengths of a piece's pitch classes are most like, as music21 finds it.

    Krumhansl and Schmuckler (Krumhansl 1990, "Cognitive Foundations of Musical Pitch", chapter 4), with the weights of
    Krumhansl and Kessler.
    """
    from music21 import analysis, note, stream

    line: Any = stream.Stream()
    for pitch in range(12):
        length = int(notes[notes[:, 3] % 12 == pitch, 2].sum())
        if length:
            line.append(note.Note(60 + pitch, quarterLength=length))
    found = analysis.discrete.KrumhanslSchmuckler().getSolution(line)
    return Key(
        int(found.tonic.pitchClass),
        str(found.mode),
        f"{found.tonic.name.replace('-', 'b')} {found.mode}",
        float(found.correlationCoefficient),
    )


def in_key(notes: Notes, key: Key) -> float:
    """The share of notes that belong to a key: seven pitch classes of a major, nine of a minor one."""
    classes = [(key.tonic + degree) % 12 for degree in DEGREES[key.mode]]
    return float(np.isin(notes[:, 3] % 12, classes).mean())


def in_range(notes: Notes, low: Sequence[int], high: Sequence[int]) -> float:
    """The share of notes that their voice can sing; ``low`` and ``high`` have the ends of each voice's range."""
    voice, pitch = notes[:, 0], notes[:, 3]
    return float(((pitch >= np.asarray(low)[voice]) & (pitch <= np.asarray(high)[voice])).mean())


def all_sound(notes: Notes, voices: int) -> float:
    """The share of a piece's time in which all its voices sound, from its first note to the end of its last."""
    begin, end = int(notes[:, 1].min()), int((notes[:, 1] + notes[:, 2]).max())
    sounding = np.zeros((voices, end - begin), bool)
    for voice, start, length, _ in notes.tolist():
        sounding[voice, start - begin : start - begin + length] = True
    return float(sounding.all(0).mean())


def crossing(notes: Notes, voices: int) -> float:
    """The share of a piece's time in which some voice sounds below the next lower one."""
    end = int((notes[:, 1] + notes[:, 2]).max())
    pitches = np.full((voices, end), np.nan)
    for voice, start, length, pitch in notes.tolist():
        pitches[voice, start : start + length] = pitch
    return float((np.diff(pitches, axis=0) > 0).any(0).mean())
