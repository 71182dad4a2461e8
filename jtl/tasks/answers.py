"""Metrics for question answering: exact match and word-level F1 of predicted answers, as SQuAD defines them.

Rajpurkar et al. 2016, "SQuAD: 100,000+ Questions for Machine Comprehension of Text", https://arxiv.org/abs/1606.05250,
section 6.1, with the text normalisation of the official script ``evaluate-v2.0.py``.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from jtl.errors import InputError


def normalise_answer(text: str) -> str:
    """Lower-cases a text and removes punctuation, articles and surplus white space.

    >>> normalise_answer("The  Eiffel-Tower, a sight!")
    'eiffeltower sight'
    """
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def exact_match(said: Sequence[str], right: Sequence[Sequence[str]]) -> float:
    """Returns the share of predictions that equal one of their reference answers after normalisation, in [0, 1].

    Args:
        said: the predicted answers.
        right: the reference answers of each question, at least one.

    Raises:
        ValueError: different numbers of predictions and questions, or a question without a reference answer.
    """
    return float(np.mean(each_answer(_same, said, right)))


def answer_f1(said: Sequence[str], right: Sequence[Sequence[str]]) -> float:
    """Returns the mean word F1 of predictions, each against its best-matching reference answer, in [0, 1].

    Args:
        said: the predicted answers.
        right: the reference answers of each question, at least one.

    Raises:
        ValueError: as for ``exact_match``.

    >>> answer_f1(["the Denver Broncos team"], [["Denver Broncos", "Broncos"]])
    0.8
    """
    return float(np.mean(each_answer(word_f1, said, right)))


def each_answer(
    measure: Callable[[str, str], float], said: Sequence[str], right: Sequence[Sequence[str]]
) -> list[float]:
    """Returns ``measure(prediction, reference)`` of each prediction, maximised over its reference answers.

    Raises:
        ValueError: different numbers of predictions and questions, or a question without a reference answer.
    """
    if len(said) != len(right) or not all(right):
        empty = sum(not own for own in right)
        raise InputError(
            f"expected right answers for each of {len(said)}, got {len(right)}, {empty} of them empty"
        )
    return [max(measure(one, own) for own in answers) for one, answers in zip(said, right, strict=True)]


def word_f1(said: str, right: str) -> float:
    """Returns the F1 of the normalised words of two answers; 1 if both have none, as in SQuAD 2.0."""
    one, other = normalise_answer(said).split(), normalise_answer(right).split()
    if not one or not other:
        return float(one == other)
    common = sum((Counter(one) & Counter(other)).values())
    if not common:
        return 0.0
    precision, recall = common / len(one), common / len(other)
    return 2 * precision * recall / (precision + recall)


def _same(said: str, right: str) -> float:
    return float(normalise_answer(said) == normalise_answer(right))
