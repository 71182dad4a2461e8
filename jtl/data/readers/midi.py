"""MIDI files: read into pieces of music on a grid of sixteenths, written, and synthesised."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from jtl.data.dataset import DataError

STEPS = 4  # of the grid per quarter note
LONGEST_BAR = 32  # steps: that of 4/2
# Start and length in quarters, MIDI pitch, and whether it is tied to the note before.
Sounded = tuple[Fraction, Fraction, int, bool]


@dataclass(frozen=True, eq=False)
class Piece:
    """A piece of music. Times are in sixteenths, from its first note.

    Attributes:
        title: its title.
        bar: length of a bar.
        upbeat: position in a bar at which it begins, 0 for the first beat.
        voices: number of voices, each of which plays one note at a time.
        notes: voice, start, length and MIDI pitch of each note; ordered by start, then voice.
        tune: the name of its melody, which other pieces may share; empty if unknown.
    """

    title: str
    bar: int
    upbeat: int
    voices: int
    notes: Int[np.ndarray, "N 4"]
    tune: str = ""

    @property
    def length(self) -> int:
        """End of its last note."""
        return int((self.notes[:, 1] + self.notes[:, 2]).max())

    def melody(self) -> Int[np.ndarray, " M"]:
        """Returns the pitches of its highest voice."""
        return self.notes[self.notes[:, 0] == 0, 3]

    def transposed(self, by: int) -> Piece:
        """Returns the piece ``by`` semitones higher."""
        return replace(self, notes=self.notes + np.array([0, 0, 0, by], self.notes.dtype))


def on_grid(
    title: str,
    bar: Fraction,
    upbeat: Fraction,
    lines: Sequence[Sequence[Sounded]],
    *,
    tune: str = "",
    most_off: float = 0.05,
) -> Piece | None:
    """Builds a piece from its voices; returns None if it does not fit the grid of sixteenths or has an empty voice.

    Args:
        title: its title.
        bar: length of a bar, in steps of the grid.
        upbeat: position in a bar at which the lines begin, in steps.
        lines: start and length in quarters, pitch, and whether it is tied to the previous note, of each note of each
            voice, highest voice first. A note that overlaps the next of its voice is shortened.
        tune: the name of the melody.
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
    return Piece(title, int(bar), int(round(upbeat) + first) % int(bar), len(lines), notes[order], tune)


ENDINGS = (".mid", ".midi")
DRUMS = 9  # the channel of percussion
HARMONICS = 1 / np.arange(1, 7) ** 1.6  # strengths of the synthesiser's partials
ATTACK, RELEASE = 0.02, 0.06  # seconds

Note = tuple[int, int, int]  # start, end, pitch; in steps of the grid


def load_midi(folder: str | os.PathLike, voices: int = 4) -> tuple[tuple[Piece, ...], tuple[str, ...]]:
    """Loads all MIDI files below ``folder``; returns the pieces and notes on what was left out.

    See ``read``. An unpacked MAESTRO folder works. Files that change metre or have bars of more than 32 sixteenths are
    left out.

    Args:
        folder: the folder.
        voices: number of voices of each piece.

    Raises:
        FileNotFoundError: the folder does not exist.
        DataError: it has no MIDI files, one cannot be read, or none can be used.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"no folder at {path}: expected one with .mid or .midi files, in it or below")
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in ENDINGS)
    if not files:
        held = [entry.name for entry in sorted(path.iterdir())[:8]]
        raise DataError(f"{path}: expected .mid or .midi files, in it or below; it holds {held or 'nothing'}")
    pieces, lost, whole = [], 0, 0
    for file in files:
        piece, count = read(file, voices, title=file.relative_to(path).with_suffix("").as_posix())
        if piece is not None:
            pieces.append(piece)
            whole += count
            lost += count - len(piece.notes)
    if not pieces:
        raise DataError(
            f"{path}: none of {len(files)} MIDI files keeps one metre with bars of at most 32 sixteenths and has notes "
            f"for {voices} voices: set --voices to how many they have"
        )
    notes = [f"{len(files) - len(pieces)} of {len(files)} files left out"] if len(pieces) < len(files) else []
    if lost:
        notes.append(
            f"{lost} of {whole} notes left out: more at once than {voices} voices, or shorter than the grid"
        )
    return tuple(pieces), tuple(notes)


def read(file: Path, voices: int = 4, title: str | None = None) -> tuple[Piece | None, int]:
    """Reads the piece in a MIDI file; returns it and the number of notes in the file.

    The piece is None if its metre changes or ``on_grid`` returns None, for example if it has too few voices. If exactly
    ``voices`` tracks or channels have notes, one at a time, they are the voices, highest first. Otherwise each note
    goes to the free voice whose last note is nearest; if there are too few free voices, inner notes are left out. Times
    are rounded to sixteenths of the file's beat. Percussion and pedals are ignored; the default metre is 4/4.

    Args:
        file: the MIDI file.
        voices: number of voices.
        title: title of the piece; by default the file's name.

    Raises:
        DataError: it is not a complete MIDI file.
    """
    import mido

    title = file.stem if title is None else title
    try:
        midi = mido.MidiFile(file)
    except (OSError, EOFError, ValueError, LookupError, mido.KeySignatureError) as error:
        raise DataError(f"{file}: not a whole MIDI file ({error or type(error).__name__})") from error
    if midi.ticks_per_beat <= 0:
        raise DataError(f"{file}: counts frames, not beats, so that it has no sixteenths")
    parts: dict[tuple[int, int], list[Note]] = defaultdict(list)
    bars: set[Fraction] = set()
    for number, track in enumerate(midi.tracks):
        tick, open_notes = 0, defaultdict(list)
        for message in track:
            tick += message.time
            step = round(Fraction(tick * STEPS, midi.ticks_per_beat))
            if message.type == "time_signature":
                bars.add(Fraction(4 * STEPS * message.numerator, message.denominator))
            elif message.type in ("note_on", "note_off") and message.channel != DRUMS:
                key = (message.channel, message.note)
                if message.type == "note_on" and message.velocity:
                    open_notes[key].append(step)
                elif open_notes[key]:
                    begin = open_notes[key].pop(0)
                    parts[number, message.channel].append((begin, max(step, begin + 1), message.note))
    count = sum(map(len, parts.values()))
    lines = [sorted(part) for part in parts.values() if part]
    if len(lines) == voices and all(_alone(line) for line in lines):
        lines.sort(key=lambda line: -float(np.mean([pitch for _, _, pitch in line])))
    else:
        lines = _dealt(sorted(note for line in lines for note in line), voices)
    if len(bars) > 1:
        return None, count
    return on_grid(
        title, bars.pop() if bars else Fraction(4 * STEPS), Fraction(0), [_quarters(line) for line in lines]
    ), count


def _quarters(line: Sequence[Note]) -> list[Sounded]:
    return [
        (Fraction(start, STEPS), Fraction(end - start, STEPS), pitch, False) for start, end, pitch in line
    ]


def _alone(line: Sequence[Note]) -> bool:
    """Whether a line has one note at a time; an overlap of one step counts as articulation."""
    return all(
        first[0] < then[0] and first[1] <= then[0] + 1 for first, then in zip(line, line[1:], strict=False)
    )


def _dealt(notes: Sequence[Note], voices: int) -> list[list[Note]]:
    """Distributes notes over voices, none of which plays two at once."""
    lines: list[list[Note]] = [[] for _ in range(voices)]
    together: dict[int, set[Note]] = defaultdict(set)
    for note in notes:
        together[note[0]].add(note)
    for start in sorted(together):
        free = [voice for voice, line in enumerate(lines) if not line or line[-1][1] <= start]
        chord = sorted(
            {note[2]: note for note in sorted(together[start])}.values(), key=lambda note: -note[2]
        )
        while len(chord) > len(free):  # inner notes are dropped first, the highest last
            chord.pop(len(chord) // 2)
        for note, voice in zip(chord, _nearest(lines, free, chord), strict=True):
            lines[voice].append(note)
    return lines


def _nearest(lines: Sequence[Sequence[Note]], free: Sequence[int], chord: Sequence[Note]) -> tuple[int, ...]:
    """Chooses as many ``free`` voices as a chord has notes: those whose last notes are nearest to it in total."""
    starts = np.linspace(72, 48, len(lines)).tolist()
    last = [line[-1][2] if line else pitch for line, pitch in zip(lines, starts, strict=True)]
    ways = list(combinations(free, len(chord)))
    far = [sum(abs(n[2] - last[v]) for n, v in zip(chord, way, strict=True)) for way in ways]
    return ways[int(np.argmin(far))]


def write(file: Path, piece: Piece, tempo: float = 80.0, names: Sequence[str] = ()) -> None:
    """Writes a piece as a MIDI file, one track per voice.

    Args:
        file: path of the file.
        piece: the piece.
        tempo: quarters per minute.
        names: of the voices.
    """
    import mido

    ticks = 480 // STEPS  # of a step
    midi = mido.MidiFile(ticks_per_beat=480)
    conductor = mido.MidiTrack([mido.MetaMessage("set_tempo", tempo=mido.bpm2tempo(tempo))])
    beats, unit = (piece.bar // STEPS, 4) if piece.bar % STEPS == 0 else (piece.bar, 16)
    conductor.append(mido.MetaMessage("time_signature", numerator=beats, denominator=unit))
    midi.tracks.append(conductor)
    for voice in range(piece.voices):
        track = mido.MidiTrack()
        name = names[voice] if voice < len(names) else f"voice {voice + 1}"
        track.append(mido.MetaMessage("track_name", name=name))
        track.append(mido.Message("program_change", program=19, channel=voice))  # an organ
        events = []
        for _, start, length, pitch in piece.notes[piece.notes[:, 0] == voice].tolist():
            events += [
                (piece.upbeat + start, 1, "note_on", pitch),
                (piece.upbeat + start + length, 0, "note_off", pitch),
            ]
        last = 0
        for step, _, kind, pitch in sorted(events):
            track.append(
                mido.Message(kind, note=pitch, velocity=80, channel=voice, time=(step - last) * ticks)
            )
            last = step
        midi.tracks.append(track)
    midi.save(file)


def synthesise(piece: Piece, tempo: float = 80.0, rate: int = 22050) -> Float[np.ndarray, " N"]:
    """Synthesises a piece, each note a sum of six decaying partials; returns float32 samples in [-1, 1].

    Args:
        piece: the piece.
        tempo: quarters per minute.
        rate: samples per second.
    """
    step = 60 / tempo / STEPS
    sound = np.zeros(round((piece.length * step + 1) * rate), np.float64)
    for _, start, length, pitch in piece.notes.tolist():
        time = np.arange(round((length * step + RELEASE) * rate)) / rate
        frequency = 440 * 2 ** ((pitch - 69) / 12)
        partials = np.arange(1, len(HARMONICS) + 1)
        heard = partials * frequency < rate / 2
        tone = HARMONICS[heard] @ np.sin(2 * np.pi * frequency * partials[heard, None] * time)
        loud = np.minimum(time / ATTACK, 1) * np.clip((length * step + RELEASE - time) / RELEASE, 0, 1)
        begin = round(start * step * rate)
        sound[begin : begin + len(time)] += tone * loud * np.exp(-0.8 * time)
    return (0.9 * sound / np.abs(sound).max()).astype(np.float32)


def write_wav(file: Path, piece: Piece, tempo: float = 80.0, rate: int = 22050) -> None:
    """Writes the sound of ``synthesise`` as a 16-bit WAV file."""
    from scipy.io import wavfile

    wavfile.write(file, rate, np.round(32767 * synthesise(piece, tempo, rate)).astype(np.int16))
