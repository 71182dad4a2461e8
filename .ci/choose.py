"""Choose which slow and parity tests CI runs: those that a change can reach, and a third of the others in turn.

    python .ci/choose.py                     # the chosen test files on stdout, the reasons on stderr
    python .ci/choose.py --next              # before a submission: the next third of the others
    python .ci/choose.py --all-ran COMMIT    # everything passed at COMMIT: later changes are counted from there

A test reaches what it imports, directly or through other modules (also inside functions), the ``conftest.py`` files
above it, and the experiments that it names in a string. ``.ci/last_full`` holds the commit at which everything last ran
and the turn of the others, which are ordered by a hash of their paths: so each runs at least every third time. CI
cannot commit, so whoever submits moves the turn on. If it was not moved within four hours before HEAD, or the commit
is unknown, everything runs.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

STATE = ".ci/last_full"
FRESH = 4 * 3600  # seconds between moving the turn and HEAD
THIRDS = 3
MARKED = re.compile(r"\bmark\.(slow|parity)\b")
# No test of a program reads these; those of the documentation are plain tests.
UNREAD = re.compile(r"(docs|experiments/results)/.*|[^/]*\.(md|cff)|LICENSE")


def modules(root: Path) -> dict[str, str]:
    """The Python files of the project by module name; helpers of tests also by their bare name."""
    found = {}
    for folder in ("jtl", "experiments", "tests"):
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            file = path.relative_to(root).as_posix()
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
            if folder == "tests":
                found.setdefault(parts[-1], file)
    return found


def imports(root: Path, file: str, known: dict[str, str]) -> set[str]:
    """The project's files that ``file`` imports, with the packages above them."""
    source = (root / file).read_text(encoding="utf-8")
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    if file.startswith("tests/"):  # python -m experiments.NAME, in a subprocess
        names |= {
            found + end for found in re.findall(r"experiments(?:\.\w+)+", source) for end in ("", ".__main__")
        }
    met = set()
    for name in names:
        parts = name.split(".")
        met |= {known[above] for n in range(len(parts)) if (above := ".".join(parts[: n + 1])) in known}
    if file.startswith("tests/"):
        above = [parent / "conftest.py" for parent in Path(file).parents]
        met |= {path.as_posix() for path in above if (root / path).exists()}
    return met - {file}


def reach(root: Path) -> dict[str, set[str]]:
    """For each test file with slow or parity tests, all files that it can reach, itself among them."""
    known = modules(root)
    files = set(known.values())
    graph = {file: imports(root, file, known) for file in files}
    found = {}
    for file in sorted(files):
        if Path(file).name.startswith("test_") and MARKED.search((root / file).read_text(encoding="utf-8")):
            met, ahead = {file}, [file]
            while ahead:
                new = graph[ahead.pop()] - met
                met |= new
                ahead += new
            found[file] = met
    return found


def choose(reached: dict[str, set[str]], changed: set[str], turn: int) -> dict[str, str]:
    """The reason for each chosen test file, given the files that changed."""
    changed = {file for file in changed if not UNREAD.fullmatch(file)}
    data = {file for file in changed if not file.endswith(".py")}
    # Settings of the project, and data of the package, may matter to any test; data of tests to those beside it.
    if general := sorted(file for file in data if not file.startswith("tests/")):
        return dict.fromkeys(reached, f"everything: {general[0]} changed")
    order = sorted(reached, key=lambda file: hashlib.sha256(file.encode()).hexdigest())
    reasons = {}
    for place, file in enumerate(order):
        folder = Path(file).parent.as_posix()
        beside = sorted(one for one in data if folder != "tests" and one.startswith(f"{folder}/"))
        if met := sorted(reached[file] & changed) + beside:
            reasons[file] = f"reaches {met[0]}" + (
                f" and {len(met) - 1} more that changed" if len(met) > 1 else ""
            )
        elif place % THIRDS == turn % THIRDS:
            reasons[file] = "its turn"
    return {file: reasons[file] for file in sorted(reasons)}


def git(root: Path, *words: str) -> str:
    """What git prints; CalledProcessError where it refuses."""
    return subprocess.run(
        ["git", *words], cwd=root, capture_output=True, text=True, check=True
    ).stdout.strip()


def chosen(root: Path) -> dict[str, str]:
    """The reason for each test file that is to run at HEAD."""
    reached = reach(root)
    try:
        state = json.loads((root / STATE).read_text(encoding="utf-8"))
        changed = set(git(root, "diff", "--name-only", f"{state['commit']}..HEAD").splitlines())
        moved, now = (int(git(root, "log", "-1", "--format=%ct", *path)) for path in (("--", STATE), ()))
    except (OSError, ValueError, KeyError, subprocess.CalledProcessError) as error:
        return dict.fromkeys(reached, f"everything: no earlier run is known ({type(error).__name__})")
    if now - moved > FRESH:
        return dict.fromkeys(reached, f"everything: the turn in {STATE} was not moved on")
    return choose(reached, changed - {STATE}, int(state["turn"]))


def main(words: list[str], root: Path) -> None:
    """Choose, or move the turn on: see above."""
    path = root / STATE
    state = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"commit": "", "turn": 0}
    if words[:1] == ["--next"]:
        path.write_text(json.dumps({**state, "turn": (state["turn"] + 1) % THIRDS}) + "\n", encoding="utf-8")
    elif words[:1] == ["--all-ran"] and len(words) == 2:
        commit = git(root, "rev-parse", words[1])
        path.write_text(json.dumps({**state, "commit": commit}) + "\n", encoding="utf-8")
    elif words:
        raise SystemExit(__doc__)
    else:
        reasons = chosen(root)
        for file, reason in reasons.items():
            print(f"{file}: {reason}", file=sys.stderr)
        print(f"{len(reasons)} of {len(reach(root))} files with slow or parity tests run", file=sys.stderr)
        print("\n".join(reasons))


if __name__ == "__main__":
    main(sys.argv[1:], Path(__file__).resolve().parents[1])
