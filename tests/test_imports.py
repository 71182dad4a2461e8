"""Imports inside jtl point one way, and ``import jtl`` brings every name that the README uses."""

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
    {"tree", "files", "wheel"},
    {"layout"},
    {"model"},
    {"loss", "heads", "wrap"},
    {"pretrained", "models", "tasks", "data"},
    {"finetune", "features", "adapters", "domain", "progressive", "continual", "distill", "meta", "merging"},
)
EDGES = {"pretrained": {"models"}}
# The step and its loop run any loss, model and labels: they know the core, and no data, task or technique.
TRAIN = {"tree", "files", "wheel", "layout", "model", "loss"}


def allowed(part: str) -> set[str]:
    if part == "train":
        return TRAIN
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


def violations(part: str, source: str) -> set[str]:
    ours = {name for name in imported(source) if name.split(".")[0] == "jtl"}
    met = {(name.split(".") + ["jtl itself"])[1] for name in ours} - {part}
    outside = {name for name in imported(source) if name.split(".")[0] in ("experiments", "tests")}
    return (met - allowed(part)) | outside


FILES = {
    path.relative_to(ROOT).as_posix(): path
    for path in sorted((ROOT / "jtl").rglob("*.py"))
    if path != ROOT / "jtl" / "__init__.py"  # it gathers all parts
}


@pytest.mark.parametrize("file", FILES)
def test_imports_point_one_way(file):
    part = Path(file).relative_to("jtl").parts[0].removesuffix(".py")
    found = violations(part, FILES[file].read_text(encoding="utf-8"))
    assert not found, f"{file} imports {sorted(found)}; jtl.{part} may import {sorted(allowed(part))}"


@pytest.mark.parametrize(
    ("part", "source", "found"),
    [
        ("tree", "from jtl.model import Model", {"model"}),
        ("models", "import jtl.pretrained.load", {"pretrained"}),
        ("finetune", "def f():\n    from jtl import features", {"features"}),
        ("train", "from jtl.data.loader import Batches", {"data"}),
        ("data", "from jtl import train", {"train"}),
        ("tasks", "import experiments.arms", {"experiments.arms"}),
        ("heads", "import jtl", {"jtl itself"}),
        ("features", "import jax\nfrom jtl import heads\nfrom jtl.features.reads import reads", set()),
    ],
)
def test_violations_are_found(part, source, found):
    assert violations(part, source) == found


def test_import_jtl_brings_the_names_of_the_readme():
    names = sorted(set(re.findall(r"\bjtl(?:\.\w+)+", (ROOT / "README.md").read_text(encoding="utf-8"))))
    assert "jtl.data.text.encode" in names
    # In a process of its own: other tests have imported more.
    program = "import jtl\n" + "\n".join(names)
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
