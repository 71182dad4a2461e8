"""The settings that every experiment shares, and the folder it writes to."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from jtl._files import write_file
from jtl.errors import InputError
from jtl.report.result import plain, to_json

FILE = "config.json"
USED = ("result.json", "rows.jsonl", "checkpoints/*", "*/checkpoints/*")
# These say where and how to write, and what to use the result for; no number depends on them.
OUTPUT_ONLY = ("out", "resume", "predict")


@dataclass(frozen=True, kw_only=True)
class Config:
    """What every experiment can be told."""

    out: Path
    """Folder for result.json, report.md with its figures, TensorBoard events and checkpoints."""
    resume: bool = False
    """Continue from the checkpoints in --out, with the same settings."""
    quick: bool = False
    """A small run on real data, about a minute on two cores."""
    seed: int = 0
    """The first random seed; arms repeated over seeds use seed, seed + 1, ..."""


C = TypeVar("C", bound=Config)


def at_least(least: float, default: Any) -> Any:
    """A field of a ``Config`` with this default, whose value (or each of its values) may not be smaller.

    None passes: it leaves a setting to the code. The docstring under the field is its help, as for any other.
    """
    return dataclasses.field(default=default, metadata={"least": least})


def above(bound: float, default: Any) -> Any:
    """A field of a ``Config`` with this default, whose value (or each of its values) must be larger."""
    return dataclasses.field(default=default, metadata={"above": bound})


def check(config: Any) -> None:
    """Refuse a setting that lies below its bound, before anything is loaded.

    Raises:
        InputError: names the first such setting.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        flag = f"--{field.name.replace('_', '-')}"
        for one in value if isinstance(value, tuple) else (value,):
            if one is None:
                continue
            if (least := field.metadata.get("least")) is not None and not one >= least:
                raise InputError(f"{flag} must be at least {least}, got {one}")
            if (bound := field.metadata.get("above")) is not None and not one > bound:
                raise InputError(f"{flag} must be over {bound}, got {one}")


def at_most(config: C, **most: int) -> C:
    """``config`` with these settings at most so large; 0, which asks for all there is, is lowered too."""
    lowered: dict[str, Any] = {
        name: min(value, getattr(config, name) or value) for name, value in most.items()
    }
    return dataclasses.replace(config, **lowered)


def settings(config: Any) -> dict[str, Any]:
    """The fields of ``config`` that decide the numbers, in JSON's own types: all but ``OUTPUT_ONLY``."""
    return {name: value for name, value in plain(config).items() if name not in OUTPUT_ONLY}


def prepare(config: Config, experiment: str) -> Path:
    """Make the folder ``config.out`` ready for a run, with the settings in its ``config.json``; returns it.

    With ``resume`` the folder may hold an earlier run of the same settings, or nothing yet, so that a job that
    may be killed at any moment can always be started with ``--resume``.

    Raises:
        FileExistsError: the folder holds a run and ``resume`` is off.
        OSError: the folder cannot be made or written to.
        InputError: a setting below its bound, or ``resume`` with other settings than those of the run in the folder.
    """
    check(config)
    out = Path(config.out)
    wanted = {"experiment": experiment, "config": settings(config)}
    used = next((path for pattern in USED for path in out.glob(pattern)), None)
    if used is not None and not config.resume:
        raise FileExistsError(
            f"--out {out} already holds a run ({used.relative_to(out)}): choose another --out, or --resume to continue"
        )
    if config.resume and (used is not None or (out / FILE).exists()):
        _check_same(_read(out), wanted, out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_file(out / FILE, to_json(wanted))
    except OSError as error:
        reason = error.strerror or str(error)
        raise type(error)(f"--out {out} cannot be written to ({reason}): choose another --out") from error
    return out


def _read(out: Path) -> dict[str, Any]:
    try:
        found = json.loads((out / FILE).read_text(encoding="utf-8"))
        return {"experiment": found["experiment"], "config": dict(found["config"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"--out {out} holds a run whose {FILE} is missing or unreadable, so --resume cannot tell its settings: "
            "choose another --out"
        ) from error


def _check_same(found: dict[str, Any], wanted: dict[str, Any], out: Path) -> None:
    if found["experiment"] != wanted["experiment"]:
        raise InputError(
            f"--out {out} holds a run of {found['experiment']}, not of {wanted['experiment']}: choose another --out"
        )
    old, new = found["config"], wanted["config"]
    different = [
        name for name in {**old, **new} if old.get(name) != new.get(name) or (name in old) != (name in new)
    ]
    if different:
        was = ", ".join(f"{name} was {old.get(name)!r} and is now {new.get(name)!r}" for name in different)
        raise InputError(
            f"--resume needs the settings that the run in {out} began with, but {was}: "
            "repeat its flags, or choose another --out"
        )


def command(experiment: str, config: Config) -> str:
    """The command line of ``config``: ``out`` and every field that is not at its default."""
    words = [f"python -m experiments.{experiment}"]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in ("resume", "predict") or value == field.default:
            continue
        if field.default_factory is not dataclasses.MISSING and value == field.default_factory():
            continue
        words += _words(f"--{field.name.replace('_', '-')}", value)
    return " ".join(words)


def _words(flag: str, value: Any) -> list[str]:
    import shlex

    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    values = value if isinstance(value, (list, tuple)) else [value]
    return [flag, *(shlex.quote(os.fspath(v) if isinstance(v, os.PathLike) else str(v)) for v in values)]
