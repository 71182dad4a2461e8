"""What CI runs of the slow tests: what a change can reach, the others every third time, and everything in doubt."""

import importlib.util
import json
import os
import subprocess
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("choose", Path(__file__).parents[1] / ".ci" / "choose.py")
choose = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(choose)

SLOW = "import pytest\n\n\n@pytest.mark.slow\ndef test_it():\n    pass\n"
FILES = {
    "jtl/__init__.py": "",
    "jtl/a.py": "",
    "jtl/b.py": "def f():\n    from jtl import a\n",
    "jtl/c.py": "",
    "experiments/__init__.py": "",
    "experiments/study.py": "import jtl.c\n",
    "tests/conftest.py": "",
    "tests/one/helper.py": "import jtl.b\n",
    "tests/one/test_through.py": f"import helper\n{SLOW}",
    "tests/one/data/x.npz": "0",
    "tests/two/test_command.py": f'COMMAND = "python -m experiments.study"\n{SLOW}',
    "tests/two/test_plain.py": "import jtl.a\n\n\ndef test_it():\n    pass\n",
    "tests/test_alone.py": SLOW,
    "README.md": "",
}


@pytest.fixture
def repo(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / ".ci").mkdir()
    git(tmp_path, "init", "-q")
    commit(tmp_path)
    return tmp_path


def git(root, *words, **environment):
    settings = ["-c", "user.name=n", "-c", "user.email=e@e", "-c", "commit.gpgsign=false"]
    subprocess.run(
        ["git", *settings, *words],
        cwd=root,
        check=True,
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
    )


def commit(root, date="2026-01-01T00:00:00"):
    git(root, "add", "-A")
    git(root, "commit", "-qm", "x", GIT_COMMITTER_DATE=date, GIT_AUTHOR_DATE=date)


def reached_by(file):
    reached = choose.reach(Path(__file__).parents[1])
    return {test for test, met in reached.items() if file in met}


def test_only_files_with_slow_tests_and_what_they_reach(repo):
    found = choose.reach(repo)
    assert set(found) == {"tests/one/test_through.py", "tests/two/test_command.py", "tests/test_alone.py"}
    assert {"jtl/a.py", "jtl/b.py", "tests/one/helper.py", "tests/conftest.py"} <= found[
        "tests/one/test_through.py"
    ]
    assert (
        "jtl/c.py" in found["tests/two/test_command.py"]
        and "jtl/a.py" not in found["tests/two/test_command.py"]
    )


@pytest.mark.parametrize(
    ("changed", "reached"),
    [
        ("jtl/a.py", {"tests/one/test_through.py"}),
        ("jtl/c.py", {"tests/two/test_command.py"}),
        ("tests/one/data/x.npz", {"tests/one/test_through.py"}),
        (
            "tests/conftest.py",
            {"tests/one/test_through.py", "tests/two/test_command.py", "tests/test_alone.py"},
        ),
        ("pyproject.toml", {"tests/one/test_through.py", "tests/two/test_command.py", "tests/test_alone.py"}),
        ("README.md", set()),
        ("docs/api.md", set()),
        ("experiments/results/x.json", set()),
    ],
)
def test_a_change_runs_what_reaches_it_and_the_rest_takes_turns(repo, changed, reached):
    found = choose.reach(repo)
    turns = [choose.choose(found, {changed}, turn) for turn in range(3)]
    for reasons in turns:
        assert reached == {file for file, reason in reasons.items() if reason != "its turn"}
    assert set().union(*turns) == set(found)
    rest = [file for reasons in turns for file, reason in reasons.items() if reason == "its turn"]
    assert sorted(rest) == sorted(set(found) - reached)  # once each


def test_everything_runs_in_doubt(repo, capsys):
    """No record, an unknown commit, a turn that was not moved on: all three run everything."""
    assert all("no earlier run" in reason for reason in choose.chosen(repo).values())
    choose.main(["--all-ran", "HEAD"], repo)
    choose.main(["--next"], repo)
    commit(repo, "2026-01-01T01:00:00")
    (repo / "jtl" / "a.py").write_text("x = 1\n")
    commit(repo, "2026-01-01T02:00:00")
    assert choose.chosen(repo)["tests/one/test_through.py"] == "reaches jtl/a.py"
    assert json.loads((repo / choose.STATE).read_text())["turn"] == 1
    choose.main([], repo)
    printed = capsys.readouterr()
    assert "tests/one/test_through.py" in printed.out and "of 3 files" in printed.err
    (repo / "jtl" / "a.py").write_text("x = 2\n")
    commit(repo, "2026-01-02T00:00:00")
    assert (
        all("was not moved on" in reason for reason in choose.chosen(repo).values())
        and len(choose.chosen(repo)) == 3
    )
    (repo / choose.STATE).write_text(json.dumps({"commit": "0" * 40, "turn": 0}))
    assert all("no earlier run" in reason for reason in choose.chosen(repo).values())


def test_this_projects_own_graph():
    assert "tests/experiments/test_art.py" in reached_by("experiments/art/study.py")
    assert "tests/experiments/test_art.py" not in reached_by("experiments/music/study.py")
    assert len(reached_by("jtl/model.py")) > 20
