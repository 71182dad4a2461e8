"""Progressive networks: a column for each task, laterals from earlier columns, and the analysis of what they carry."""

from jtl.progressive.columns import Column, Columns, Lateral
from jtl.progressive.grow import columns, cost, fresh, grow, labels, only, put, task

__all__ = [
    "Column",
    "Columns",
    "Lateral",
    "columns",
    "cost",
    "fresh",
    "grow",
    "labels",
    "only",
    "put",
    "task",
]
