"""The report of an experiment: ``result.json``, ``report.md`` and its figures, with statistics over seeds.

``figures`` needs matplotlib and is imported separately: ``from jtl.report import figures``.
"""

from jtl.report.report import (
    Section,
    confident_errors,
    escape,
    format_estimate,
    format_seconds,
    summary_rows,
    summary_table,
    table,
    write_report,
)
from jtl.report.result import (
    Estimate,
    Result,
    Summary,
    environment,
    estimate,
    paired_difference,
    plain,
    read_result,
    summarise,
    to_json,
    write_result,
)

__all__ = [
    "Estimate", "Result", "Section", "Summary", "confident_errors", "environment", "escape", "estimate",
    "format_estimate", "format_seconds", "paired_difference", "plain", "read_result", "summarise", "summary_rows",
    "summary_table", "table", "to_json", "write_report", "write_result",
]  # fmt: skip
