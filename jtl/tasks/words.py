"""How well a transcript agrees with what was said."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jtl.errors import InputError


def word_error_rate(said: Sequence[str], written: Sequence[str]) -> float:
    """Words that must be changed, left out or put in to make ``written`` of ``said``, over the words of ``said``.

    Over all texts together (not a mean of theirs), words between white space; letters and points count as they stand,
    so put both sides into one form first. 0 is exact; above 1 more is wrong than was said.

    >>> word_error_rate(["a cat sat", "on it"], ["a hat sat", "on"])
    0.4

    Raises ValueError if the texts are not as many, or nothing was said.
    """
    if len(said) != len(written):
        raise InputError(f"expected a transcript of each text, got {len(said)} texts and {len(written)}")
    sides = [(one.split(), other.split()) for one, other in zip(said, written, strict=True)]
    words = sum(len(one) for one, _ in sides)
    if not words:
        raise InputError("nothing was said: the rate is an error for each word of `said`, which has none")
    return sum(_distance(one, other) for one, other in sides) / words


def _distance(one: list[str], other: list[str]) -> int:
    """Levenshtein's: the least changes, one word at a time, that turn one text into the other."""
    row = np.arange(len(other) + 1)
    for word in one:
        changed = row[:-1] + [word != own for own in other]
        row = np.concatenate([row[:1] + 1, np.minimum(changed, row[1:] + 1)])
        # Words put in: the cheapest way to any place on the left, and a step for each word from there.
        row = np.minimum.accumulate(row - np.arange(len(row))) + np.arange(len(row))
    return int(row[-1])
