"""Word error rate, the metric of speech recognition."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jtl.errors import InputError


def word_error_rate(said: Sequence[str], written: Sequence[str]) -> float:
    """Returns the substitutions, deletions and insertions that turn ``said`` into ``written``, per word of ``said``.

    It is computed over all texts together (not a mean over texts). Words are separated by white space, and case and
    punctuation matter, so normalise both sides first. 0 is perfect; values above 1 are possible.

    Args:
        said: the reference transcripts.
        written: the predicted transcripts.

    Raises:
        ValueError: different numbers of texts, or references without any word.

    >>> word_error_rate(["a cat sat", "on it"], ["a hat sat", "on"])
    0.4
    """
    if len(said) != len(written):
        raise InputError(f"expected a transcript of each text, got {len(said)} texts and {len(written)}")
    sides = [(one.split(), other.split()) for one, other in zip(said, written, strict=True)]
    words = sum(len(one) for one, _ in sides)
    if not words:
        raise InputError("nothing was said: the rate is an error for each word of `said`, which has none")
    return sum(_distance(one, other) for one, other in sides) / words


def _distance(one: list[str], other: list[str]) -> int:
    """Levenshtein distance in words."""
    row = np.arange(len(other) + 1)
    for word in one:
        changed = row[:-1] + [word != own for own in other]
        row = np.concatenate([row[:1] + 1, np.minimum(changed, row[1:] + 1)])
        # Insertions: the cheapest way to any place on the left, plus one per word from there.
        row = np.minimum.accumulate(row - np.arange(len(row))) + np.arange(len(row))
    return int(row[-1])
