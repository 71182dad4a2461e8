"""Bach chorales, fiddle tunes and folk songs, from the corpus of music21 10.5.1, cached after the first reading.

Cuthbert and Ariza 2010, "music21: A Toolkit for Computer-Aided Musicology". The corpus has 411 files of Bach; Ryan's
Mammoth Collection of 1,059 fiddle tunes and O'Neill's Music of Ireland; and the Essen folk song collection (Schaffrath
1995), whose maintainers allow non-commercial use. Some encodings of the others state terms of their own.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from jtl._files import cache_dir, write_file
from jtl._wheels import Wheel, fetch_wheel
from jtl.data.dataset import DataError
from jtl.data.readers.midi import STEPS, Piece, Sounded, on_grid

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
FORMAT = 2  # of the cached files; a new number invalidates them
FIDDLE, IRISH, FOLK = "ryansMammoth", "oneills1850", "essenFolksong"
COLLECTIONS = (FIDDLE, IRISH, FOLK)
CHOIR = ("Soprano", "Alto", "Tenor", "Bass")
# Skipped files of the Essen collection: music21's tests, and variants of other songs.
_NOT_READ = ("test0", "test1", "testd", "teste", "variant0")
LEAST_NOTES = 16  # in a tune


def chorales() -> tuple[Piece, ...]:
    """Returns Bach's chorales in four parts, soprano first, titled by BWV number.

    Chorales are left out if their parts are not four single lines, their metre changes, or they do not fit the grid.
    Instruments that double or accompany the choir are dropped.
    """
    return _kept("chorales", _read_chorales)


def tunes(collections: Sequence[str] = COLLECTIONS) -> tuple[Piece, ...]:
    """Returns monophonic tunes: Ryan's and O'Neill's fiddle tunes, and Essen folk songs.

    Repeats are not played. Tunes are left out if they have fewer than 16 notes, no metre or several, or more than one
    note in twenty off the grid, as with triplets. The highest note of a chord is kept.
    """
    return tuple(piece for name in collections for piece in _kept(name, partial(_read_tunes, name)))


# --- files -----------------------------------------------------------------------------------------


def _kept(name: str, read: Callable[[Path], Iterator[Piece]]) -> tuple[Piece, ...]:
    """The pieces that ``read`` finds in the corpus, cached after the first time."""
    pins = "\0".join((WHEEL.sha256, *WHEEL.members, str(FORMAT)))
    file = cache_dir() / "music" / f"{name}-{hashlib.sha256(pins.encode()).hexdigest()[:16]}.npz"
    if not file.exists():
        pieces = tuple(read(fetch_wheel(WHEEL) / "music21" / "corpus"))
        file.parent.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = _packed(pieces)
        write_file(file, lambda sink: np.savez_compressed(sink, **arrays))
    with np.load(file) as stored:
        return _unpacked(dict(stored))


def _packed(pieces: Sequence[Piece]) -> dict[str, np.ndarray]:
    return {
        "titles": np.array([piece.title for piece in pieces]),
        "tunes": np.array([piece.tune for piece in pieces]),
        "forms": np.array([(piece.bar, piece.upbeat, piece.voices) for piece in pieces], np.int32),
        "notes": np.concatenate([piece.notes for piece in pieces]),
        "counts": np.array([len(piece.notes) for piece in pieces]),
    }


def _unpacked(arrays: dict[str, np.ndarray]) -> tuple[Piece, ...]:
    parts = np.split(arrays["notes"], np.cumsum(arrays["counts"])[:-1])
    rows = zip(arrays["titles"], arrays["forms"].tolist(), parts, arrays["tunes"], strict=True)
    return tuple(
        Piece(str(title), bar, upbeat, voices, notes, str(tune))
        for title, (bar, upbeat, voices), notes, tune in rows
    )


def _read_chorales(corpus: Path) -> Iterator[Piece]:
    with _needs_music21("the names of the chorales"):
        from music21.corpus.chorales import ChoraleListRKBWV
    hymns = {f"bwv{one['bwv']}": one["title"] for one in ChoraleListRKBWV().byRiemenschneider.values()}
    for file in sorted((corpus / "bach").glob("*.mxl")):
        parts, bars, first = read_musicxml(file)
        choir = [parts[name] for name in CHOIR if name in parts]
        lines = choir if len(choir) == len(CHOIR) else list(parts.values())
        if len(lines) == len(CHOIR) and len(bars) == 1:
            bar = next(iter(bars)) * STEPS
            if (
                piece := on_grid(
                    file.stem, bar, (bar - first * STEPS) % bar, lines, tune=hymns.get(file.stem, "")
                )
            ) is not None:
                yield piece


def read_musicxml(file: Path) -> tuple[dict[str, list[Sounded]], set[Fraction], Fraction]:
    """Reads a compressed MusicXML file; returns notes by part name, bar lengths, and the length of the first bar.

    It covers what the chorales use (pitches, durations, ties and metres), some twenty times as fast as music21. Repeats
    are not played, grace notes are left out. All times are in quarters.
    """
    with zipfile.ZipFile(file) as archive:
        container = ElementTree.fromstring(archive.read("META-INF/container.xml"))
        inside = next(one.get("full-path", "") for one in container.iter() if one.tag.endswith("rootfile"))
        score = ElementTree.fromstring(archive.read(inside))
    names = {part.get("id"): part.findtext("part-name", "").strip() for part in score.iter("score-part")}
    parts: dict[str, list[Sounded]] = {}
    bars: set[Fraction] = set()
    firsts = []
    for part in score.iter("part"):
        line: list[Sounded] = []
        divisions, begin = 1, Fraction(0)
        for measure in part.iter("measure"):
            at = end = start = begin
            for one in measure:
                if one.tag == "attributes":
                    divisions = int(one.findtext("divisions", str(divisions)))
                    for time in one.iter("time"):
                        beats, unit = (int(time.findtext(what, "4")) for what in ("beats", "beat-type"))
                        bars.add(Fraction(4 * beats, unit))
                length = Fraction(int(one.findtext("duration", "0")), divisions)
                if one.tag == "backup":
                    at -= length
                elif one.tag == "forward":
                    at += length
                elif one.tag == "note" and one.find("grace") is None:
                    start = start if one.find("chord") is not None else at
                    at = start + length
                    if (pitch := one.find("pitch")) is not None:
                        tied = any(tie.get("type") == "stop" for tie in one.iter("tie"))
                        line.append((start, length, _pitch(pitch), tied))
                end = max(end, at)
            if begin == 0:
                firsts.append(end)
            begin = end
        parts[names.get(part.get("id"), "") or str(len(parts))] = line
    return parts, bars, max(firsts)


def _pitch(pitch: ElementTree.Element) -> int:
    step = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}[pitch.findtext("step", "")]
    return 12 * (int(pitch.findtext("octave", "4")) + 1) + step + int(pitch.findtext("alter", "0"))


def _read_tunes(collection: str, corpus: Path) -> Iterator[Piece]:
    with _needs_music21("tunes in ABC"):
        from music21 import abcFormat as abc
    for file in sorted((corpus / collection).glob("*.abc")):
        if file.stem in _NOT_READ:
            continue
        handler = abc.ABCHandler()
        handler.process(file.read_text(encoding="utf-8", errors="replace"))
        for number, one in handler.splitByReferenceNumber().items():
            if (piece := tune(abc, f"{file.stem} {number}", one.tokens)) is not None:
                yield piece


def tune(abc: Any, title: str, tokens: Sequence[Any]) -> Piece | None:
    """Returns the monophonic piece spelled by music21's ABC tokens, or None if it has no metre or several."""
    bars: set[Fraction] = set()
    line: list[Sounded] = []
    at = first_bar = Fraction(0)
    for token in tokens:
        if isinstance(token, abc.ABCMetadata):
            if token.isMeter():
                metre = token.getTimeSignatureParameters()
                if metre is None:
                    return None
                bars.add(Fraction(4 * metre[0], metre[1]) * STEPS)
            elif token.tag == "V":
                return None
        elif isinstance(token, abc.ABCBar) and not first_bar:
            first_bar = at
        elif isinstance(token, abc.ABCNote) and not token.inGrace:
            tones = getattr(token, "subTokens", None) or [token]
            pitches = [_midi(tone.pitchName) for tone in tones if tone.pitchName is not None]
            if pitches:
                line.append(
                    (at, Fraction(token.quarterLength), max(pitches), token.tie in ("stop", "continue"))
                )
            at += Fraction(token.quarterLength)
    if len(bars) != 1 or len(line) < LEAST_NOTES:
        return None
    bar = bars.pop()
    return on_grid(title, bar, (bar - first_bar * STEPS) % bar, [line])


@contextmanager
def _needs_music21(what: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise DataError(f"reading {what} needs music21: pip install 'jtl[experiments]'") from error


@cache
def _midi(name: str) -> int:
    from music21.pitch import Pitch

    return int(Pitch(name).midi)
