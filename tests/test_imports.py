"""Imports point one way, in jtl and in experiments, and ``import jtl`` brings every name that the README uses."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A part (a file or folder of jtl) may import those of earlier layers. Parts of one layer do not know each other,
# except as EDGES says: so a technique never imports another, and they meet only in a user's own code.
LAYERS = (
    {"errors", "_files"},
    {"tree", "_wheels"},
    {"sharding", "trace"},
    {"model", "prefetch"},
    {"loss", "heads", "wrap", "rows", "ema", "measure"},
    {"pretrained", "models", "tasks", "data", "outputs"},
    {"finetune", "features", "adapters", "domain", "progressive", "continual", "distill", "meta", "merging"},
    {"inference", "evaluation", "planning", "overview"},
)
EDGES = {"pretrained": {"models"}, "planning": {"train"}}
CORE = set().union(*LAYERS[:5])
# The step and its loop run any loss, model and labels: they know the core, and no data, task or technique.
APART = {"train": CORE, "report": {"errors", "_files"}}

# Inside jtl/data: a room or file there, and the others that it may import.
DATA = {
    "dataset": set(),
    "readers": {"dataset"},
    "sets": {"dataset", "readers"},
    "encode": {"dataset", "readers"},
    "batches": {"dataset"},
    "load": {"dataset", "readers", "sets"},
}
# In experiments: shared data, then what the studies share, then the studies, none of which knows another; a benchmark
# may take up any study.
STUDY_LAYERS = ("data", "common")


def allowed(part: str) -> set[str]:
    if part in APART:
        return APART[part]
    layer = next((i for i, parts in enumerate(LAYERS) if part in parts), None)
    assert layer is not None, f"jtl.{part} is new: give it a layer in this test"
    return set().union(*LAYERS[:layer]) | EDGES.get(part, set())


def imported(source: str) -> set[str]:
    """Full names that ``source`` imports, at its top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def parts_of(names: set[str], package: str) -> set[str]:
    """What ``names`` name directly under ``package``."""
    depth = package.count(".") + 1
    return {
        (name.split(".") + ["itself"])[depth]
        for name in names
        if name == package or name.startswith(package + ".")
    }


def violations(file: str, source: str) -> set[str]:
    """What ``source`` imports and may not, as the file of that path from the root."""
    names = imported(source)
    package, part, *rest = Path(file).with_suffix("").parts
    if package == "experiments":
        met = parts_of(names, "experiments") - {part}
        layer = next((i for i, name in enumerate(STUDY_LAYERS) if name == part), len(STUDY_LAYERS))
        wrong = set() if part == "benchmarks" else met - set(STUDY_LAYERS[:layer])
        return wrong | {name for name in names if name.split(".")[0] == "tests"}
    wrong = parts_of(names, "jtl") - {part} - allowed(part)
    if part == "data" and rest and rest[0] != "__init__":
        wrong |= {f"data.{room}" for room in parts_of(names, "jtl.data") - {rest[0]} - DATA[rest[0]]}
    return wrong | {name for name in names if name.split(".")[0] in ("experiments", "tests")}


def circles(sources: dict[str, str]) -> list[str]:
    """A circle of modules that import each other at their top, if there is one; ``sources`` by module name."""
    graph = {}
    for module, source in sources.items():
        top = ast.Module(
            [node for node in ast.parse(source).body if isinstance(node, (ast.Import, ast.ImportFrom))], []
        )
        names = imported(ast.unparse(top))
        # ``from a import b`` needs a.b if that is a module, and a itself otherwise.
        graph[module] = {name if name in sources else name.rpartition(".")[0] for name in names} & set(
            sources
        ) - {module}
    path: list[str] = []
    done: set[str] = set()

    def walk(module: str) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        path.append(module)
        found = next((circle for name in sorted(graph[module]) if (circle := walk(name))), [])
        path.pop()
        done.add(module)
        return found

    return next((circle for module in sorted(graph) if (circle := walk(module))), [])


FILES = {
    path.relative_to(ROOT).as_posix(): path
    for package in ("jtl", "experiments")
    for path in sorted((ROOT / package).rglob("*.py"))
    if path.parent != ROOT / package or path.name != "__init__.py"  # jtl's gathers all parts
}


@pytest.mark.parametrize("file", FILES)
def test_imports_point_one_way(file):
    found = violations(file, FILES[file].read_text(encoding="utf-8"))
    assert not found, f"{file} imports {sorted(found)}: see the layers in this test"


def test_no_module_imports_itself_through_others():
    modules = {}
    for file, path in FILES.items():
        name = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        if path.name != "__init__.py":  # a package gathers its parts, which never import it: the test above
            modules[name] = path.read_text(encoding="utf-8")
    assert not (circle := circles(modules)), " -> ".join(circle)


@pytest.mark.parametrize(
    ("file", "source", "found"),
    [
        ("jtl/tree.py", "from jtl.model import Model", {"model"}),
        ("jtl/models/bert.py", "import jtl.pretrained.load", {"pretrained"}),
        ("jtl/finetune/ewc.py", "def f():\n    from jtl import features", {"features"}),
        ("jtl/train/loop.py", "from jtl.data.loader import Batches", {"data"}),
        ("jtl/train/loop.py", "from jtl.report import table", {"report"}),
        ("jtl/report/result.py", "from jtl.model import Model", {"model"}),
        ("jtl/data/load.py", "from jtl import train", {"train"}),
        ("jtl/data/readers/boxes.py", "from jtl.data.sets import builders", {"data.sets"}),
        ("jtl/data/batches/loader.py", "from jtl.data.encode import text", {"data.encode"}),
        ("jtl/tasks/spans.py", "import experiments.sweep", {"experiments.sweep"}),
        ("jtl/heads.py", "import jtl", {"itself"}),
        ("jtl/features/cache.py", "import jax\nfrom jtl import heads\nfrom jtl.trace import reads", set()),
        ("experiments/merge.py", "from experiments.tune import run", {"tune"}),
        ("experiments/art/study.py", "from experiments.music.study import run", {"music"}),
        ("experiments/common/recipe.py", "from experiments.sweep import run", {"sweep"}),
        ("experiments/data/scenes.py", "from experiments.common.study import finish", {"common"}),
        ("experiments/benchmarks/lora.py", "from experiments.distill import methods", set()),
        ("experiments/art/study.py", "from experiments.art.config import Art\nfrom experiments.data import a", set()),
    ],
)  # fmt: skip
def test_violations_are_found(file, source, found):
    assert violations(file, source) == found


def test_a_circle_is_found():
    sources = {"a": "import b", "b": "from c import x", "c": "def f():\n    import a"}
    assert circles(sources) == []
    assert circles({**sources, "c": "import a"}) == ["a", "b", "c", "a"]


def test_import_jtl_brings_the_names_of_the_readme():
    names = sorted(set(re.findall(r"\bjtl(?:\.\w+)+", (ROOT / "README.md").read_text(encoding="utf-8"))))
    assert len(names) > 10
    # In a process of its own: other tests have imported more.
    program = "import jtl\n" + "\n".join(names)
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_long_file_says_why():
    """Files are read in one sitting: one of over 350 lines says in its docstring why it is longer."""
    for file, path in FILES.items():
        source = path.read_text(encoding="utf-8")
        if source.count("\n") > 350:
            assert "longer than" in (ast.get_docstring(ast.parse(source)) or ""), f"{file} has over 350 lines"
