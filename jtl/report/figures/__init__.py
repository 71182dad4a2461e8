"""Figures of the reports, in one colour-blind-safe style, with confidence intervals where there are several seeds.

Every function returns a matplotlib ``Figure`` and leaves pyplot's state alone: show it in a notebook or pass it to a
report's ``Section``. "Rows" are those of a ``Result``: flat dicts with ``arm``, ``seed`` and the measured values.
"""

from jtl.report.figures.arms import gap_bars, over_parameters, score_scatter, trade_off
from jtl.report.figures.curves import (
    learning_curves,
    over_rates,
    over_sizes,
    over_steps,
    over_tasks,
    over_weights,
)
from jtl.report.figures.examples import (
    attributed,
    embeddings,
    images,
    principal_components,
    reliability,
    saliency,
    strips,
)
from jtl.report.figures.matrices import confusion, heatmaps
from jtl.report.figures.rolls import piano_rolls
from jtl.report.figures.scenes import boxes, masks
from jtl.report.figures.style import colours, png

__all__ = [
    "attributed",
    "boxes",
    "colours",
    "confusion",
    "embeddings",
    "gap_bars",
    "heatmaps",
    "images",
    "learning_curves",
    "masks",
    "over_parameters",
    "over_rates",
    "over_sizes",
    "over_steps",
    "over_tasks",
    "over_weights",
    "piano_rolls",
    "png",
    "principal_components",
    "reliability",
    "saliency",
    "score_scatter",
    "strips",
    "trade_off",
]
