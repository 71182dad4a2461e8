"""Docstrings as data: what is read of them, what is asked about them, and what is held apart."""

import inspect

import pytest

from experiments.data.docstring_questions import PACKAGES, WORDINGS, ask
from experiments.data.docstrings import docstrings, parse, plain, versions
from jtl.data import DataError

TRANSFORM = inspect.cleandoc(
    """
    Apply dimensionality
    reduction to X.

    The columns are those of :class:`~pandas.DataFrame`, see [1]_.

    .. versionadded:: 0.2

        >>> example

    Parameters
    ----------
    X : array-like of shape (n_samples, n_features)
        New data, where ``n_samples`` is the number of samples. It is not changed.

        .. note:: More.
    n_components : int, default=None
        How many components are kept. If None, all are.
    whiten : bool (optional)
        Divide by the singular values. Default is False, as usual.
    bounds : pair of floats, default=(1e-5, 1e5)
    *args
        What is left.
    a, b : int
        Two numbers.

    Returns
    -------
    X_new : ndarray
        Transformed values, one row for each sample.

    Raises
    ------
    ValueError
        If X has no rows at all.

    Examples
    --------
    >>> transform(X)
    """
)


@pytest.fixture(scope="module")
def one():
    return parse("here", "transform", TRANSFORM)


def test_a_docstring_is_read(one):
    assert one.summary == "Apply dimensionality reduction to X."
    assert one.prose == ("The columns are those of `DataFrame`, see.",)
    assert [entry.name for entry in one.sections["Parameters"]] == [
        "X", "n_components", "whiten", "bounds", "*args", "a, b",
    ]  # fmt: skip
    first = one.sections["Parameters"][0]
    assert first.kind == "array-like of shape (n_samples, n_features)"
    assert first.text == "New data, where n_samples is the number of samples. It is not changed."
    assert one.sections["Raises"] == (("ValueError", "", "If X has no rows at all."),)


def test_other_styles_end_the_prose():
    google = "Scale updates.\n\nBy the norm\nof all of them.\n\nArgs:\n  rate: how much.\n\nReturns:\n  it."
    found = parse("optax", "scale", google)
    assert found.prose == ("By the norm of all of them.",) and not found.sections
    assert parse("x", "y", ">>> no summary") is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Sort by :func:`numpy.sort`.", "Sort by `sort`."),
        ("The `paper <https://x.org/a>`_ of *Gauss*", "The paper of Gauss"),
        ("Ends here::", "Ends here"),
        ("**kwargs and a ** b", "kwargs and a b"),
        (":math:`x^2`, see :ref:`there`.", "x^2, see ."),
    ],
)
def test_markup_is_taken_out(text, said):
    assert plain(text) == said


def every(one):
    """All that can be asked: by the many texts that differ in their name alone."""
    from dataclasses import replace

    asked = [ask(replace(one, name=f"f{i}"), new_wordings=i % 2 == 1, characters=2000) for i in range(200)]
    return [question for own in asked for question in own]


def test_every_answer_stands_where_it_should(one):
    found = {}
    for own in every(one):
        start, answer = own["starts"][0], own["answers"][0]
        assert own["context"][start : start + len(answer)] == answer
        found.setdefault(own["kind"], set()).add(answer)
    assert found == {
        "type": {"array-like of shape (n_samples, n_features)", "int", "bool", "pair of floats"},
        "default": {"None", "False", "(1e-5, 1e5)"},
        "meaning": {
            "New data, where n_samples is the number of samples", "How many components are kept",
            "Divide by the singular values",
        },
        "name": {"X", "n_components", "whiten"},
        "returns": {"Transformed values, one row for each sample"},
        "raises": {"If X has no rows at all"},
    }  # fmt: skip


def test_questions_are_deterministic_and_train_lacks_a_wording(one):
    assert ask(one) == ask(one) and len(ask(one)) == 3
    asked = every(one)
    assert {own["new"] for own in asked} == {0, 1}
    old = [own for i in range(50) for own in ask(one)]
    assert not any(own["new"] for own in old)
    last = WORDINGS["type"][-1].split("{")[0]
    assert any(own["question"].startswith(last) for own in asked)


def test_an_installed_package_is_read_and_versions_name_it():
    found = docstrings("joblib")
    assert len(found) > 50 and any("Parameters" in own.sections for own in found)
    assert not any(own.name.startswith("_") for own in found)
    assert versions(["joblib", "sklearn"]).startswith("joblib ") and "scikit-learn" in versions(["sklearn"])
    with pytest.raises(DataError, match="'no_such_package' is not installed"):
        docstrings("no_such_package")


def test_no_package_is_in_two_splits():
    packages = [package for own in PACKAGES.values() for package in own]
    assert len(set(packages)) == len(packages)


def test_a_long_context_ends_after_an_entry(one):
    context = ask(one, characters=100)[0]["context"]
    assert context.endswith("It is not changed.\n") and len(context) > 100
