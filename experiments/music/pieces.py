"""Music as notes on a grid of sixteenths, and which pieces set the same melody.

``jtl.data.sets.chorales`` has Bach's chorales, fiddle tunes and folk songs, ``jtl.data.midi`` reads your own files, and
``experiments.music.tokens`` makes them a language.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int

from jtl.data.dataset import DataError, stable_hash
from jtl.data.readers.midi import Piece

MAJOR = (0, 2, 4, 5, 7, 9, 11)  # semitones above the first note of a scale
# Which pitch classes sound well together: primes, thirds, fourths, fifths and sixths.
CONSONANT = np.isin(np.subtract.outer(np.arange(12), np.arange(12)) % 12, (0, 3, 4, 5, 7, 8, 9)).astype(
    np.float32
)


# --- tunes sung at once ----------------------------------------------------------------------------


def quodlibets(
    tunes: Sequence[Piece],
    low: Sequence[int],
    high: Sequence[int],
    rounds: int = 1,
    seed: int = 0,
    among: int = 128,
) -> tuple[Piece, ...]:
    """Pieces of several voices, each of which sings a tune of its own: in one metre, one scale, and their ranges.

    They teach a model what voices are, that they share bars and a key, and which intervals sound together: to a tune
    are found others that are least often a second, a seventh or a tritone away.

    Args:
        tunes: of one voice. Those of a round are all different; tunes of like length meet.
        low: the lowest pitch of each voice, from the highest voice on.
        high: the highest. A tune is moved by octaves to where its middle is nearest to that of its voice.
        rounds: how often each tune is sung.
        seed: of who sings with whom, and in which scale.
        among: how many tunes each voice is chosen from; 1 takes any.
    """
    rng, voices = np.random.default_rng(seed), len(low)
    found: list[Piece] = []
    groups: dict[int, list[Piece]] = {}
    for tune in tunes:
        groups.setdefault(tune.bar, []).append(tune)
    for group in groups.values():
        sung = _sung(group)
        fits = (sung @ CONSONANT).reshape(len(group), -1)
        sounds, sung = np.asarray(sung.any(-1), np.float32), sung.reshape(len(group), -1)
        lengths = np.array([tune.length for tune in group])
        for _ in range(rounds):
            waiting = np.argsort(lengths * np.exp(0.2 * rng.normal(size=len(group)))).tolist()
            while len(waiting) >= voices:
                chosen = [waiting.pop(0)]
                while len(chosen) < voices:
                    near = waiting[:among]
                    at_once = np.maximum(sounds[near] @ sounds[chosen].T, 1)
                    share = (sung[near] @ fits[chosen].T / at_once).sum(1)
                    chosen.append(waiting.pop(int(share.argmax())))
                parts = [group[i] for i in rng.permutation(chosen)]
                found.append(_together(parts, low, high, int(rng.integers(12))))
    return tuple(found)


def _sung(tunes: Sequence[Piece], steps: int = 256) -> Float[np.ndarray, "N steps 12"]:
    """1 where a tune sings a degree of its scale, in each of so many sixteenths from its first bar line on."""
    found = np.zeros((len(tunes), steps, 12), np.float32)
    for own, tune in zip(found, tunes, strict=True):
        first = scale(tune)
        for _, start, length, pitch in tune.notes.tolist():
            own[tune.upbeat + start : tune.upbeat + start + length, (pitch - first) % 12] = 1
    return found


def _together(tunes: Sequence[Piece], low: Sequence[int], high: Sequence[int], tonic: int) -> Piece:
    parts, end = [], min(tune.upbeat + tune.length for tune in tunes)
    for voice, tune in enumerate(tunes):
        pitch = tune.notes[:, 3]
        by = tonic - scale(tune)
        by += 12 * round(((low[voice] + high[voice]) / 2 - (pitch.min() + pitch.max()) / 2 - by) / 12)
        part = tune.notes + np.array([voice, tune.upbeat, 0, by], np.int32)
        part = part[part[:, 1] < end]
        part[:, 2] = np.minimum(part[:, 2], end - part[:, 1])
        parts.append(part)
    notes = np.concatenate(parts)
    first = int(notes[:, 1].min())
    notes[:, 1] -= first
    notes = notes[np.lexsort((notes[:, 0], notes[:, 1]))]
    return Piece(
        " with ".join(tune.title for tune in tunes), tunes[0].bar, first % tunes[0].bar, len(tunes), notes
    )


def scale(piece: Piece) -> int:
    """The pitch class on which the major scale begins that holds most of a piece, 0 for C: also for A minor.

    Of scales that hold as much the one whose own triad sounds longest.
    """
    weights = np.zeros(12)
    weights[list(MAJOR)] = 1
    weights[[0, 4, 7]] += 0.01
    length = np.bincount(piece.notes[:, 3] % 12, piece.notes[:, 2], 12)
    return int(np.argmax([length @ np.roll(weights, first) for first in range(12)]))


# --- which pieces share a melody -------------------------------------------------------------------


def phrases(melody: Int[np.ndarray, " M"], length: int = 6) -> set[tuple[int, ...]]:
    """All runs of ``length`` steps between the notes of a melody, which are the same in every key.

    >>> phrases(np.array([60, 62, 64, 62]), length=2) == {(2, 2), (2, -2)}
    True
    """
    steps = np.diff(melody).tolist()
    return {tuple(steps[i : i + length]) for i in range(len(steps) - length + 1)}


def alike(pieces: Sequence[Piece], others: Sequence[Piece], share: float = 0.25) -> Iterator[tuple[int, int]]:
    """Which of the ``pieces`` and which of the ``others`` have a melody in common, in whatever key.

    They do if that ``share`` of the phrases of the shorter one stands in the other.
    """
    found = [phrases(piece.melody()) for piece in others]
    holders: dict[tuple[int, ...], list[int]] = {}
    for j, own in enumerate(found):
        for phrase in own:
            holders.setdefault(phrase, []).append(j)
    for i, piece in enumerate(pieces):
        own = phrases(piece.melody())
        common = Counter(j for phrase in own for j in holders.get(phrase, ()))
        for j, count in common.items():
            if count >= share * min(len(own), len(found[j])):
                yield i, j


def by_melody(pieces: Sequence[Piece]) -> Int[np.ndarray, " N"]:
    """A number for each piece, the same for those that are ``alike`` or name one tune, or that a third one binds."""
    group = np.arange(len(pieces))
    first: dict[str, int] = {}
    named = ((i, first.setdefault(piece.tune, i)) for i, piece in enumerate(pieces) if piece.tune)
    for i, j in (*alike(pieces, pieces), *named):
        group[group == group[i]] = group[j]
    return group


def without(pieces: Sequence[Piece], others: Sequence[Piece]) -> tuple[Piece, ...]:
    """The ``pieces`` that are ``alike`` to none of the ``others``."""
    known = {i for i, _ in alike(pieces, others)}
    return tuple(piece for i, piece in enumerate(pieces) if i not in known)


def split(pieces: Sequence[Piece], shares: tuple[float, float] = (0.1, 0.2)) -> dict[str, tuple[Piece, ...]]:
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
