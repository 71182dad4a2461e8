"""The docstrings of experiments/: help that fits a screen, and no measured figure, which results/ alone holds.

Nothing is imported or run: the sources are parsed.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "experiments"
DOCSTRINGS = {
    path.relative_to(ROOT).as_posix(): ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    for path in sorted(ROOT.rglob("*.py"))
}
# What ``python -m`` shows as help: the docstring of a file that runs, or of a package with a __main__.py.
HELP = [
    name.replace("__main__", "__init__")
    for name in DOCSTRINGS
    if name.endswith("__main__.py")
    or 'if __name__ == "__main__"' in (ROOT / name).read_text(encoding="utf-8")
]
FIGURE = re.compile(r"±|\d\.\d{2,}")
PAPER = re.compile(r"arxiv|et al\.", re.IGNORECASE)
MOST_LINES = 25


def figures(docstring: str) -> list[str]:
    """The lines that seem to hold a measured figure and cite no paper."""
    return [line for line in docstring.splitlines() if FIGURE.search(line) and not PAPER.search(line)]


def test_figures_are_found_and_papers_allowed():
    text = """Adapters.

    Expected: accuracy 0.750 to 0.756
    of three seeds, ± 0.02, in 3.5 minutes
    LoRA, https://arxiv.org/abs/2106.09685; Hu et al. 2021, 2106.09685
    """
    assert [line.split()[0] for line in figures(text)] == ["Expected:", "of"]


@pytest.mark.parametrize("name", DOCSTRINGS)
def test_a_docstring_holds_no_measured_figure(name):
    assert not figures(DOCSTRINGS[name])


@pytest.mark.parametrize("name", HELP)
def test_help_fits_a_screen(name):
    lines = DOCSTRINGS[name].splitlines()
    assert 3 <= len(lines) <= MOST_LINES
    assert any(line.strip().startswith("python -m experiments.") for line in lines)
