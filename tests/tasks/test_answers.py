"""Known cases of SQuAD's official script, evaluate-v2.0.py, worked out by hand."""

import pytest

from jtl.tasks import answer_f1, exact_match
from jtl.tasks.answers import normalise_answer, word_f1


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Norman conquest.", "norman conquest"),
        ("a  cat,\n an   owl", "cat owl"),
        ("theatre", "theatre"),  # an article is a whole word
        ("Saint-Denis'", "saintdenis"),
        ("1,000", "1000"),
        ("the", ""),
    ],
)
def test_normalisation(text, normal):
    assert normalise_answer(text) == normal


@pytest.mark.parametrize(
    ("said", "right", "f1"),
    [
        ("Denver Broncos", "the Denver Broncos!", 1.0),
        ("Denver Broncos team", "Denver Broncos", 2 * (2 / 3) / (2 / 3 + 1)),
        ("in the 10th and 11th centuries", "10th and 11th centuries", 2 * (4 / 5) / (4 / 5 + 1)),
        ("to be or not to be", "to be", 2 * (2 / 6) / (2 / 6 + 1)),  # a word counts as often as both have it
        ("France", "Germany", 0.0),
        ("", "France", 0.0),
        ("the", "a", 1.0),  # nothing is left of either
    ],
)
def test_f1(said, right, f1):
    assert word_f1(said, right) == pytest.approx(f1)


def test_the_best_of_several_right_answers_counts():
    said = ["Santa Clara, California", "1600"]
    right = [["Levi's Stadium", "santa clara california"], ["in 1600", "the year 1600 AD"]]
    assert exact_match(said, right) == 0.5
    assert answer_f1(said, right) == pytest.approx((1 + 2 / 3) / 2)


def test_a_question_without_a_right_answer_raises():
    with pytest.raises(ValueError, match="for each of 2, got 2, 1 of them empty"):
        exact_match(["a", "b"], [["a"], []])
