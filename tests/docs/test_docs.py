"""The README and the pages of docs: short enough, true to the code, and without a dead link."""

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import jtl
from jtl.models import ARCHITECTURES
from jtl.pretrained import SHORT_NAMES

ROOT = Path(__file__).parents[2]
README, CHANGELOG = ROOT / "README.md", ROOT / "CHANGELOG.md"
API, MOVED = ROOT / "docs" / "api.md", ROOT / "docs" / "moved.md"
PAGES = [
    README,
    CHANGELOG,
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs/results").glob("*.md")),
]
NAMED = [README, API, ROOT / "docs" / "experiments.md", ROOT / "docs" / "contributing.md"]
NAME = re.compile(r"(?<![\w/.-])(?:jtl|experiments)(?!\.md\b|\.NAME\b)(?:\.[A-Za-z_]\w*)+")
LINK = re.compile(r"\[(?:[^\]`]|`[^`]*`)*\]\(([^)\s]+)\)")


def read(page):
    return page.read_text(encoding="utf-8")


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", read(page), re.DOTALL | re.MULTILINE)


def cells(page):
    """The rows of all tables of a page, each as its cells; those of the header and the line under it are left out."""
    lines = [line for line in read(page).splitlines() if line.startswith("|")]
    rules = [number for number, line in enumerate(lines) if re.fullmatch(r"[|\-: ]+", line)]
    rows = [line for number, line in enumerate(lines) if not {number, number + 1} & set(rules)]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


def found(name):
    """What a dotted name names: a module, or an attribute of the longest module that it begins with."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            value = getattr(value, part)
        return value
    raise ModuleNotFoundError(name)


def missing(names):
    lost = []
    for name in sorted(set(names)):
        try:
            found(name)
        except (AttributeError, ModuleNotFoundError):
            lost.append(name)
    return lost


def anchors(page):
    """Those that GitHub gives the headings of a page."""
    prose = re.sub(r"^```.*?^```$", "", read(page), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_read_at_once():
    assert len(read(README).splitlines()) <= 150


def test_the_first_version_is_told_in_forty_lines():
    told = re.search(r"^## \[?0\.1.*?(?=^## |\Z)", read(CHANGELOG), re.DOTALL | re.MULTILINE)
    assert told and len(told.group().splitlines()) <= 40


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_resolve(page):
    broken = []
    for target in LINK.findall(read(page)):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", NAMED, ids=lambda page: page.name)
def test_names_exist(page):
    assert missing(NAME.findall(read(page))) == []


@pytest.mark.parametrize("page", [*NAMED, MOVED], ids=lambda page: page.name)
def test_paths_exist(page):
    paths = re.findall(r"(?<![\w./-])(?:jtl|experiments|docs|tests)/[\w./*-]*\w", read(page))
    lost = [path for path in paths if "NAME" not in path and not list(ROOT.glob(path))]
    assert lost == []


def test_the_api_says_which_file_has_what():
    wrong = []
    for _, functions, files in cells(API):
        linked = [(API.parent / target).resolve() for target in LINK.findall(files)]
        for name in NAME.findall(functions):
            value = found(name)
            if not (inspect.ismodule(value) or inspect.isclass(value) or inspect.isfunction(value)):
                continue  # a constant does not know where it was written
            source = Path(inspect.getsourcefile(inspect.unwrap(value))).resolve()
            if not any(source == path or path in source.parents for path in linked):
                wrong.append(f"{name} is in {source.relative_to(ROOT)}")
    assert wrong == []


@pytest.mark.parametrize(
    "package", [path.parent.name for path in sorted((ROOT / "jtl").glob("*/__init__.py"))]
)
def test_the_api_leads_to_every_file_with_something_public(package):
    linked = {(API.parent / target).resolve() for target in LINK.findall(read(API))}
    module = found(f"jtl.{package}")
    public = [getattr(module, name) for name in getattr(module, "__all__", [])]
    files = {
        Path(inspect.getsourcefile(inspect.unwrap(value))).resolve()
        for value in public
        if inspect.isfunction(value) or inspect.isclass(value)
    }
    files = {
        file for file in files if file.is_relative_to(ROOT / "jtl") and not linked & {file, *file.parents}
    }
    assert sorted(file.relative_to(ROOT).as_posix() for file in files) == []


def test_the_readme_has_every_model():
    modules = {architecture.module.__module__ for architecture in ARCHITECTURES.values()}
    assert [one for one in modules if f"({one.replace('.', '/')}.py)" not in read(README)] == []
    assert [name for name in SHORT_NAMES if f"`{name}`" not in read(README)] == []


def test_what_moved_is_where_the_page_says():
    lost = []
    for old, new in cells(MOVED):
        names = NAME.findall(new)
        assert names, new
        lost += missing(names)
        if "`: `" in old:  # a module and the names in it that went to one place
            lost += missing(f"{names[0]}.{name}" for name in re.findall(r"`(\w+)`", old.split(": ", 1)[1]))
    assert lost == []


def test_every_command_exists_and_is_told():
    told = set(re.findall(r"python -m (experiments\.[a-z_.]+)", "".join(map(read, NAMED))))
    there = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
        for path in (ROOT / "experiments").rglob("*.py")
        if path.name == "__main__.py" or '\nif __name__ == "__main__":\n' in read(path)
    }
    assert told == there


def test_versions_agree():
    project = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]
    assert project["version"] == jtl.__version__
    citation = yaml.safe_load(read(ROOT / "CITATION.cff"))
    assert citation["version"] == jtl.__version__
    assert f"version = {{{jtl.__version__}}}" in read(README)
    # The line that installs a GPU's jax names the version that is pinned.
    (pinned,) = [one for one in project["dependencies"] if one.startswith("jax==")]
    assert f'"{pinned.replace("jax", "jax[cuda12]")}"' in read(README)


def test_the_readme_has_the_command_of_the_tests():
    command = (
        "python3 -m venv .venv && .venv/bin/pip install -q -e '.[test]' && "
        '.venv/bin/pytest -n 2 -m "not slow and not parity"'
    )
    assert f"{command}\n" in blocks(README, "bash")


def test_the_examples_of_the_readme_parse():
    example, combined = blocks(README, "python")
    ast.parse(example + combined)


@pytest.mark.slow
def test_the_examples_of_the_readme_run(tmp_path):
    example, combined = blocks(README, "python")
    program = f"{example}\n{combined}\nassert jax.numpy.isfinite(metrics['loss'])\n"
    program += "assert jtl.load('runs/mails').params.keys() == model.params.keys()\n"
    # In a process of its own, as a reader would run it: without the checks and the devices of the tests.
    own = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {
        "PYTHONPATH": str(ROOT)
    }
    words = [sys.executable, "-c", program]
    run = subprocess.run(words, cwd=tmp_path, env=own, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    said = [line.split(": ")[0] for line in run.stdout.splitlines() if ": " in line]
    assert said == ["delivery", "account", "billing"]
