"""The end of a study: its result, its report, and the comparison of transfer with training from scratch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jtl.report.report import Section, format_estimate, paired_difference, table


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
