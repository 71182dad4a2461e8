"""Progressive networks: a column for each task, laterals from earlier columns, and the analysis of what they carry."""

from jtl.progressive.columns import Column, Columns, Lateral
from jtl.progressive.grow import (
    columns,
    cost,
    grow,
    labels,
    reinitialise,
    replace_columns,
    single_column,
    task,
)
from jtl.progressive.prune import prune
from jtl.progressive.sensitivity import fisher_sensitivity, perturbation_sensitivity
from jtl.progressive.transfer import (
    area,
    average_accuracy,
    backward_matrix,
    backward_transfer,
    forward_matrix,
    forward_transfer,
    transfer_score,
)

__all__ = [
    "Column", "Columns", "Lateral",
    "area", "average_accuracy", "backward_matrix", "backward_transfer", "columns", "cost", "fisher_sensitivity",
    "forward_matrix", "forward_transfer", "grow", "labels", "perturbation_sensitivity", "prune", "reinitialise",
    "replace_columns", "single_column", "task", "transfer_score",
]  # fmt: skip
