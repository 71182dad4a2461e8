"""``report.md``: the result of an experiment as readable Markdown, with its figures as PNG files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jtl._files import write_file
from jtl.report.result import (
    Estimate,
    Result,
    environment,
    estimate,
    paired_difference,
    read_result,
    summarise,
    write_result,
)

__all__ = [
    "Result",
    "Section",
    "confident_errors",
    "environment",
    "estimate",
    "format_estimate",
    "paired_difference",
    "read_result",
    "summarise",
    "summary_rows",
    "summary_table",
    "table",
    "write_report",
    "write_result",
]

FILE = "report.md"
_NUMBER = r"[\d.,]+(e-\d+)?"


@dataclass(frozen=True)
class Section:
    """One section of a report.

    Attributes:
        title: its heading; the file of its figure is named after it.
        text: Markdown.
        figure: a matplotlib ``Figure``, embedded above the text.
    """

    title: str
    text: str = ""
    figure: Any = None


def write_report(
    folder: str | Path,
    result: Result,
    *,
    title: str,
    about: str,
    command: str,
    sections: Sequence[Section] = (),
    notes: Sequence[str] = (),
    over: str = "seeds",
) -> Path:
    """Write ``report.md`` and its figures into ``folder`` and return the report's path.

    Args:
        folder: an existing folder.
        result: its summary becomes the table of results; its environment closes the report.
        title: the heading.
        about: one paragraph on the question and the method.
        command: the exact command that reproduces this report.
        sections: figures, tables and text, in order.
        notes: what a reader must know to interpret the numbers.
        over: what the intervals of the summary are over.
    """
    folder = Path(folder)
    parts = [f"# {title}", about, f"```\n{command}\n```"]
    if result.summary:
        parts += ["## Results", summary_table(result.summary, over)]
    if notes:
        parts.append("\n".join(f"* {note}" for note in notes))
    for section in sections:
        parts.append(f"## {section.title}")
        if section.figure is not None:
            from jtl.report.figures import png

            name = re.sub(r"\W+", "_", section.title.lower()).strip("_") + ".png"
            write_file(folder / name, png(section.figure))
            parts.append(f"![{section.title}]({name})")
        parts.append(section.text)
    parts += ["## Settings", table(["setting", "value"], _flat(result.config))]
    parts += ["## Environment", f"The run took {format_seconds(result.seconds)}."]
    parts.append(table(["what", "value"], _flat(result.environment)))
    write_file(folder / FILE, "\n\n".join(part.strip() for part in parts if part.strip()) + "\n")
    return folder / FILE


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a Markdown table; columns whose cells are all numbers (or empty) are right-aligned."""
    cells = [[escape(_text(cell)) for cell in row] for row in rows]
    numeric = [
        bool(cells)
        and all(re.fullmatch(rf"-?{_NUMBER}( ± {_NUMBER})?( \(n = \d+\))?|–?", row[column]) for row in cells)
        for column in range(len(header))
    ]
    lines = [[escape(name) for name in header], ["---:" if right else "---" for right in numeric], *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escape(text: str) -> str:
    r"""Return ``text`` as one Markdown table cell in which nothing is read as markup.

    >>> print(escape("lp_ft | *so* _called_"))
    lp_ft \| \*so\* \_called\_
    """
    # An underscore inside a word is no markup; leaving it keeps names of arms and metrics readable in the source.
    return re.sub(r"([\\`*\[\]<>|~$&]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))


def summary_table(summary: Mapping[str, Mapping[str, Estimate]], over: str = "seeds") -> str:
    """Return arms and metrics as a Markdown table, with a line that explains the intervals."""
    counts = {own["n"] for estimates in summary.values() for own in estimates.values()}
    n = f" n = {counts.pop()}." if len(counts) == 1 else ""
    text = table(*summary_rows(summary))
    return f"{text}\n\nMean ± half-width of the 95 % confidence interval over n {over} (Student t).{n}"


def summary_rows(summary: Mapping[str, Mapping[str, Estimate]]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the arms' metrics as ``mean ± ci95``: one arm per row, or one metric if there are many.

    n is added to each figure unless it is the same for all.
    """
    arms = list(dict.fromkeys(arm for estimates in summary.values() for arm in estimates))
    counts = {own["n"] for estimates in summary.values() for own in estimates.values()}
    shared = len(counts) == 1

    def cell(metric: str, arm: str) -> str:
        own = summary[metric].get(arm)
        if own is None:
            return "–"
        return format_estimate(own) + ("" if shared else f" (n = {own['n']})")

    metrics = list(summary)
    if len(metrics) > 4 and len(metrics) > len(arms):
        return ["metric", *arms], [[m, *(cell(m, arm) for arm in arms)] for m in metrics]
    return ["arm", *metrics], [[arm, *(cell(m, arm) for m in metrics)] for arm in arms]


def format_estimate(own: Estimate) -> str:
    """Format as ``"0.842 ± 0.006"``; without the interval for a single value, ``"undefined"`` after a diverged run.

    >>> format_estimate({"mean": 0.84167, "ci95": 0.00612, "n": 3})
    '0.842 ± 0.006'
    >>> format_estimate({"mean": 3.21e-7, "ci95": 4.8e-8, "n": 6})
    '3.2e-07 ± 4.8e-08'
    """
    if own["mean"] is None:
        return "undefined"
    form = _form(max(abs(own["mean"]), abs(own["ci95"] or 0.0)))
    mean = format(own["mean"], form)
    return mean if own["ci95"] is None else f"{mean} ± {format(own['ci95'], form)}"


def format_seconds(seconds: float) -> str:
    """Format as ``"7.5 s"``, ``"3 min 20 s"`` or ``"2 h 5 min"``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def confident_errors(
    texts: Sequence[str],
    true: Any,
    probabilities: Any,
    classes: Sequence[str],
    count: int = 10,
    length: int = 160,
) -> str:
    """Return a Markdown table of the wrong predictions with the highest confidence.

    Args:
        texts: the N examples.
        true: labels (N,).
        probabilities: (N, C).
        classes: C names.
        count: maximum number of rows.
        length: maximum length of a text, in characters.
    """
    true, probabilities = np.asarray(true), np.asarray(probabilities)
    predicted = probabilities.argmax(-1)
    wrong = np.flatnonzero(predicted != true)
    if not len(wrong):
        return f"No errors among {len(true):,} examples."
    order = wrong[np.argsort(-probabilities[wrong, predicted[wrong]], kind="stable")][:count]

    def short(text: str) -> str:
        text = " ".join(text.split())
        return text if len(text) <= length else text[: length - 1].rstrip() + "…"

    rows = [
        [f"{probabilities[i, predicted[i]]:.3f}", classes[predicted[i]], classes[true[i]], short(texts[i])]
        for i in order
    ]
    return table(["probability", "predicted", "true", "text"], rows)


def _form(magnitude: float) -> str:
    """The format of a number of this size."""
    if magnitude == 0 or magnitude >= 1000:
        return ",.0f"
    if magnitude < 1e-5:
        return ".1e"
    return ",.1f" if magnitude >= 10 else ",.3f" if magnitude >= 0.01 else ",.5f"


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[list[Any]]:
    rows: list[list[Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append([f"{prefix}{name}", f"{value:g}" if isinstance(value, float) else value])
    return rows


def _text(cell: Any) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, (list, tuple)):
        return ", ".join(_text(item) for item in cell)
    return format(cell, _form(abs(cell))) if isinstance(cell, float) else str(cell)
