"""The pages of results say what the files of results hold."""

import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS, RESULTS = ROOT / "docs", ROOT / "experiments" / "results"
TEMPLATES = sorted((DOCS / "templates").glob("*.md"))
EXPRESSION = re.compile(r"{{.*?}}|{%.*?%}|{#.*?#}", re.DOTALL)
TARGET = re.compile(r"\]\([^)\s]*\)")
# A decimal, an interval or a percentage; "95 %" is the level of all intervals.
FIGURE = re.compile(r"\d\.\d|±\s?\d|(?<!\d)(?!95 %)\d+\s?%")


@pytest.fixture(scope="module")
def make():
    """The script, with the folder of its helpers on the path."""
    sys.path.insert(0, str(DOCS))
    try:
        yield importlib.import_module("make_results")
    finally:
        sys.path.remove(str(DOCS))


@pytest.fixture(scope="module")
def pages(make):
    return make.render()


def test_pages_are_not_stale(make):
    assert list(make.stale()) == [], "run python docs/make_results.py"


def test_every_result_and_picture_is_used(pages):
    shown = "\n".join(text for name, text in pages.items() if name != "README.md")
    files = [path.name for path in RESULTS.iterdir() if path.suffix in (".json", ".png", ".jpg")]
    assert files
    assert [name for name in files if f"(../../experiments/results/{name})" not in shown] == []


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_no_figure_is_typed_by_hand(template):
    text = template.read_text(encoding="utf-8")
    printed = [span for span in EXPRESSION.findall(text) if span.startswith("{{")]
    typed = [span for span in printed if re.search(r"\d\.\d", span)]
    prose = EXPRESSION.sub(lambda span: "\n" * span.group().count("\n"), text)
    # What a paper reports may stand in the line that cites it.
    lines = [line for line in prose.splitlines() if "](https://" not in line]
    typed += [line for line in lines if FIGURE.search(TARGET.sub("", line))]
    assert typed == []


def test_links_resolve(pages):
    broken = []
    for name, text in pages.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith("https://"):
                continue
            file, _, anchor = target.partition("#")
            path = (DOCS / "results" / (file or name)).resolve()
            if not path.exists() or (anchor and anchor not in _anchors(pages[path.name])):
                broken.append(f"{name}: {target}")
    assert broken == []


def _anchors(text):
    """Those that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_commands_exist(pages):
    modules = set(re.findall(r"python -m ([\w.]+)", "\n".join(pages.values())))
    assert modules
    places = {module: ROOT / module.replace(".", "/") for module in modules}
    missing = [
        m for m, p in places.items() if not p.with_suffix(".py").exists() and not (p / "__main__.py").exists()
    ]
    assert missing == []


def test_a_sentence_that_no_longer_holds_raises(make):
    interval = importlib.import_module("result_helpers").Interval
    assert str(interval(-0.112, 0.03, 3).sure("worse")) == "0.112 ± 0.030"
    assert str(interval(-0.112, 0.03, 3, lower=True).sure("better")) == "0.112 ± 0.030"
    assert str(interval(-0.02, 0.03, 3).sure("undecided")) == "-0.020 ± 0.030"
    assert interval(0.02).verdict == "undecided"
    for verdict in ("better", "undecided"):
        with pytest.raises(ValueError, match=f"a sentence says {verdict}"):
            interval(-0.112, 0.03).sure(verdict)
    with pytest.raises(ValueError, match="the results do not say: it rains"):
        make.environment().from_string("{{ claim(1 > 2, 'it rains') }}").render()


def test_what_a_result_lacks_raises(make):
    for template in ("{{ result('compare').config.none }}", "{{ estimate('compare', 'none', 'full') }}"):
        with pytest.raises((LookupError, importlib.import_module("jinja2").UndefinedError)):
            make.environment().from_string(template).render()
