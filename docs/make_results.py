"""Write docs/results/*.md from the templates in docs/templates and the results in experiments/results.

    python docs/make_results.py           writes the pages
    python docs/make_results.py --check   exits with 1 and names the pages that are stale

A template is Markdown with expressions of Jinja, which call the functions of docs/result_helpers.py. So no figure is
typed by hand, and a sentence that says "better" asks for that verdict: where a new result no longer bears it out,
rendering raises.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import result_helpers
from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES, PAGES = Path(__file__).with_name("templates"), Path(__file__).with_name("results")


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
    return {path.name: jinja.get_template(path.name).render() for path in sorted(TEMPLATES.glob("*.md"))}


def stale() -> dict[str, str | None]:
    """The pages that are not as they should be, and how they should be; None for one that no template makes."""
    wanted = render()
    found = {path.name: path.read_text(encoding="utf-8") for path in PAGES.glob("*.md")}
    return {
        name: wanted.get(name) for name in sorted({**wanted, **found}) if wanted.get(name) != found.get(name)
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write docs/results from the templates and the results.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is stale")
    check, pages = parser.parse_args().check, stale()
    if check and pages:
        raise SystemExit(f"stale: {', '.join(pages)}: run python docs/make_results.py")
    PAGES.mkdir(exist_ok=True)
    for name, text in pages.items():
        if text is None:
            (PAGES / name).unlink()
        else:
            (PAGES / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
