"""The command line and the output folder, run as a user runs them."""

import ast
import dataclasses
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from experiments.common.command_line import command_of, main
from experiments.common.resumable_rows import ResumableRows
from experiments.common.settings import Config, above, at_least, check, command, prepare, settings
from experiments.common.study import finish
from jtl.errors import Diverged, InputError, MissingError
from jtl.report import Result, read_result
from jtl.train import Interrupted

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Toy(Config):
    """A toy experiment."""

    technique: Literal["full", "head"] = "full"
    """Which parameters train."""
    rate: float = above(0, 1e-3)
    """Learning rate."""
    sizes: tuple[int, ...] = at_least(1, (64, 256))
    """Training sizes."""
    epochs: int | None = at_least(1, None)
    """Passes over the data."""


def run(config: Toy) -> Result:
    if config.rate == 4:
        raise InputError("--data holds images,\n  not texts")
    if config.rate == 5:
        raise Diverged("the loss is NaN at step 7")
    if config.rate == 6:
        raise KeyboardInterrupt
    if config.rate == 6.5:
        raise Interrupted("stopped after step 3", signal.SIGTERM)
    if config.rate == 7:
        raise MissingError("unknown data 'x'")
    if config.rate == 8:
        open(config.out / "missing.csv")
    if config.rate == 9:
        np.zeros(2) + np.zeros(3).reshape(2, 2)
    rows = ResumableRows(prepare(config, "toy"), resume=config.resume)
    for seed in range(2):
        row = {"accuracy": 0.5 + 0.1 * seed, "seconds": 1.0}
        rows.get(lambda row=row: (row, []), arm=config.technique, seed=seed)
    return finish("toy", config, rows, [], title="A toy", about="Nothing.", metrics=["accuracy"])


def words(out, *flags):
    return ["--out", str(out), *flags]


def test_prints_the_summary_and_the_report(tmp_path, capsys):
    main(run, Toy, args=words(tmp_path / "a", "--technique", "head", "--sizes", "1", "2"))
    text = capsys.readouterr().out
    assert "head" in text and "0.550 ± 0.635" in text and str(tmp_path / "a" / "report.md") in text
    assert json.loads((tmp_path / "a" / "config.json").read_text())["config"]["sizes"] == [1, 2]


def test_help_says_what_the_flags_do(capsys):
    with pytest.raises(SystemExit) as stop:
        main(run, Toy, args=["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for part in (
        "--out",
        "--resume",
        "--quick",
        "--seed",
        "{full,head}",
        "Learning rate.",
        "Which parameters train.",
    ):
        assert part in text
    assert "--no-resume" not in text


@pytest.mark.parametrize(
    ("module", "spoken"),
    [
        ("experiments.art.study", "experiments.art"),
        ("experiments.models.commands", "experiments.models"),
        ("experiments.finetune", "experiments.finetune"),
        ("experiments.benchmarks.lora", "experiments.benchmarks.lora"),
        ("__main__", "__main__"),
    ],
)
def test_the_command_of_a_module(module, spoken):
    assert command_of(module) == spoken


@pytest.mark.parametrize(("name", "file"), [("art", "art/__init__.py"), ("finetune", "finetune.py")])
def test_help_of_a_command_is_its_docstring(name, file):
    """Run by ``python -m``, where a file's module is ``__main__`` and a package's is not."""
    words = [sys.executable, "-m", f"experiments.{name}", "--help"]
    found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    docstring = ast.get_docstring(ast.parse((ROOT / "experiments" / file).read_text(encoding="utf-8")))
    assert found.startswith(f"usage: python -m experiments.{name} ")
    description = found.partition("options ─")[0]
    for part in docstring.split():
        assert part in description


def test_unknown_choice_ends_with_two(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(run, Toy, args=words(tmp_path, "--technique", "heads"))
    assert stop.value.code == 2 and "full" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rate", "line"),
    [
        ("-1", "--rate must be over 0, got -1.0"),
        ("4", "--data holds images, not texts"),
        ("7", "unknown data 'x'"),
        ("8", "No such file"),
    ],
)
def test_refused_input_is_one_line(tmp_path, capsys, monkeypatch, rate, line):
    monkeypatch.delenv("JTL_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as stop:
        main(run, Toy, args=words(tmp_path, "--rate", rate))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and line in error and error.count("\n") == 1
    monkeypatch.setenv("JTL_TRACEBACK", "1")
    with pytest.raises((InputError, MissingError, OSError)):
        main(run, Toy, args=words(tmp_path, "--rate", rate))


@pytest.mark.parametrize(
    ("rate", "code", "line"),
    [("5", 1, "NaN at step 7"), ("6", 130, "KeyboardInterrupt"), ("6.5", 143, "after step 3")],
)
def test_divergence_and_ctrl_c_have_codes_of_their_own(tmp_path, capsys, monkeypatch, rate, code, line):
    monkeypatch.delenv("JTL_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as stop:
        main(run, Toy, args=words(tmp_path, "--rate", rate))
    assert stop.value.code == code and line in capsys.readouterr().err


def test_a_defect_keeps_its_traceback(tmp_path, monkeypatch):
    monkeypatch.delenv("JTL_TRACEBACK", raising=False)
    with pytest.raises(ValueError, match="reshape"):  # which no UserError is
        main(run, Toy, args=words(tmp_path, "--rate", "9"))


def test_predict_is_called_in_place_of_run(tmp_path):
    @dataclass(frozen=True, kw_only=True)
    class Used(Config):
        """Settings."""

        predict: str | None = None
        """What to predict."""

    called = []
    told = lambda name: lambda config: called.append((name, config.predict))  # noqa: E731
    main(told("run"), Used, args=words(tmp_path), predict=told("predict"))
    main(told("run"), Used, args=words(tmp_path, "--predict", "x"), predict=told("predict"))
    assert called == [("run", None), ("predict", "x")]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rate": 0.0}, "--rate must be over 0, got 0.0"),
        ({"rate": float("nan")}, "--rate must be over 0, got nan"),
        ({"sizes": (64, 0)}, "--sizes must be at least 1, got 0"),
        ({"epochs": 0}, "--epochs must be at least 1, got 0"),
    ],
)
def test_a_setting_below_its_bound_is_refused_before_the_folder_is_made(tmp_path, wrong, message):
    out = tmp_path / "out"
    with pytest.raises(InputError) as refused:
        prepare(Toy(out=out, **wrong), "toy")
    assert str(refused.value) == message and not out.exists()
    with pytest.raises(InputError):
        check(Toy(out=out, **wrong))


def test_settings_at_their_bounds_or_left_out_pass(tmp_path):
    check(Toy(out=tmp_path, rate=1e-9, sizes=(1,), epochs=1))
    check(Toy(out=tmp_path, sizes=(), epochs=None))


def test_finish_takes_rows_with_their_seconds_and_a_summary_of_its_own(tmp_path):
    rows = [{"arm": "full", "seed": 0, "loss": 2.0}]
    summary = {"loss": {"full": {"mean": 2.0, "ci95": None, "n": 1}}}
    config = Toy(out=tmp_path, rate=0.1)
    finish("toy", config, rows, [], title="T", about="A", summary=summary, seconds=3.0, subcommand="check")
    found = read_result(tmp_path)
    assert found.rows == rows and found.summary == summary and found.seconds == 3.0
    text = (tmp_path / "report.md").read_text()
    assert f"python -m experiments.toy check --out {tmp_path} --rate 0.1" in text


def test_used_folder_is_refused_and_resumed(tmp_path):
    out = tmp_path / "run"
    run(Toy(out=out))
    with pytest.raises(FileExistsError, match=r"result\.json.*choose another --out, or --resume to continue"):
        run(Toy(out=out))
    run(Toy(out=out, resume=True))
    with pytest.raises(ValueError, match=r"rate was 0\.001 and is now 0\.1"):
        run(Toy(out=out, resume=True, rate=0.1))
    moved = out.rename(tmp_path / "moved")
    run(Toy(out=moved, resume=True))


@pytest.mark.parametrize("folder", ["checkpoints", "full_0/checkpoints"])
def test_checkpoints_are_a_used_folder(tmp_path, folder):
    prepare(Toy(out=tmp_path), "toy")
    prepare(Toy(out=tmp_path), "toy")
    (tmp_path / folder / "100").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="checkpoints"):
        prepare(Toy(out=tmp_path), "toy")
    with pytest.raises(ValueError, match="holds a run of toy, not of other"):
        prepare(Toy(out=tmp_path, resume=True), "other")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="missing or unreadable"):
        prepare(Toy(out=tmp_path, resume=True), "toy")


def test_resume_in_an_empty_folder_begins(tmp_path):
    assert prepare(Toy(out=tmp_path / "new", resume=True), "toy") == tmp_path / "new"


def test_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        OSError, match=r"file/run cannot be written to \(Not a directory\): choose another --out"
    ):
        prepare(Toy(out=tmp_path / "file" / "run"), "toy")
    with pytest.raises(OSError, match="cannot be written to"):
        prepare(Toy(out=tmp_path / "file"), "toy")
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="cannot be written to"):
        prepare(Toy(out=tmp_path), "toy")


def test_command_makes_the_same_config_again():
    import shlex

    import tyro

    config = Toy(out=Path("my runs"), technique="head", rate=3e-5, sizes=(1, 2), quick=True, resume=True)
    text = command("toy", config)
    assert (
        text == "python -m experiments.toy --out 'my runs' --quick --technique head --rate 3e-05 --sizes 1 2"
    )
    assert tyro.cli(Toy, args=shlex.split(text)[3:]) == dataclasses.replace(config, resume=False)
    assert "out" not in settings(config) and "resume" not in settings(config)
