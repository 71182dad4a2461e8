"""Music as notes on a grid of sixteenths: Bach's chorales, fiddle tunes and folk songs, or a folder of MIDI files.

The corpus of music21 10.5.1 (Cuthbert and Ariza 2010) has 411 chorales in four parts, Ryan's Mammoth Collection of
1,059 fiddle tunes, O'Neill's Music of Ireland, and the Essen collection of folk songs (Schaffrath 1995), whose keepers
allow non-commercial use; some encodings of the others state terms of their own. Read by music21 once, then kept in
jtl's cache.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from jtl.data.dataset import DataError, stable_hash
from jtl.files import write_file
from jtl.wheel import Wheel, cache_dir, fetch_wheel

WHEEL = Wheel(
    distribution="music21",
    version="10.5.1",
    sha256="dc3309498c4c95cebdf8d4f20c868deb6b63bce1d929cad4f51a7ccc982987b1",
    members=(
        "music21/corpus/license.txt",
        "music21/corpus/bach/*.mxl",
        "music21/corpus/ryansMammoth/*.abc",
        "music21/corpus/oneills1850/*.abc",
        "music21/corpus/essenFolksong/*.abc",
        "music21/corpus/essenFolksong/license.txt",
    ),
    origin="the corpus of music21",
    licence="BSD-3-Clause; the music of each collection under its own terms, see its license.txt",
)
STEPS = 4  # of the grid in a quarter note
LONGEST_BAR = 32  # steps: that of 4/2
FORMAT = 1  # of the cached files; another number reads all anew
TUNES = ("ryansMammoth", "oneills1850", "essenFolksong")
# Repeated in the Essen collection, or its own tests.
_NOT_READ = ("test0", "test1", "testd", "teste", "variant0")
LEAST_NOTES = 16  # of a tune


@dataclass(frozen=True, eq=False)
class Piece:
    """A piece of music. Times are in sixteenths, from its first note on.

    Attributes:
        title: what it is called.
        bar: length of a bar.
        upbeat: where in a bar it begins, 0 for its first beat.
        voices: how many parts, of which none has two notes at once.
        notes: voice, start, length and MIDI pitch of each note; by start, then by voice.
    """

    title: str
    bar: int
    upbeat: int
    voices: int
    notes: Int[np.ndarray, "N 4"]

    @property
    def length(self) -> int:
        """Where its last note ends."""
        return int((self.notes[:, 1] + self.notes[:, 2]).max())

    def melody(self) -> Int[np.ndarray, " M"]:
        """The pitches of its highest voice."""
        return self.notes[self.notes[:, 0] == 0, 3]

    def transposed(self, by: int) -> Piece:
        """The same, ``by`` semitones higher."""
        return replace(self, notes=self.notes + np.array([0, 0, 0, by], self.notes.dtype))


def chorales() -> tuple[Piece, ...]:
    """Bach's chorales in four parts, soprano first, under their BWV numbers.

    Left out are those whose parts are not four single lines, that change their metre, or do not fit the grid.
    Instruments that double or accompany the choir are left out of the piece.
    """
    return _kept("chorales", _read_chorales)


def tunes() -> tuple[Piece, ...]:
    """Fiddle tunes and folk songs of one voice: Ryan's and O'Neill's collections, and Essen's folk songs.

    Repeats are not played. Left out are tunes of less than 16 notes, without a metre or with several, and those of
    which more than one note in twenty stands off the grid, as triplets do. Of chords the highest note is kept.
    """
    return _kept("tunes", _read_tunes)


# --- which pieces share a melody -------------------------------------------------------------------


def phrases(melody: Int[np.ndarray, " M"], length: int = 7) -> set[tuple[int, ...]]:
    """All runs of ``length`` steps between the notes of a melody, which are the same in every key.

    >>> phrases(np.array([60, 62, 64, 62]), length=2)
    {(2, 2), (2, -2)}
    """
    steps = np.diff(melody).tolist()
    return {tuple(steps[i : i + length]) for i in range(len(steps) - length + 1)}


def by_melody(pieces: Sequence[Piece], share: float = 0.3) -> Int[np.ndarray, " N"]:
    """A number for each piece, the same for those that set the same melody, in whatever key.

    Two do if that share of the phrases of the shorter one stands in the other, or if a third binds them.
    """
    found = [phrases(piece.melody()) for piece in pieces]
    group = np.arange(len(pieces))
    for i, own in enumerate(found):
        for j in range(i):
            common = len(own & found[j])
            if common and common >= share * min(len(own), len(found[j])):
                group[group == group[i]] = group[j]
    return group


def without(pieces: Sequence[Piece], others: Sequence[Piece], share: float = 0.15) -> tuple[Piece, ...]:
    """``pieces`` without those of whose phrases that share stands in the melodies of ``others``."""
    known = set().union(*(phrases(piece.melody()) for piece in others)) if others else set()

    def shares(piece: Piece) -> bool:
        own = phrases(piece.melody())
        return bool(own) and len(own & known) >= share * len(own)

    return tuple(piece for piece in pieces if not shares(piece))


def split(
    pieces: Sequence[Piece], shares: tuple[float, float] = (0.1, 0.2)
) -> dict[str, tuple[Piece, ...]]:
    """``train``, ``validation`` and ``test``, of which no two share a melody.

    Args:
        pieces: all of them.
        shares: of the melodies in validation and in test, at least one each; which, their first titles decide.

    Raises:
        DataError: fewer than three melodies.
    """
    group = by_melody(pieces)
    first = {int(one): pieces[int(np.flatnonzero(group == one)[0])].title for one in np.unique(group)}
    order = sorted(first, key=lambda one: (stable_hash(first[one]), one))
    if len(order) < 3:
        raise DataError(
            f"{len(pieces)} pieces of {len(order)} melodies: expected at least three, for train, validation and test"
        )
    counts = [max(1, round(own * len(order))) for own in shares]
    names = ["validation"] * counts[0] + ["test"] * counts[1]
    of = dict(zip(order, names + ["train"] * len(order), strict=False))
    return {
        name: tuple(piece for piece, one in zip(pieces, group, strict=True) if of[int(one)] == name)
        for name in ("train", "validation", "test")
    }


# --- files -----------------------------------------------------------------------------------------


def _kept(name: str, read: Callable[[Path], Iterator[Piece]]) -> tuple[Piece, ...]:
    """What ``read`` finds in the corpus, from the cache after the first time."""
    pins = "\0".join((WHEEL.sha256, *WHEEL.members, str(FORMAT)))
    file = cache_dir() / "music" / f"{name}-{hashlib.sha256(pins.encode()).hexdigest()[:16]}.npz"
    if not file.exists():
        pieces = tuple(read(fetch_wheel(WHEEL) / "music21" / "corpus"))
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, lambda sink: np.savez_compressed(sink, **_packed(pieces)))
    with np.load(file) as stored:
        return _unpacked(dict(stored))


def _packed(pieces: Sequence[Piece]) -> dict[str, np.ndarray]:
    return {
        "titles": np.array([piece.title for piece in pieces]),
        "forms": np.array([(piece.bar, piece.upbeat, piece.voices) for piece in pieces], np.int32),
        "notes": np.concatenate([piece.notes for piece in pieces]),
        "counts": np.array([len(piece.notes) for piece in pieces]),
    }


def _unpacked(arrays: dict[str, np.ndarray]) -> tuple[Piece, ...]:
    parts = np.split(arrays["notes"], np.cumsum(arrays["counts"])[:-1])
    forms = arrays["forms"].tolist()
    return tuple(
        Piece(str(title), *form, notes)
        for title, form, notes in zip(arrays["titles"], forms, parts, strict=True)
    )


def _music21() -> Any:
    try:
        import music21
    except ImportError as error:
        raise DataError(
            "reading the corpus of music21 needs music21: pip install 'jtl[experiments]'"
        ) from error
    return music21


def _read_chorales(corpus: Path) -> Iterator[Piece]:
    converter = _music21().converter
    for file in sorted((corpus / "bach").glob("*.mxl")):
        score = converter.parse(file, forceSource=True, format="musicxml")
        found = {part.id: part for part in score.parts}
        choir = [found[name] for name in ("Soprano", "Alto", "Tenor", "Bass") if name in found]
        parts = choir if len(choir) == 4 else list(found.values())
        metres = {one.barDuration.quarterLength for part in parts for one in part.recurse().getElementsByClass("TimeSignature")}
        if len(parts) != 4 or len(metres) != 1:
            continue
        bar = next(iter(metres)) * STEPS
        first = parts[0].getElementsByClass("Measure").first()
        upbeat = (bar - first.duration.quarterLength * STEPS) % bar
        lines = [list(_line(part)) for part in parts]
        if (piece := on_grid(file.stem, bar, upbeat, lines)) is not None:
            yield piece


def _line(part: Any) -> Iterator[tuple[Any, Any, int, bool]]:
    """Start, length, pitch of each note of a part, and whether it goes on with the one before, in quarters."""
    for one in part.flatten().notes:
        tied = one.tie is not None and one.tie.type in ("continue", "stop")
        yield one.offset, one.duration.quarterLength, max(p.midi for p in one.pitches), tied


def _read_tunes(corpus: Path) -> Iterator[Piece]:
    abc = _music21().abcFormat
    for collection in TUNES:
        for file in sorted((corpus / collection).glob("*.abc")):
            if file.stem in _NOT_READ:
                continue
            handler = abc.ABCHandler()
            handler.process(file.read_text(encoding="utf-8", errors="replace"))
            for number, one in handler.splitByReferenceNumber().items():
                if (piece := _tune(abc, f"{file.stem} {number}", one.tokens)) is not None:
                    yield piece


def _tune(abc: Any, title: str, tokens: Sequence[Any]) -> Piece | None:
    """The piece of one voice that music21's tokens of ABC spell, or None if it has no metre, or several."""
    metres, line, at, first_bar = set(), [], Fraction(0), None
    for token in tokens:
        if isinstance(token, abc.ABCMetadata):
            if token.isMeter():
                metre = token.getTimeSignatureObject()
                metres.add(None if metre is None else metre.barDuration.quarterLength)
            elif token.tag == "V":
                return None
        elif isinstance(token, abc.ABCBar) and first_bar is None and at > 0:
            first_bar = at
        elif isinstance(token, abc.ABCNote) and not token.inGrace:
            tones = getattr(token, "subTokens", None) or [token]
            pitches = [_midi(tone.pitchName) for tone in tones if tone.pitchName is not None]
            if pitches:
                line.append((at, token.quarterLength, max(pitches), token.tie in ("stop", "continue")))
            at += Fraction(token.quarterLength)
    if len(metres) != 1 or None in metres or len(line) < LEAST_NOTES:
        return None
    bar = metres.pop() * STEPS
    return on_grid(title, bar, (bar - (first_bar or 0) * STEPS) % bar, [line])


def _midi(name: str) -> int:
    from music21.pitch import Pitch

    return int(Pitch(name).midi)


def on_grid(
    title: str,
    bar: Any,
    upbeat: Any,
    lines: Sequence[Sequence[tuple[Any, Any, int, bool]]],
    most_off: float = 0.05,
) -> Piece | None:
    """A piece out of its voices, or None if it does not fit the grid of sixteenths or has an empty voice.

    Args:
        title: what it is called.
        bar: length of a bar, in steps of the grid.
        upbeat: where in a bar the lines begin, in steps.
        lines: start and length in quarters, pitch, and whether it is tied to the note before, of each note of each
            voice, highest voice first. A note that runs into the next of its voice is cut.
        most_off: share of notes that may begin off the grid; they are moved to the nearest step.
    """
    if bar != int(bar) or not 1 <= bar <= LONGEST_BAR or not all(lines):
        return None
    rows: list[list[int]] = []
    off = 0
    for voice, line in enumerate(lines):
        own: list[list[int]] = []
        for start, length, pitch, tied in line:
            begin, end = round(start * STEPS), round((start + length) * STEPS)
            off += start * STEPS != begin
            if tied and own and own[-1][3] == pitch and own[-1][1] + own[-1][2] == begin:
                own[-1][2] = end - own[-1][1]
                continue
            if own and own[-1][1] + own[-1][2] > begin:
                own[-1][2] = begin - own[-1][1]
                if not own[-1][2]:
                    own.pop()
            if end > begin:
                own.append([voice, begin, end - begin, pitch])
        if not own:
            return None
        rows += own
    if off > most_off * len(rows):
        return None
    notes = np.array(rows, np.int32)
    first = int(notes[:, 1].min())
    notes[:, 1] -= first
    order = np.lexsort((notes[:, 0], notes[:, 1]))
    return Piece(title, int(bar), int(round(upbeat) + first) % int(bar), len(lines), notes[order])
