"""``Result``: the findings of an experiment, their statistics over seeds, and the JSON file that stores them."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from jtl._files import write_file
from jtl.errors import InputError, MissingError

Row = Mapping[str, Any]
Estimate = dict[str, Any]  # {"mean": float or None, "ci95": float or None, "n": int}
Summary = dict[str, dict[str, Estimate]]

FILE = "result.json"
PACKAGES = ("jtl", "jax", "jaxlib", "flax", "optax", "numpy")


@dataclass(frozen=True)
class Result:
    """The findings of one run of an experiment.

    Attributes:
        experiment: its name, as in ``python -m experiments.NAME``.
        config: the settings that determine the numbers.
        environment: versions and devices, from ``environment()``.
        seconds: wall time of the run.
        rows: one flat dict per arm, seed and setting: ``{"arm": "full", "seed": 0, "accuracy": 0.84}``.
        summary: ``{metric: {arm: {"mean", "ci95", "n"}}}``, from ``summarise``.
    """

    experiment: str
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    seconds: float
    rows: Sequence[Row]
    summary: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)


def environment() -> dict[str, Any]:
    """Return versions, devices, number of processors and commit; it names no machine, user or folder."""
    import jax

    devices = jax.devices()
    return {
        **{name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "devices": {
            "platform": devices[0].platform,
            "kind": devices[0].device_kind,
            "count": len(devices),
            "processes": jax.process_count(),
        },
        "cpu_count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "commit": _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The git commit of jtl's own source, with ``+changes`` if tracked files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # An installed copy may be inside another repository, whose commit says nothing about jtl.
        if not git("ls-files", Path(__file__).name):
            return None
        return git("rev-parse", "HEAD") + (
            "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return None


def estimate(values: Iterable[float | int | None]) -> Estimate:
    """Return the mean, the half-width of its 95 % confidence interval (Student t, ``n - 1`` degrees of freedom), and n.

    A single value has no interval (``ci95`` is None, not 0). A None or NaN among the values, from a diverged run, makes
    the mean None: a mean over only the successful runs would mislead.
    """
    sample = np.array([math.nan if value is None else float(value) for value in values])
    n = len(sample)
    if n == 0 or not np.isfinite(sample).all():
        return {"mean": None, "ci95": None, "n": n}
    if n == 1:
        return {"mean": float(sample[0]), "ci95": None, "n": 1}
    from scipy.stats import t

    half = t.ppf(0.975, n - 1) * sample.std(ddof=1) / math.sqrt(n)
    return {"mean": float(sample.mean()), "ci95": float(half), "n": n}


def summarise(rows: Sequence[Row], metrics: Sequence[str], by: str = "arm") -> Summary:
    """Return ``{metric: {arm: {"mean", "ci95", "n"}}}`` over the seeds, arms in order of appearance.

    A row without a metric's key does not count for that metric.

    Args:
        rows: flat dicts, see ``Result``.
        metrics: keys of the metrics.
        by: key of the arm.

    Raises:
        KeyError: no row has the metric, or a row lacks the key ``by``.
        ValueError: an arm has two rows with the same seed: select the rows of one setting first.
    """
    arms: dict[str, list[Row]] = {}
    for row in rows:
        if by not in row:
            raise MissingError(f"a row has no {by!r} to summarise by; it has {sorted(row)}")
        arms.setdefault(str(row[by]), []).append(row)
    for arm, own in arms.items():
        seeds = [row["seed"] for row in own if "seed" in row]
        if repeated := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
            raise InputError(
                f"{by} {arm!r} has several rows of seed {repeated[0]}: "
                "an interval over seeds needs the rows of one setting, so select them first"
            )
    summary = {}
    for metric in metrics:
        values = {arm: [row[metric] for row in own if metric in row] for arm, own in arms.items()}
        if not any(values.values()):
            raise MissingError(
                f"no row has the metric {metric!r}; they have {sorted({k for r in rows for k in r})}"
            )
        summary[metric] = {arm: estimate(own) for arm, own in values.items() if own}
    return summary


def paired_difference(
    rows: Sequence[Row], metric: str, arm_a: str, arm_b: str, over: Sequence[str] = ("seed", "size")
) -> Estimate:
    """Return the mean of ``arm_a - arm_b`` over pairs of rows that agree in ``over``, with its confidence interval.

    Arms share seeds and splits, so the interval of the differences is the right comparison: the effect of a hard split
    on both arms cancels.

    Args:
        rows: flat dicts, see ``Result``.
        metric: its key.
        arm_a: the minuend.
        arm_b: the subtrahend.
        over: keys in which paired rows agree; a key that the rows lack is ignored.

    Raises:
        ValueError: a row has no partner, or two rows of an arm agree in ``over``.
    """

    def values(arm: str) -> dict[tuple, Any]:
        own: dict[tuple, Any] = {}
        for row in rows:
            if row["arm"] == arm and metric in row:
                pair = tuple(row.get(name) for name in over)
                if pair in own:
                    raise InputError(
                        f"arm {arm!r} has several rows with {_named(over, pair)}: pair over more keys"
                    )
                own[pair] = row[metric]
        return own

    a, b = values(arm_a), values(arm_b)
    if not a or not b:
        raise InputError(f"no row of arm {arm_b if a else arm_a!r} has the metric {metric!r}")
    if alone := [pair for pair in [*a, *b] if pair not in a or pair not in b]:
        raise InputError(f"only one of {arm_a!r} and {arm_b!r} has a row with {_named(over, alone[0])}")
    return estimate(None if a[pair] is None or b[pair] is None else a[pair] - b[pair] for pair in a)


def _named(names: Sequence[str], values: Sequence[Any]) -> str:
    return ", ".join(
        f"{name} {value}" for name, value in zip(names, values, strict=True) if value is not None
    )


def plain(value: Any) -> Any:
    """Convert ``value`` to JSON types: arrays and tuples become lists, paths strings, NaN and infinity None.

    Raises:
        TypeError: it is anything else.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    raise TypeError(
        f"{type(value).__name__} {value!r} has no place in a result: use numbers, text, lists and dicts"
    )


def to_json(value: Any) -> str:
    """Return indented JSON of ``plain(value)``, with keys in their own order."""
    return json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_result(folder: str | Path, result: Result) -> Path:
    """Write ``result.json`` into ``folder`` atomically and return its path."""
    path = Path(folder) / FILE
    write_file(path, to_json(result))
    return path


def read_result(path: str | Path) -> Result:
    """Read the result in a JSON file, or in the ``result.json`` of a folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not JSON, or lacks the fields of ``Result``.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    names = {f.name for f in dataclasses.fields(Result)}
    if not isinstance(values, dict) or set(values) != names:
        found = sorted(values) if isinstance(values, dict) else type(values).__name__
        raise InputError(f"{path} is not a result: expected the fields {sorted(names)}, found {found}")
    return Result(**values)
