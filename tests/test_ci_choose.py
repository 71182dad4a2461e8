"""Which slow and parity tests run: those that a change can reach, then each in its turn, and all in any doubt."""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("choose", ROOT / ".ci" / "choose.py")
ci = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(ci)

MARK = "@pytest.mark."  # apart from its name, or this file itself would be chosen
SLOW = f"\nimport pytest\n{MARK}slow\ndef test_it(): pass\n"
FILES = {
    "jtl/__init__.py": "from jtl import bad, one\nfrom jtl.one.deep import load\n",
    "jtl/one/__init__.py": "from jtl.one.deep import load\nfrom jtl.one.other import other\n",
    "jtl/one/deep.py": "def load():\n    from .late import late\n",
    "jtl/one/late.py": "",
    "jtl/one/other.py": "'''See jtl.bad, which this does not import.'''\nMESSAGE = 'call jtl.bad'\n",
    "jtl/bad.py": "",
    "experiments/__init__.py": "",
    "experiments/run/__init__.py": "",
    "experiments/run/__main__.py": "import jtl.bad",
    "tests/conftest.py": "",
    "tests/support/script.py": "import jtl.bad",
    "tests/a/helper.py": "'''For tests of experiments.'''\nfrom jtl import one",
    "tests/a/test_deep.py": "from jtl.one.deep import load" + SLOW,
    "tests/a/test_export.py": "from jtl import load" + SLOW,
    "tests/a/test_helped.py": "import helper" + SLOW,
    "tests/a/test_plain.py": "import jtl.bad",
    "tests/a/test_script.py": "RUN = 'script.py'" + SLOW,
    "tests/a/test_command.py": "NAME = 'run'\nMODULE = f'experiments.{NAME}'"
    + SLOW.replace("slow", "parity"),
    "tests/a/test_program.py": "P = '''\n    from jtl import bad\n    bad()\n'''" + SLOW,
    "tests/docs/test_docs.py": SLOW,
    "docs/page.md": "",
    "README.md": "",
    "pyproject.toml": "",
}
DEEP = {"tests/a/test_deep.py", "tests/a/test_export.py", "tests/a/test_helped.py"}
BAD = {"tests/a/test_script.py", "tests/a/test_command.py", "tests/a/test_program.py"}
ALL = DEEP | BAD | {"tests/docs/test_docs.py"}


class Repository:
    """A repository of the files above, all of whose tests ran at its first commit."""

    def __init__(self, root):
        self.root, self.hours = root, 0
        if root.exists():  # a copy
            self.first = self.git("rev-parse", "HEAD~")
            return
        for path, text in FILES.items():
            self.write(path, text)
        self.git("init", "-q")
        self.commit()
        self.first = self.git("rev-parse", "HEAD")
        self.record("--all-ran", "HEAD")

    def write(self, path, text):
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def git(self, *words):
        who = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
        for name in ("AUTHOR", "COMMITTER"):
            who |= {f"GIT_{name}_NAME": "a", f"GIT_{name}_EMAIL": "a@b.c"}
            who |= {f"GIT_{name}_DATE": f"2030-01-01T{self.hours:02}:00:00"}
        words = ["git", "-C", str(self.root), *words]
        run = subprocess.run(words, capture_output=True, text=True, check=True, env={**os.environ, **who})
        return run.stdout.strip()

    def commit(self):
        self.git("add", "--all")
        self.git("commit", "-q", "-m", "some", "--allow-empty")

    def record(self, *words):
        (self.root / ".ci").mkdir(exist_ok=True)
        ci.main(words, self.root)
        self.commit()

    def change(self, *paths):
        for path in paths:
            self.write(path, FILES.get(path, "") + "\n# changed\n")
        self.commit()

    def reached(self):
        """The files that run for what changed, whoever's turn it is."""
        chosen, left = ci.choose(self.root)
        assert not chosen.keys() & left.keys() and chosen.keys() | left.keys() == ALL
        return {path for path, why in chosen.items() if why != "its turn"}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return Repository(tmp_path_factory.mktemp("original") / "repository").root


@pytest.fixture
def repository(original, tmp_path):
    return Repository(shutil.copytree(original, tmp_path / "repository"))


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ("jtl/one/deep.py", DEEP),
        ("jtl/one/late.py", DEEP),  # imported inside a function
        ("jtl/one/__init__.py", DEEP),  # runs on the way to its module
        ("jtl/one/other.py", {"tests/a/test_helped.py"}),  # which imports the whole package
        (
            "jtl/bad.py",
            BAD,
        ),  # by a script's path, a command's name, a program in a string; never by a message
        ("experiments/run/__main__.py", {"tests/a/test_command.py"}),
        ("tests/a/helper.py", {"tests/a/test_helped.py"}),
        ("tests/a/test_deep.py", {"tests/a/test_deep.py"}),
        ("tests/a/test_plain.py", set()),
        ("tests/conftest.py", ALL),
        ("docs/page.md", {"tests/docs/test_docs.py"}),
        ("README.md", {"tests/docs/test_docs.py"}),
        ("pyproject.toml", ALL),
        (".ci/run", ALL),
        (".ci/choose.py", set()),
        ("tests/a/weights.npz", ALL),
    ],
)
def test_what_a_change_reaches(changed, expected, repository):
    repository.change(changed)
    assert repository.reached() == expected


def test_nothing_changed_and_a_file_not_yet_committed(repository):
    assert repository.reached() == set()
    repository.write("jtl/one/late.py", "# changed")
    assert repository.reached() == DEEP
    repository.write("tests/a/new.txt", "")
    assert repository.reached() == ALL


def test_each_has_its_turn_in_three(repository):
    ran = []
    for _ in range(3):
        chosen, left = ci.choose(repository.root)
        assert set(chosen.values()) <= {"its turn"} and chosen.keys() | left.keys() == ALL
        ran += chosen
        repository.record("--next")
    assert sorted(ran) == sorted(ALL)
    assert ci.read_record(repository.root) == (repository.first, 1)  # as after the first record


def test_everything_in_doubt(repository):
    def why():
        chosen, left = ci.choose(repository.root)
        assert chosen.keys() == ALL and not left
        (reason,) = set(chosen.values())
        return reason

    repository.hours = 5
    repository.commit()
    assert "not bumped" in why()
    repository.record("--next")
    assert repository.reached() == set()
    ci.write_record(repository.root, "0" * 40, 0)
    assert "git does not know 0000" in why()
    (repository.root / ci.RECORD).unlink()
    assert "no commit is recorded" in why()


def test_a_shallow_history(repository, tmp_path_factory):
    copy = tmp_path_factory.mktemp("shallow") / "copy"
    repository.git("clone", "-q", "--depth", "1", f"file://{repository.root}", str(copy))
    assert {why for why in ci.choose(copy)[0].values()} == {"everything: git's history is cut short"}


def test_what_the_command_prints(repository, capsys):
    repository.change("jtl/one/other.py", "jtl/one/deep.py")
    ci.main([], repository.root)
    out, why = capsys.readouterr()
    assert DEEP <= set(out.split()) <= ALL
    lines = why.splitlines()
    assert "runs  tests/a/test_helped.py: reaches jtl/one/deep.py and 1 more" in lines
    assert lines[-1] == f"slow and parity tests: {len(out.split())} files of {len(ALL)}"
    with pytest.raises(SystemExit):
        ci.main(["--all-ran", "nothing"], repository.root)
    assert "git does not know nothing" in capsys.readouterr().err


def test_this_repository():
    """Its record is readable, its graph holds, and every test that is marked is among the files to choose from."""
    commit, turn = ci.read_record(ROOT)
    assert (not commit or len(commit) == 40) and 0 <= turn < ci.TURNS
    edges = ci.graph(ROOT)
    assert {path.removesuffix("!") for own in edges.values() for path in own} <= edges.keys()
    reads = ci.reached("tests/meta/test_meta_sinusoid.py", edges)
    assert "jtl/meta/inner.py" in reads and "jtl/pretrained/load.py" not in reads
    chosen, left = ci.choose(ROOT)
    assert {"tests/models/test_parity.py", "tests/experiments/test_compare.py"} <= chosen.keys() | left.keys()
