"""Choose the slow and parity tests of this run: those that a change can reach, and a third of the others in turn.

``.ci/last_full`` holds the commit at which all of them last ran, and whose turn it is. Files that differ from that
commit are changed; a test file runs if it imports one, through any number of modules and wherever the import stands, or
if its path falls into this turn's third. A file that is no module (data, settings, ``.ci/run``) reaches every test;
documents and recorded results reach only the tests of documents, and this file only its own. Every test runs if git
does not know the commit, if its history is cut short, or if the record is ``STALE`` seconds older than what is tested:
whoever submits work bumps the turn, and a run of everything is what forgetting it costs.

    python .ci/choose.py                    # prints the paths to give pytest, and on stderr why
    python .ci/choose.py --next             # before work is submitted: the next third's turn
    python .ci/choose.py --all-ran COMMIT   # all of them ran at that commit
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
import textwrap
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOTS = ("jtl", "experiments", "tests")
TESTS, OF_DOCUMENTS = "tests", "tests/docs/"
OWN = ".ci/choose.py"  # whose test is a plain one
GATHERING = "jtl"  # its __init__ only gathers what others define
RECORD = ".ci/last_full"
TURNS = 3
STALE = 4 * 3600
DOCUMENT = re.compile(r"docs/.*|experiments/results/.*|[^/]*\.(md|cff)|LICENSE")
MARK = re.compile(r"\bmark\.(slow|parity)\b")
NAMED = re.compile(r"\b(?:jtl|experiments)\.(?:\w+\.?)*")  # a point at the end: f"experiments.{name}"


# --- which file reads which ------------------------------------------------------------------------


def modules(root: Path) -> dict[str, str]:
    """Path of every module by its dotted name."""
    found: dict[str, str] = {}
    for top in ROOTS:
        for file in sorted((root / top).rglob("*.py")):
            path = file.relative_to(root).as_posix()
            parts = path.removesuffix(".py").removesuffix("/__init__").split("/")
            found[".".join(parts)] = path
    return found


def resolve(name: str, known: dict[str, str], exports: dict[str, str]) -> set[str]:
    """Files that importing ``name`` runs for its reader.

    A package on the way to a module is itself one of them, but what it imports for its own readers is not: the
    mark "path!" says so. Of a name that is no module, the module or package that defines it; ``exports`` says where
    those of a package that gathers others' come from.
    """
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if (path := known.get(".".join(parts[:end]))) is None:
            continue
        way = {known[up] + "!" for i in range(1, end) if (up := ".".join(parts[:i])) in known}
        if (source := exports.get(".".join(parts[: end + 1]))) and end < len(parts):
            return way | {path + "!"} | resolve(source, known, {})
        main = {known[run]} if (run := f"{'.'.join(parts[:end])}.__main__") in known else set()
        return way | main | {path}
    return set()


def imports(tree: ast.AST, path: str) -> Iterator[str]:
    """Dotted names that a module imports, wherever, or that a test names in a string that is no docstring."""
    words = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    package = path.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif not path.startswith(f"{TESTS}/") or id(node) in words:
            continue
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from NAMED.findall(node.value)
            yield from [node.value] if node.value.endswith(".py") else []
            if "import " in node.value:  # a program for another process
                try:
                    yield from imports(ast.parse(textwrap.dedent(node.value)), path)
                except SyntaxError:
                    pass


def graph(root: Path) -> dict[str, set[str]]:
    """Files that each module reads directly; see ``resolve`` for those that end in "!"."""
    known = modules(root)
    beside: dict[str, dict[str, str]] = {}  # folder of tests: its modules by bare name
    for path in known.values():
        if path.startswith(f"{TESTS}/"):
            beside.setdefault(str(Path(path).parent), {})[Path(path).stem] = path
    shared = beside.get(f"{TESTS}/support", {})
    scripts: dict[str, set[str]] = {}
    for path in known.values():
        scripts.setdefault(Path(path).name, set()).add(path)
    exports = {}
    if (top := root / GATHERING / "__init__.py").exists():
        sources = imports(ast.parse(top.read_text()), f"{GATHERING}/__init__.py")
        exports = {f"{GATHERING}.{source.split('.')[-1]}": source for source in sources}
    found: dict[str, set[str]] = {}
    for path in known.values():
        tree = ast.parse((root / path).read_text())
        bare = {**shared, **beside.get(str(Path(path).parent), {})} if path.startswith(f"{TESTS}/") else {}
        own: set[str] = set()
        for name in imports(tree, path):
            if name.endswith(".py"):  # a script that is run by its path
                own |= scripts.get(Path(name).name, set()) if not name.endswith("__init__.py") else set()
            elif name.endswith("."):  # any module of it
                own |= {file for other, file in known.items() if other.startswith(name)}
            elif (first := name.split(".")[0]) in bare:
                own.add(bare[first])
            else:
                own |= resolve(name, known, exports)
        if path.startswith(f"{TESTS}/"):
            ways = [str(up / "conftest.py") for up in Path(path).parents]
            own |= {way for way in ways if (root / way).exists()}
        found[path] = own - {path}
    return found


def reached(start: str, edges: dict[str, set[str]]) -> set[str]:
    """All files that ``start`` reads, itself among them."""
    seen, open_ = {start}, [start]
    while open_:
        for path in edges.get(open_.pop(), set()) - seen:  # what ends in "!" has no edges
            seen.add(path)
            open_.append(path)
    return {path.removesuffix("!") for path in seen}


def is_marked(text: str) -> bool:
    """Whether ``pytest.mark.slow`` or ``pytest.mark.parity`` stands in a module."""
    return MARK.search(text) is not None


# --- what changed ----------------------------------------------------------------------------------


def git(root: Path, *words: str) -> str | None:
    """What a git command prints, or None where it fails."""
    run = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True)
    return run.stdout.strip("\n") if run.returncode == 0 else None


def read_record(root: Path) -> tuple[str, int]:
    """The recorded commit ("" for none) and turn."""
    file = root / RECORD
    words = dict(line.split(maxsplit=1) for line in file.read_text().splitlines()) if file.exists() else {}
    commit = words.get("commit", "none")
    return ("" if commit == "none" else commit), int(words.get("turn", "0")) % TURNS


def write_record(root: Path, commit: str, turn: int) -> None:
    """Write what ``read_record`` reads."""
    (root / RECORD).write_text(f"commit {commit or 'none'}\nturn {turn % TURNS}\n")


def changes(root: Path) -> set[str] | str:
    """Paths that differ from the recorded commit, committed or not; or the reason why all tests are to run."""
    commit, _ = read_record(root)
    if not commit:
        return "no commit is recorded at which all ran"
    if git(root, "rev-parse", "--is-shallow-repository") != "false":
        return "git's history is cut short"
    if git(root, "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}") is None:
        return f"git does not know {commit}"
    bumped, head = (
        git(root, "log", "-1", "--format=%ct", "--", RECORD),
        git(root, "log", "-1", "--format=%ct"),
    )
    if not bumped or not head or int(head) - int(bumped) > STALE:
        return f"{RECORD} was not bumped: python .ci/choose.py --next"
    differing = git(root, "diff", "--name-only", "--no-renames", "-z", commit)
    new = git(root, "ls-files", "--others", "--exclude-standard", "-z")
    if differing is None or new is None:
        return "git does not say what changed"
    paths = {path for path in (differing + "\0" + new).split("\0") if path} - {RECORD, OWN}
    for path in sorted(paths):
        inside = path.endswith(".py") and path.split("/")[0] in ROOTS
        if not inside and not DOCUMENT.fullmatch(path):
            return f"{path} changed, which is no module"
    return paths


def turn_of(path: str) -> int:
    """The turn at which a file runs whatever changed: the same for a path in every process."""
    return zlib.crc32(path.encode()) % TURNS


def choose(root: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Why each chosen test file is chosen, and what is said of each other one that has slow or parity tests."""
    edges = graph(root)
    marked = {path for path in edges if path.startswith(f"{TESTS}/") and is_marked((root / path).read_text())}
    reads = {path: reached(path, edges) for path in edges if Path(path).name.startswith("test_")}
    files = sorted(path for path, own in reads.items() if path.startswith(f"{TESTS}/") and own & marked)
    found = changes(root)
    if isinstance(found, str):
        return dict.fromkeys(files, f"everything: {found}"), {}
    documents = sorted(path for path in found if DOCUMENT.fullmatch(path))
    _, turn = read_record(root)
    chosen: dict[str, str] = {}
    for path in files:
        changed = sorted(reads[path] & found) + (documents if path.startswith(OF_DOCUMENTS) else [])
        if changed:
            chosen[path] = f"reaches {changed[0]}" + (f" and {len(changed) - 1} more" if changed[1:] else "")
        elif turn_of(path) == turn:
            chosen[path] = "its turn"
    return chosen, {path: f"turn {turn_of(path)}, this is {turn}" for path in files if path not in chosen}


def main(words: Iterable[str] | None = None, root: Path = ROOT) -> None:
    """The command; ``words`` as on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--next", action="store_true", help="give the turn to the next third")
    what.add_argument("--all-ran", metavar="COMMIT", help="record a commit at which all of them ran")
    asked = parser.parse_args(None if words is None else list(words))
    commit, turn = read_record(root)
    if asked.next:
        write_record(root, commit, turn + 1)
        return
    if asked.all_ran:
        full = git(root, "rev-parse", "--verify", "--quiet", f"{asked.all_ran}^{{commit}}")
        if full is None:
            parser.error(f"git does not know {asked.all_ran}")
        write_record(root, full, turn + 1)
        return
    chosen, left = choose(root)
    for path in sorted({**chosen, **left}):
        print(f"{'runs ' if path in chosen else 'waits'} {path}: {(chosen | left)[path]}", file=sys.stderr)
    print(f"slow and parity tests: {len(chosen)} files of {len(chosen) + len(left)}", file=sys.stderr)
    print("\n".join(chosen))


if __name__ == "__main__":
    main()
