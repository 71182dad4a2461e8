"""Ends a study: writes its result and report, and compares transfer with training from scratch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.common.resumable_rows import ResumableRows
from experiments.common.settings import Config, command, settings
from jtl.report import (
    Result,
    Section,
    environment,
    format_estimate,
    paired_difference,
    summarise,
    table,
    write_report,
    write_result,
)
from jtl.report.result import Row


def finish(
    experiment: str,
    config: Config,
    rows: ResumableRows | Sequence[Row],
    sections: Sequence[Section],
    *,
    title: str,
    about: str,
    metrics: Sequence[str] = (),
    summary: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    over: str = "seeds",
    seconds: float = 0.0,
    subcommand: str = "",
    versions: Mapping[str, Any] | None = None,
) -> Result:
    """Write ``result.json`` and ``report.md`` of a finished study into ``config.out``, and return the result.

    Args:
        experiment: the command's name, as in ``python -m experiments.NAME``; ``bench_NAME`` is ``benchmarks.NAME``.
        config: the settings that it ran with.
        rows: those kept along the way, with the seconds that they took; or any rows, and their ``seconds``.
        sections: of the report.
        title: of the report.
        about: what was done, for a reader of the report.
        metrics: columns to summarise over seeds, for each arm; ``seconds`` is always among them.
        summary: the summary itself, where it is not that of ``metrics``.
        notes: what a reader of the numbers should know.
        over: what the intervals are over.
        seconds: of the study, where ``rows`` does not count them.
        subcommand: of an experiment that has several.
        versions: of other frameworks, for the environment.
    """
    if isinstance(rows, ResumableRows):
        seconds = rows.seconds
        rows = rows.rows
    found = summarise(rows, [*metrics, "seconds"]) if summary is None else dict(summary)
    result = Result(
        experiment, settings(config), {**environment(), **(versions or {})}, seconds, list(rows), found
    )
    write_result(config.out, result)
    words = command(f"{experiment.replace('bench_', 'benchmarks.')} {subcommand}".strip(), config)
    write_report(
        config.out, result, title=title, about=about, command=words, sections=sections, notes=notes, over=over
    )
    return result


def transferred_or_scratch(
    rows: list[dict[str, Any]], metrics: Sequence[str], better: str | Mapping[str, str] = "more"
) -> Section:
    """The differences between ``transfer`` and ``scratch`` on the same data and seeds, and what they show.

    Args:
        rows: of the result.
        metrics: which.
        better: ``"more"`` or ``"less"`` of them, or which of each.
    """
    lines = []
    for metric in metrics:
        own = paired_difference(rows, metric, "transfer", "scratch")
        sure = own["ci95"] is not None and abs(own["mean"]) > own["ci95"]
        wanted = better if isinstance(better, str) else better[metric]
        verdict = ("better" if (own["mean"] > 0) == (wanted == "more") else "worse") if sure else "undecided"
        lines.append([metric, format_estimate(own), verdict])
    return Section(
        "Transferred or from scratch", table(["metric", "transfer less scratch", "transfer is"], lines)
    )
