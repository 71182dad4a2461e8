"""Questions over the docstrings of installed packages, whose answers stand there word for word.

What type an argument has and what its default is, what it means, which argument a description is of, what comes back,
when an error is raised: SciPy and Matplotlib are train, NumPy is validation, scikit-learn is test.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from experiments.data.docstrings import Docstring, Entry, docstrings, versions
from jtl.data.dataset import Dataset, Example, stable_hash
from jtl.data.readers.questions import dataset

# No package is in two splits, so that none shares a docstring.
PACKAGES = {"train": ("scipy", "matplotlib"), "validation": ("numpy",), "test": ("sklearn",)}
# The last wording of each kind is not in train.
WORDINGS = {
    "type": ("What type is `{name}`?", "Of which type is the argument {name}?", "What should `{name}` be?",
             "Which kind of value does {name} take?"),
    "default": ("What is the default of `{name}`?", "Which value has {name} if it is not given?",
                "What does `{name}` default to?", "If I leave {name} out, what is used?"),
    "meaning": ("What does `{name}` mean?", "What is {name} for?", "What is the argument `{name}`?",
                "Please explain {name}."),
    "name": ("Which argument is described as: {text}?", "What is the name of this argument: {text}?",
             "How do I set this: {text}?", "{text}: where do I say so?"),
    "returns": ("What does `{function}` return?", "What is the result of {function}?",
                "What comes out of `{function}`?", "What do I get back when I call {function}?"),
    "raises": ("When does `{function}` raise `{name}`?", "In which case is {name} raised?",
               "What makes `{function}` fail with {name}?", "Why did I get a {name}?"),
}  # fmt: skip
PER_DOCSTRING = 3  # questions at most
CHARACTERS = 300  # of a context, about: most then fit a window of 128 tokens

_TYPE = re.compile(r"^(.*?)[,;]?\s*\(?\b(?:optional|default)\b.*$")
_DEFAULT = re.compile(
    r"\bdefault(?:s to|\s+is|\s+value)?\s*[=:]?\s*((?:[^()\s]|\([^()]*\))(?:[^()]|\([^()]*\))*)\)?$"
)
_DESCRIBED_DEFAULT = re.compile(
    r"\b[Dd]efault(?:s to| value is| is|:)\s+('[^']*'|\"[^\"]*\"|None|True|False|-?\d[\w.e+-]*\b)(?=[\s.,;)]|$)"
)
_SENTENCE = re.compile(r"^(.+?)[.?!:]?(?:(?<=[.?!:])\s|$)")


def docstring_questions() -> Dataset:
    """Questions over docstrings of installed packages, other packages in each split.

    Examples also have a ``kind``, and ``new``: 1 for wordings that train lacks.
    """
    splits: dict[str, list[Example]] = {}
    seen: set[str] = set()
    for split in ("test", "validation", "train"):
        splits[split] = []
        for package in PACKAGES[split]:
            for one in docstrings(package):
                asked = ask(one, new_wordings=split != "train")
                if asked and asked[0]["context"] not in seen:
                    splits[split] += asked
                    seen.add(asked[0]["context"])
    told = {one["answers"][0] for one in splits["train"]}
    known = np.mean([one["answers"][0] in told for one in splits["test"]])
    packages = [package for own in PACKAGES.values() for package in own]
    notes = (
        "The questions are templates: a model can learn their kinds, and what remains is finding the entry and the "
        f"place in it. {known:.0%} of the test answers, mostly types and defaults such as `int` or `None`, are also "
        "answers in train.",
    )
    parts = {split: splits[split] for split in PACKAGES}
    return dataset("docstrings", parts, f"docstrings of {versions(packages)}", notes)


def ask(one: Docstring, *, new_wordings: bool = False, characters: int = CHARACTERS) -> list[Example]:
    """At most three questions about a docstring, of different kinds; which and in which words its text decides.

    ``type`` and ``default`` of an argument, ``meaning`` (the first sentence of its description) and ``name`` (the other
    way round), ``returns`` and ``raises`` (the first sentence there). The context is the summary and the entries of
    Parameters, Returns and Raises.

    Args:
        one: what to ask about.
        new_wordings: ask in the last wording of each kind too.
        characters: no entry of the context begins behind so many.
    """
    context, facts = _facts(one, characters)
    rng = np.random.default_rng(stable_hash(f"{one.name}\n{context}"))
    kinds = sorted({kind for kind, *_ in facts})
    examples: list[Example] = []
    for place in rng.permutation(len(kinds))[:PER_DOCSTRING]:
        kind = kinds[place]
        among = [fact for fact in facts if fact[0] == kind]
        _, fields, answer, start = among[rng.integers(len(among))]
        wordings = WORDINGS[kind]
        which = int(rng.integers(len(wordings) if new_wordings else len(wordings) - 1))
        examples.append(
            {
                "question": wordings[which].format(function=one.name, **fields),
                "context": context,
                "answers": [answer],
                "starts": [start],
                "kind": kind,
                "new": int(which == len(wordings) - 1),
            }
        )
    return examples


Fact = tuple[str, dict[str, str], str, int]  # kind, fields of the wording, answer, its place


def _facts(one: Docstring, characters: int) -> tuple[str, list[Fact]]:
    """The context, and all that can be asked about it."""
    context, facts = f"{one.summary}\n", list[Fact]()
    for section, entries in one.sections.items():
        context += f"\n{section}\n"
        for entry in entries:
            if len(context) > characters:
                return context, facts
            header = len(context) + len(entry.name) + (3 if entry.name and entry.kind else 0)
            context += " : ".join(filter(None, (entry.name, entry.kind))) + "\n"
            body = len(context) + 4
            context += f"    {entry.text}\n" if entry.text else ""
            facts += _of_entry(section, entry, header, body)
    return context, facts


def _of_entry(section: str, entry: Entry, header: int, body: int) -> Iterator[Fact]:
    """What can be asked about one entry, whose type begins at ``header`` and whose description at ``body``."""
    sentence = _SENTENCE.match(entry.text)
    said = sentence[1] if sentence and 2 < len(sentence[1].split()) <= 25 else None
    fields = {"name": entry.name}
    if section == "Returns":
        if said:
            yield "returns", fields, said, body
        return
    if not re.fullmatch(r"\w+", entry.name):  # `x, y` or `**kwargs`
        return
    if section == "Raises":
        if said:
            yield "raises", fields, said, body
        return
    kind = found[1] if (found := _TYPE.match(entry.kind)) else entry.kind
    if kind:
        yield "type", fields, kind, header
    if default := _DEFAULT.search(entry.kind):
        yield "default", fields, default[1], header + default.start(1)
    elif default := _DESCRIBED_DEFAULT.search(entry.text):
        yield "default", fields, default[1], body + default.start(1)
    if said:
        yield "meaning", fields, said, body
        if len(said.split()) > 4:
            at = header - len(entry.name) - (3 if entry.kind else 0)
            yield "name", {"text": " ".join(said.split()[:12])}, entry.name, at
