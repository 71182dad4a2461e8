"""Music as a language: one vocabulary for tunes of one voice and pieces of several, so that a decoder can learn both.

A piece is ``START``, the length of its bars, its number of voices K, and then a frame for every time at which a voice
changes: where in the bar that is, and of each voice, highest first, the pitch that it begins, ``HOLD`` or ``REST``.
The next frame says how long one lasts, at most a bar; the last frame is a position and ``END``. So a tune takes two
tokens a note, a position and a pitch, and a chorale five for every chord. Related to REMI (Huang and Yang 2020,
https://arxiv.org/abs/2002.00212), whose positions are these, and to BachBot (Liang et al. 2017), whose chords are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jtl.data.dataset import DataError
from jtl.data.readers.midi import LONGEST_BAR, Piece

PITCHES = 128  # of MIDI
MOST_VOICES = 8
START, END, HOLD, REST = range(4)
VOICES = 4  # + K - 1
BAR = VOICES + MOST_VOICES  # + length - 1
POSITION = BAR + LONGEST_BAR  # + 0 ... LONGEST_BAR - 1
PITCH = POSITION + LONGEST_BAR  # + 0 ... PITCHES - 1
SIZE = PITCH + PITCHES  # of the vocabulary
HEADER = 3  # START, bar, voices


def encode(piece: Piece) -> Int[np.ndarray, " T"]:
    """The tokens of a piece: ``HEADER`` + (K + 1) times its frames + 2 of them.

    Raises DataError for a bar longer than ``LONGEST_BAR``, or more than ``MOST_VOICES`` voices.
    """
    if not 1 <= piece.bar <= LONGEST_BAR or not 1 <= piece.voices <= MOST_VOICES:
        raise DataError(
            f"{piece.title}: expected bars of 1 to {LONGEST_BAR} sixteenths and 1 to {MOST_VOICES} voices, found "
            f"{piece.bar} and {piece.voices}"
        )
    # What each voice does in every sixteenth.
    grid = np.full((piece.length, piece.voices), REST, np.int32)
    for voice, start, length, pitch in piece.notes.tolist():
        grid[start : start + length, voice] = HOLD
        grid[start, voice] = PITCH + pitch
    before = np.vstack([np.full((1, piece.voices), -1, np.int32), grid[:-1]])
    changes = np.flatnonzero(((grid >= PITCH) | ((grid == REST) & (before != REST))).any(1))
    ends = [*changes[1:].tolist(), piece.length]
    frames = [
        at for first, end in zip(changes.tolist(), ends, strict=True) for at in range(first, end, piece.bar)
    ]
    position = POSITION + (piece.upbeat + np.array([*frames, piece.length])) % piece.bar
    body = np.column_stack([position[:-1], grid[frames]]).ravel()
    header = [START, BAR + piece.bar - 1, VOICES + piece.voices - 1]
    return np.concatenate([header, body, [position[-1], END]]).astype(np.int32)


def decode(tokens: Int[np.ndarray, " T"], title: str = "") -> Piece:
    """The piece that tokens spell; what follows the last whole frame is left out, for its length is not known.

    ``HOLD`` of a voice that is silent is silence.

    Raises DataError if they are not a header and frames, or hold no note.
    """
    tokens = np.asarray(tokens)
    if (
        len(tokens) < HEADER
        or tokens[0] != START
        or not (BAR <= tokens[1] < POSITION and VOICES <= tokens[2] < BAR)
    ):
        raise DataError(
            f"{title}: expected a piece to begin with START, a bar and voices, found {tokens[:3].tolist()}"
        )
    bar, voices = int(tokens[1]) - BAR + 1, int(tokens[2]) - VOICES + 1
    ended = np.flatnonzero(tokens == END)
    body = tokens[HEADER : ended[0] if len(ended) else None]
    size = voices + 1
    positions, count = body[::size] - POSITION, len(body) // size
    frames = body[: count * size].reshape(count, size)[:, 1:]
    right = (frames == HOLD) | (frames == REST) | (frames >= PITCH)
    if not ((positions >= 0) & (positions < bar)).all() or not right.all():
        raise DataError(f"{title}: expected frames of a position and {voices} pitches, HOLD or REST")
    steps = np.diff(positions) % bar
    times = np.concatenate([[0], np.cumsum(np.where(steps == 0, bar, steps))])
    notes = []
    for voice in range(voices):
        open_note: list[int] | None = None
        for at, end, token in zip(
            times[:-1].tolist(), times[1:].tolist(), frames[:, voice].tolist(), strict=False
        ):
            if token >= PITCH:
                open_note = [voice, at, 0, token - PITCH]
                notes.append(open_note)
            elif token == REST:
                open_note = None
            if open_note is not None:
                open_note[2] = end - open_note[1]
    if not notes:
        raise DataError(f"{title}: holds no note of known length")
    rows = np.array(notes, np.int32)
    order = np.lexsort((rows[:, 0], rows[:, 1]))
    return Piece(title, bar, int(positions[0]), voices, rows[order])


@dataclass(frozen=True)
class Grammar:
    """A rule for ``jtl.tasks.generate``: after the header of a piece, only tokens that may stand there.

    Attributes:
        bar: length of its bars.
        voices: K.
    """

    bar: int
    voices: int

    def __call__(
        self, logits: Float[Array, "B V"], new: Int[Array, "B N"], i: Int[Array, ""]
    ) -> Float[Array, "B V"]:
        """``logits`` of new token i, minus infinity where another kind of token must stand."""
        token = jnp.arange(logits.shape[-1])
        place = i % (self.voices + 1)
        position = (token >= POSITION) & (token < POSITION + self.bar)
        # A voice that has not begun has nothing to hold.
        voice = (token >= PITCH) | (token == REST) | ((token == HOLD) & (i > self.voices))
        ends = (token == END) & (place == 1) & (i > self.voices)
        return jnp.where(jnp.where(place == 0, position, voice | ends)[None], logits, -jnp.inf)


# --- rows of batches -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Frames:
    """A piece ready to be cut: its tokens, and what sounds in each frame."""

    tokens: Int[np.ndarray, " T"]
    sounding: Int[np.ndarray, "F K"]

    @property
    def size(self) -> int:
        return self.sounding.shape[1] + 1

    def cut(self, first: int, length: int, context: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """At most ``length`` tokens from frame ``first`` on behind a header, and which of them count.

        Those of the header do not, nor those of ``context`` frames. Inside a piece the header lacks ``START``, and the
        first frame says what sounds already; it does not count.
        """
        header, size = self.tokens[:HEADER] if first == 0 else self.tokens[1:HEADER], self.size
        room = (length - len(header)) // size * size
        begin = HEADER + first * size
        rest = self.tokens[begin : begin + room + (2 if begin + room + 2 == len(self.tokens) else 0)].copy()
        if len(header) + len(rest) > length:
            rest = rest[:room]
        if first:
            rest[1:size] = self.sounding[first]
        known = len(header) + size * max(context, 1 if first else 0)
        counts = np.arange(len(header) + len(rest)) >= known
        return np.concatenate([header, rest]), counts


def _frames(piece: Piece) -> _Frames:
    tokens = encode(piece)
    frames = tokens[HEADER:-2].reshape(-1, piece.voices + 1)[:, 1:]
    place = np.maximum.accumulate(np.where(frames == HOLD, 0, np.arange(len(frames))[:, None]), axis=0)
    return _Frames(tokens, np.take_along_axis(frames, place, 0))


def _batch(cuts: Sequence[tuple[np.ndarray, np.ndarray]], length: int) -> dict[str, np.ndarray]:
    """``input_ids``, ``attention_mask`` and ``counts``, 1 where the next token counts, (B, length) each."""
    fields = {
        name: np.zeros((len(cuts), length), np.int32) for name in ("input_ids", "attention_mask", "counts")
    }
    fields["input_ids"][:] = END
    for row, (tokens, counts) in enumerate(cuts):
        fields["input_ids"][row, : len(tokens)] = tokens
        fields["attention_mask"][row, : len(tokens)] = 1
        fields["counts"][row, : len(tokens) - 1] = counts[1:]
    return fields


@dataclass(frozen=True, eq=False)
class Crops:
    """Pieces to learn from: a row is a piece of a piece, in a key of its own; a long one has several rows an epoch.

    Attributes:
        pieces: the music.
        length: L, tokens of a row.
        keys: by how many semitones each piece may be moved: the lowest and the highest number.
    """

    pieces: Sequence[Piece]
    length: int
    keys: Int[np.ndarray, "P 2"]

    @cached_property
    def _cut(self) -> list[_Frames]:
        return [_frames(piece) for piece in self.pieces]

    @cached_property
    def _piece(self) -> Int[np.ndarray, " N"]:
        counts = [-(-len(one.tokens) // self.length) for one in self._cut]
        return np.repeat(np.arange(len(counts)), counts)

    def __len__(self) -> int:
        return len(self._piece)

    @property
    def lengths(self) -> Int[np.ndarray, " N"]:
        """Tokens of each row, filled up."""
        return np.full(len(self), self.length)

    @property
    def buckets(self) -> tuple[int, ...]:
        """The one padded length."""
        return (self.length,)

    def batch(
        self, indices: Int[np.ndarray, " B"], length: int, draws: Float[np.ndarray, "B 3"] | None = None
    ) -> dict[str, np.ndarray]:
        """The fields of a batch, all int32 (B, L): see ``_batch``; the draws choose where to cut, and the key."""
        draws = np.full((len(indices), 3), 0.5) if draws is None else draws
        cuts = []
        for index, draw in zip(indices, draws, strict=True):
            which = self._piece[index]
            one, (low, high) = self._cut[which], self.keys[which].tolist()
            count, room = len(one.sounding), (length - HEADER) // one.size
            # Past both ends, so that beginnings and endings are seen as often as the rest.
            first = round(float(draw[0]) * (count - room / 2) - room / 4)
            tokens, counts = one.cut(min(max(first, 0), max(count - room, 0)), length)
            by = low + int(draw[1] * (high - low + 1))
            cuts.append((np.where(tokens >= PITCH, tokens + by, tokens), counts))
        return _batch(cuts, length)


@dataclass(frozen=True, eq=False)
class Whole:
    """Pieces to measure on: overlapping rows, in which each token behind a header counts exactly once.

    All but the first row of a piece begin with half a row of context that does not count.

    Attributes:
        pieces: the music.
        length: L, tokens of a row.
    """

    pieces: Sequence[Piece]
    length: int

    @cached_property
    def _rows(self) -> list[tuple[np.ndarray, np.ndarray]]:
        rows = []
        for piece in self.pieces:
            one = _frames(piece)
            room = (self.length - HEADER) // one.size
            done = first = context = 0
            while True:
                tokens, counts = one.cut(first, self.length, context)
                rows.append((tokens, counts))
                if tokens[-1] == END:
                    break
                done = first + (len(tokens) - (HEADER if first == 0 else HEADER - 1)) // one.size
                context = max(1, room // 2)
                first = done - context
        return rows

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def tokens(self) -> int:
        """How many count."""
        return sum(int(counts.sum()) for _, counts in self._rows)

    @property
    def notes(self) -> int:
        """Notes of all pieces."""
        return sum(len(piece.notes) for piece in self.pieces)

    @property
    def lengths(self) -> Int[np.ndarray, " N"]:
        """Tokens of each row."""
        return np.array([len(tokens) for tokens, _ in self._rows])

    @property
    def buckets(self) -> tuple[int, ...]:
        """The one padded length."""
        return (self.length,)

    def batch(self, indices: Int[np.ndarray, " B"], length: int, draws: Any = None) -> dict[str, np.ndarray]:
        """The fields of a batch, all int32 (B, L): see ``_batch``."""
        return _batch([self._rows[i] for i in indices], length)


def keys_between(pieces: Sequence[Piece], low: Sequence[int], high: Sequence[int]) -> Int[np.ndarray, "P 2"]:
    """By how many semitones each piece may be moved so that its voices stay within their ranges; 0 always may be.

    Args:
        pieces: of as many voices as there are ranges.
        low: the lowest pitch of each voice.
        high: the highest.
    """
    keys = []
    for piece in pieces:
        own = [piece.notes[piece.notes[:, 0] == voice, 3] for voice in range(piece.voices)]
        down = max(low[voice] - int(pitch.min()) for voice, pitch in enumerate(own))
        up = min(high[voice] - int(pitch.max()) for voice, pitch in enumerate(own))
        keys.append((min(down, 0), max(up, 0)))
    return np.array(keys)
