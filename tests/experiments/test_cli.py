"""The command line and the output folder, run as a user runs them."""

import dataclasses
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from experiments.common.command_line import main
from experiments.common.settings import Config, command, prepare, settings
from jtl.report.report import Result, summarise, write_result


@dataclass(frozen=True, kw_only=True)
class Toy(Config):
    """A toy experiment."""

    technique: Literal["full", "head"] = "full"
    """Which parameters train."""
    rate: float = 1e-3
    """Learning rate."""
    sizes: tuple[int, ...] = (64, 256)
    """Training sizes."""


def run(config: Toy) -> Result:
    if config.rate <= 0:
        raise ValueError(f"--rate must be positive,\n  found {config.rate}")
    if config.rate == 7:
        raise KeyError("unknown data 'x'")
    if config.rate == 8:
        open(config.out / "missing.csv")
    if config.rate == 5:
        raise FloatingPointError("the loss is NaN at step 7")
    if config.rate == 6:
        raise KeyboardInterrupt
    if config.rate == 9:
        np.zeros(2) + np.zeros(3).reshape(2, 2)
    out = prepare(config, "toy")
    rows = [{"arm": config.technique, "seed": s, "accuracy": 0.5 + 0.1 * s} for s in range(2)]
    result = Result("toy", settings(config), {}, 3.0, rows, summarise(rows, ["accuracy"]))
    write_result(out, result)
    return result


def words(out, *flags):
    return ["--out", str(out), *flags]


def test_prints_the_summary_and_the_report(tmp_path, capsys):
    main(run, Toy, words(tmp_path / "a", "--technique", "head", "--sizes", "1", "2"))
    text = capsys.readouterr().out
    assert "head" in text and "0.550 ± 0.635" in text and str(tmp_path / "a" / "report.md") in text
    assert json.loads((tmp_path / "a" / "config.json").read_text())["config"]["sizes"] == [1, 2]


def test_help_says_what_the_flags_do(capsys):
    with pytest.raises(SystemExit) as stop:
        main(run, Toy, ["--help"])
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


def test_unknown_choice_ends_with_two(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(run, Toy, words(tmp_path, "--technique", "heads"))
    assert stop.value.code == 2 and "full" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rate", "line"),
    [("-1", "--rate must be positive, found -1.0"), ("7", "unknown data 'x'"), ("8", "No such file")],
)
def test_refused_input_is_one_line(tmp_path, capsys, monkeypatch, rate, line):
    monkeypatch.delenv("JTL_TRACEBACK", raising=False)
    monkeypatch.setattr(sys.modules["experiments.common.command_line"], "OURS", ("jtl", __name__))
    with pytest.raises(SystemExit) as stop:
        main(run, Toy, words(tmp_path, "--rate", rate))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and line in error and error.count("\n") == 1
    monkeypatch.setenv("JTL_TRACEBACK", "1")
    with pytest.raises((ValueError, KeyError, OSError)):
        main(run, Toy, words(tmp_path, "--rate", rate))


@pytest.mark.parametrize(
    ("rate", "code", "line"), [("5", 1, "NaN at step 7"), ("6", 130, "KeyboardInterrupt")]
)
def test_divergence_and_ctrl_c_have_codes_of_their_own(tmp_path, capsys, monkeypatch, rate, code, line):
    monkeypatch.delenv("JTL_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as stop:
        main(run, Toy, words(tmp_path, "--rate", rate))
    assert stop.value.code == code and line in capsys.readouterr().err


def test_a_defect_keeps_its_traceback(tmp_path, monkeypatch):
    monkeypatch.delenv("JTL_TRACEBACK", raising=False)
    with pytest.raises(ValueError, match="reshape"):
        main(run, Toy, words(tmp_path, "--rate", "9"))


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
    assert tyro.main(Toy, args=shlex.split(text)[3:]) == dataclasses.replace(config, resume=False)
    assert "out" not in settings(config) and "resume" not in settings(config)
