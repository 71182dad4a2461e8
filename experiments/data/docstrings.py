"""Docstrings of installed packages as texts: a summary line, prose, and numpydoc's sections with their entries.

They are real technical English that every machine with jtl has. Sources are parsed, not imported; which versions of the
packages are installed decides what is found. Markup of reStructuredText is taken out. Tests, vendored copies, private
names and repeated texts are left out.

The format: https://numpydoc.readthedocs.io/en/latest/format.html; of other styles (``Args:``) the prose is read alone.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from jtl.data.dataset import DataError

# The distribution of a package, where its name is another.
DISTRIBUTIONS = {"sklearn": "scikit-learn"}
_FOREIGN = re.compile(r"(^|/)(tests?|testing|externals?|_external|_lib|_?vendor(ed)?|conftest)(/|\.py$)")
_UNDERLINED = re.compile(r"^(\w[\w ]*)\n[-=]{3,}[ ]*$", re.MULTILINE)
_OTHER_STYLE = re.compile(
    r"^(Args|Arguments|Parameters|Returns?|Raises|Yields|Attributes|Examples?|Notes?|References|See [Aa]lso|Usage)"
    r":{1,2}[ ]*$",
    re.MULTILINE,
)


class Entry(NamedTuple):
    """One parameter, result or error of a docstring.

    Attributes:
        name: what it is called; empty for a result without a name.
        kind: its type, with ``optional`` and the default, as written; empty if not said.
        text: its description, in one line; empty if there is none.
    """

    name: str
    kind: str
    text: str


@dataclass(frozen=True)
class Docstring:
    """What one docstring says.

    Attributes:
        package: where it was found.
        name: of the function, class or method, without what it is in.
        summary: its first paragraph, in one line.
        prose: paragraphs between the summary and the first section, a line each; examples and directives left out.
        sections: entries of ``Parameters``, ``Returns`` and ``Raises``, those that it has.
    """

    package: str
    name: str
    summary: str
    prose: tuple[str, ...]
    sections: Mapping[str, tuple[Entry, ...]]


@lru_cache(maxsize=32)
def docstrings(package: str) -> tuple[Docstring, ...]:
    """Those of a package, in the order of its files and lines.

    Raises DataError if it is not installed.
    """
    found, seen = [], set()
    for name, text in _read(package):
        if text not in seen:
            seen.add(text)
            if (one := parse(package, name, text)) is not None:
                found.append(one)
    return tuple(found)


def versions(packages: Sequence[str]) -> str:
    """``"numpy 2.4.6, scipy 1.17.1"``: what decides the texts."""
    return ", ".join(
        f"{DISTRIBUTIONS.get(name, name)} {metadata.version(DISTRIBUTIONS.get(name, name))}"
        for name in packages
    )


def parse(package: str, name: str, text: str) -> Docstring | None:
    """What ``text``, a docstring without its indentation, says; None if it has no summary.

    >>> one = parse("numpy", "rfftfreq", RFFTFREQ)
    >>> one.summary
    'Sample frequencies of `rfft`.'
    >>> one.sections["Parameters"][1]
    Entry(name='d', kind='scalar, optional', text='Sample spacing. Default is 1.')
    """
    headings = list(_UNDERLINED.finditer(text))
    first = min(
        (found.start() for found in (*headings[:1], _OTHER_STYLE.search(text)) if found is not None),
        default=len(text),
    )
    paragraphs = [own for own in re.split(r"\n[ \t]*\n", text[:first]) if own.strip()]
    if not paragraphs or not _is_prose(paragraphs[0]):
        return None
    sections = {}
    ends = [*(own.start() for own in headings[1:]), len(text)]
    for heading, end in zip(headings, ends, strict=False):
        title = heading[1].strip()
        if title in ("Parameters", "Returns", "Raises") and title not in sections:
            sections[title] = tuple(_entries(text[heading.end() : end]))
    return Docstring(
        package,
        name,
        plain(paragraphs[0]),
        tuple(plain(own) for own in paragraphs[1:] if _is_prose(own)),
        sections,
    )


RFFTFREQ = """Sample frequencies of `rfft`.

Parameters
----------
n : int
    Window length.
d : scalar, optional
    Sample
    spacing. Default is ``1``.
"""


def plain(text: str) -> str:
    """``text`` in one line, without the markup of reStructuredText; single backquotes stay.

    >>> plain("See :func:`~numpy.sort`, ``axis=-1`` and\\n    the :ref:`guide <user_guide>`.")
    'See `sort`, axis=-1 and the guide.'
    """
    for pattern, replacement in _MARKUP:
        text = re.sub(pattern, replacement, text)
    return " ".join(text.split()).removesuffix("::").strip()


_MARKUP = (
    (r":math:`([^`]*)`", r"\1"),
    (r"(?::[\w:+-]+:)?`([^`<]+?)\s*<[^`>]*>`_{0,2}", r"\1"),  # links and references with a text of their own
    (r":(?:ref|doc):`[^`]*`", ""),
    (r":[\w:+-]+:`~?(?:[\w.]*\.)?([^`.]*)`", r"`\1`"),  # roles keep the last name of a path
    (r"`([^`]+)`_{1,2}", r"\1"),
    (r"``|\*\*|\s*\[[\w-]+\]_", ""),
    (r"(?<![\w*])\*(\w[^*\n]*?)\*(?![\w*])", r"\1"),
    (r",\s*\.", "."),
)


def _is_prose(paragraph: str) -> bool:
    return not paragraph.startswith((" ", "\t", "..", ">>>", "- ", "* ", "+-", "==", "|"))


def _entries(section: str) -> Iterator[Entry]:
    """The entries of a section: a line at the margin each, and what is indented below."""
    header, lines = None, list[str]()
    for line in (*section.strip("\n").splitlines(), "."):
        if line[:1].isspace() or not line.strip():
            lines.append(line)
            continue
        if header is not None:
            name, colon, kind = header.partition(" : ")
            alone = "" if colon else name.removesuffix(":").strip()
            yield Entry(name.strip() if colon else alone, plain(kind), _described(lines))
        header, lines = line, []


def _described(lines: list[str]) -> str:
    paragraphs = re.split(r"\n[ \t]*\n", inspect.cleandoc("\n".join(["", *lines])))
    kept = []
    for paragraph in paragraphs:
        if not _is_prose(paragraph):
            break
        kept.append(plain(paragraph.split("\n..")[0]))
    return " ".join(kept)


# --- files -----------------------------------------------------------------------------------------


def _read(package: str) -> Iterator[tuple[str, str]]:
    """(name, docstring) of what a package defines in Python, and of what NumPy and SciPy add by ``add_newdoc``."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"the package {package!r} is not installed: its docstrings are the data")
    root = Path(next(iter(spec.submodule_search_locations)))
    for path in sorted(root.rglob("*.py")):
        if _FOREIGN.search(path.relative_to(root).as_posix()):
            continue
        source = path.read_text(encoding="utf-8", errors="ignore")
        try:
            nodes = ast.walk(ast.parse(source))
        except SyntaxError:  # a template, or of another Python
            continue
        for node in nodes:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                name, text = node.name, ast.get_docstring(node)
            elif isinstance(node, ast.Call):
                name, text = _added(node)
            else:
                continue
            if text and not name.startswith("_"):
                yield name, text


def _added(call: ast.Call) -> tuple[str, str | None]:
    """Name and docstring of ``add_newdoc(..., "name", "text")``, or of ``("method", "text")`` in its last place."""
    if getattr(call.func, "id", getattr(call.func, "attr", "")) != "add_newdoc" or len(call.args) < 2:
        return "", None
    name, text = call.args[-2:]
    if isinstance(text, ast.Tuple) and len(text.elts) == 2:
        name, text = text.elts
    values = [
        own.value for own in (name, text) if isinstance(own, ast.Constant) and isinstance(own.value, str)
    ]
    return (values[0], inspect.cleandoc(values[1])) if len(values) == 2 else ("", None)
