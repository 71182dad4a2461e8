"""What the templates of docs/make_results.py call: figures of experiments/results/*.json, as text."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from jtl.report import format_estimate, format_seconds, paired_difference, summarise, table

__all__ = [
    "claim", "command", "difference", "differences", "estimate", "format_seconds", "having", "made", "names", "number",
    "ranked", "result", "rows", "spread", "table", "value", "values", "versions",
]  # fmt: skip

DATA = Path(__file__).parents[1] / "experiments" / "results"


@dataclass(frozen=True)
class Interval:
    """A mean and half of its 95 % confidence interval; as text ``0.112 ± 0.030``.

    Attributes:
        mean: the mean, or the single value.
        half: half of the interval; None for a single value.
        digits: behind the point; None for as many as reports have.
        lower: whether less is better.
    """

    mean: float
    half: float | None = None
    digits: int | None = None
    lower: bool = False

    def __str__(self) -> str:
        if self.digits is None:
            return format_estimate({"mean": self.mean, "ci95": self.half, "n": 0})
        parts = [self.mean] if self.half is None else [self.mean, self.half]
        return " ± ".join(f"{part:,.{self.digits}f}" for part in parts)

    @property
    def verdict(self) -> str:
        """``better``, ``worse``, or ``undecided`` where the interval includes 0."""
        if self.half is None or abs(self.mean) <= self.half:
            return "undecided"
        return "better" if (self.mean < 0) == self.lower else "worse"

    def sure(self, verdict: str) -> Interval:
        """The difference, without its sign, of which a sentence says a verdict. Raises ValueError for another."""
        if self.verdict != verdict:
            raise ValueError(f"a sentence says {verdict}, but {self} is {self.verdict}")
        return self if verdict == "undecided" else replace(self, mean=abs(self.mean))

    def times(self, factor: float, digits: int = 1) -> Interval:
        """In another unit, such as per cent."""
        return Interval(
            self.mean * factor, None if self.half is None else self.half * factor, digits, self.lower
        )


@cache
def result(name: str) -> dict[str, Any]:
    """What the file ``experiments/results/NAME.json`` holds."""
    return json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))


def names() -> list[str]:
    """The results there are."""
    return sorted(path.stem for path in DATA.glob("*.json"))


def rows(name: str, **where: Any) -> list[dict[str, Any]]:
    """The rows that have these values, of one result or of several ("a+b"). Raises LookupError if there are none."""
    every = [row for part in name.split("+") for row in result(part)["rows"]]
    if not (found := [row for row in every if all(row.get(key) == own for key, own in where.items())]):
        raise LookupError(f"{name}.json has no row with {where}")
    return found


def values(name: str, key: str, **where: Any) -> list[Any]:
    """The different values of a key, in order of appearance."""
    return list(dict.fromkeys(row[key] for row in rows(name, **where) if key in row))


def value(name: str, key: str, **where: Any) -> Any:
    """The one value of a key. Raises ValueError if there is none or several."""
    (found,) = values(name, key, **where)
    return found


def estimate(name: str, metric: str, arm: str, digits: int | None = None) -> Interval:
    """An estimate of a result's summary."""
    found = result(name)["summary"][metric][arm]
    return Interval(found["mean"], found["ci95"], digits)


def spread(name: str, metric: str, arm: str, digits: int | None = None, **where: Any) -> Interval:
    """An estimate of a metric that the summary lacks, over the rows of an arm."""
    found = summarise(rows(name, arm=arm, **where), [metric])[metric][arm]
    return Interval(found["mean"], found["ci95"], digits)


def ranked(name: str, metric: str, lower: bool = False) -> list[str]:
    """The arms of a metric, best first."""
    found = result(name)["summary"][metric]
    return sorted(found, key=lambda arm: found[arm]["mean"], reverse=not lower)


def difference(
    name: str, metric: str, arm: str, base: str, *, digits: int | None = 3, lower: bool = False,
    pool: str | None = None, **where: Any,
) -> Interval:  # fmt: skip
    """``arm - base``, paired by seed.

    Args:
        name: of the result, or of several ("a+b").
        metric: a key of its rows.
        arm: one arm.
        base: the other. If it has a single row, because it has no randomness, that is taken from each row of ``arm``.
        digits: see ``Interval``.
        lower: whether less is better.
        pool: a key over whose values each seed's rows are averaged first.
        where: which rows.
    """
    own = [row for row in rows(name, **where) if row["arm"] in (arm, base) and metric in row]
    if pool:
        groups: dict[tuple[str, int], list[float]] = {}
        for row in own:
            groups.setdefault((row["arm"], row["seed"]), []).append(row[metric])
        own = [{"arm": a, "seed": seed, metric: fmean(group)} for (a, seed), group in groups.items()]
    fixed = [row for row in own if row["arm"] == base]
    if len(fixed) == 1:
        own = [row for row in own if row["arm"] == arm]
        own += [{**row, "arm": base, metric: fixed[0][metric]} for row in own]
    found = paired_difference(own, metric, arm, base)
    return Interval(found["mean"], found["ci95"], digits, lower)


def differences(
    name: str, metric: str, base: str, skip: tuple[str, ...] = (), **how: Any
) -> dict[str, Interval]:
    """The difference of every other arm from ``base``, the best first; ``how`` as for ``difference``."""
    where = {key: own for key, own in how.items() if key not in ("digits", "lower", "pool")}
    arms = dict.fromkeys(row["arm"] for row in rows(name, **where) if metric in row)
    found = {arm: difference(name, metric, arm, base, **how) for arm in arms if arm not in (base, *skip)}
    return dict(sorted(found.items(), key=lambda item: item[1].mean, reverse=not how.get("lower")))


def having(found: Mapping[str, Interval], verdict: str, plain: bool = False) -> str:
    """The arms with a verdict, as in "`mcc` (0.141 ± 0.005), `shot` (0.135 ± 0.016)"; ``plain`` names alone."""
    chosen = [(arm, own) for arm, own in found.items() if own.verdict == verdict]
    return ", ".join(f"`{arm}`" if plain else f"`{arm}` ({own})" for arm, own in chosen) or "none"


def number(own: float, digits: int = 0) -> str:
    """A number with so many digits behind the point, and commas between thousands."""
    return f"{own:,.{digits}f}"


def claim(condition: bool, words: str) -> str:
    """``words`` if the figures bear them out. Raises ValueError if not."""
    if not condition:
        raise ValueError(f"the results do not say: {words}")
    return words


def command(name: str, *options: str) -> str:
    """The command that made a result, with the ``options`` of its config that are not at their defaults."""
    experiment, config = result(name)["experiment"], result(name)["config"]
    module = f"benchmarks.{experiment[6:]}" if experiment.startswith("bench_") else experiment
    words = ["python", "-m", f"experiments.{module}", *(["check"] if experiment == "models" else [])]
    for option in options:
        own = config[option]
        words += [f"--{option.replace('_', '-')}", *map(str, own if isinstance(own, list) else [own])]
    return shlex.join([*words, "--out", f"runs/{name}"])


def made(name: str, *options: str, note: str = "") -> str:
    """A line on where figures are from: the file, its command, the time, the processors, the commit, and a note."""
    own = result(name)
    cores, commit = own["environment"]["cpu_count"], own["environment"]["commit"]
    commit = commit[:10] + commit[40:]  # what may follow the hash is "+changes"
    took = f"{format_seconds(own['seconds'])} on {cores} CPU core{'s' * (cores > 1)}; commit `{commit}`"
    link = f"[`{name}.json`](../../experiments/results/{name}.json)"
    return f"* {link}: `{command(name, *options)}`; {took}.{note and ' ' + note}"


def versions(key: str) -> str:
    """What a key of the environment is in the results."""
    return ", ".join(sorted({str(result(name)["environment"].get(key)) for name in names()}))
