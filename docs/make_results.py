"""Write docs/results/*.md, and the README's headlines, from docs/templates and the results in experiments/results.

    python docs/make_results.py           writes the pages
    python docs/make_results.py --check   exits with 1 and names the pages that are stale

A template is Markdown with expressions of Jinja, which call the functions of docs/result_helpers.py. So no figure is
typed by hand, and a sentence that says "better" asks for that verdict: where a new result no longer bears it out,
rendering raises. The template headlines.md makes no page: it stands in the README, between two comments.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import result_helpers
from jinja2 import Environment, FileSystemLoader, StrictUndefined

ROOT = Path(__file__).parents[1]
TEMPLATES, PAGES = ROOT / "docs" / "templates", ROOT / "docs" / "results"
HEADLINES, README = "headlines.md", ROOT / "README.md"
BEGIN, END = "<!-- results -->\n", "<!-- /results -->"


def environment() -> Environment:
    """What renders a template: the helpers are its globals and, since they read well there, filters."""
    found = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, extensions=["jinja2.ext.do"],
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    helpers = {name: getattr(result_helpers, name) for name in result_helpers.__all__}
    found.globals |= helpers
    found.filters |= helpers
    return found


def render() -> dict[str, str]:
    """The pages, by file name.

    Raises:
        jinja2.UndefinedError: a template asks for what a result does not have.
        KeyError: likewise, in a helper.
        ValueError: a sentence says what the results do not.
    """
    jinja = environment()
    names = sorted(path.name for path in TEMPLATES.glob("*.md"))
    return {name: jinja.get_template(name).render() for name in names if name != HEADLINES}


def with_headlines(text: str) -> str:
    """The README with new headlines between its two comments. Raises ValueError if it lacks them."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md has no {BEGIN.strip()} ... {END}")
    return before + begin + environment().get_template(HEADLINES).render() + end + after


def stale() -> dict[Path, str | None]:
    """The files that are not as they should be, and how they should be; None for one that no template makes."""
    found = {path: path.read_text(encoding="utf-8") for path in [README, *sorted(PAGES.glob("*.md"))]}
    wanted = {README: with_headlines(found[README])}
    wanted |= {PAGES / name: text for name, text in render().items()}
    return {
        path: wanted.get(path) for path in sorted({**wanted, **found}) if wanted.get(path) != found.get(path)
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write docs/results and the README's headlines.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file is stale")
    check, files = parser.parse_args().check, stale()
    if check and files:
        names = ", ".join(str(path.relative_to(ROOT)) for path in files)
        raise SystemExit(f"stale: {names}: run python docs/make_results.py")
    PAGES.mkdir(exist_ok=True)
    for path, text in files.items():
        if text is None:
            path.unlink()
        else:
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
