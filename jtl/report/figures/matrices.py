"""Matrices as heat maps: confusion matrices, and shares or accuracies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from jtl.report.figures.style import blank


def confusion(true: Any, predicted: Any, classes: Sequence[str]) -> Figure:
    """Plot counts of predicted against true class, shaded by the share of the true class.

    Args:
        true: labels (N,).
        predicted: labels (N,).
        classes: C names.
    """
    counts = np.zeros((len(classes), len(classes)), int)
    np.add.at(counts, (np.asarray(true), np.asarray(predicted)), 1)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(12.0, 3.2 + 0.48 * len(classes))
    with blank(side + 1.2, side) as figure:
        axes = figure.subplots()
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        font = 12 if len(classes) <= 10 else 9
        slanted = max(map(len, classes)) * len(classes) > 40
        axes.set_xticks(
            range(len(classes)), classes, fontsize=font, rotation=45 if slanted else 0,
            ha="right" if slanted else "center", rotation_mode="anchor" if slanted else "default",
        )  # fmt: skip
        axes.set_yticks(range(len(classes)), classes, fontsize=font)
        axes.tick_params(length=0)
        if len(classes) <= 25:
            for (row, column), count in np.ndenumerate(counts):
                if count:
                    colour = "white" if share[row, column] > 0.55 else "black"
                    axes.text(
                        column, row, f"{count:,}", ha="center", va="center", fontsize=font, color=colour
                    )
        axes.set(
            xlabel="predicted", ylabel="true", title=f"Accuracy {np.trace(counts) / max(counts.sum(), 1):.3f}"
        )
        figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class")
    return figure


def heatmaps(
    panels: Mapping[str, Any], rows: Sequence[str], columns: Sequence[str], label: str, across: str, down: str
) -> Figure:
    """Plot matrices of shares or accuracies side by side, each cell with its value; NaN stays white.

    Args:
        panels: (R, C) values in [0, 1], by panel title.
        rows: R names.
        columns: C names.
        label: of the colour bar, with its unit.
        across: label of the column axis.
        down: label of the row axis.
    """
    per_line = min(3, len(panels))
    lines = -(-len(panels) // per_line)
    wide, high = 2.0 + 0.62 * len(columns), 1.4 + 0.5 * len(rows)
    with blank(max(5.0, wide * per_line + 1.2), max(2.6, high * lines)) as figure:
        grid = figure.subplots(lines, per_line, squeeze=False).ravel()
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        for axes, (title, values) in zip(grid, panels.items(), strict=False):
            axes.grid(visible=False)
            axes.spines[:].set_visible(False)
            picture = axes.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
            for (row, column), value in np.ndenumerate(np.asarray(values)):
                if np.isfinite(value):
                    colour = "white" if value > 0.55 else "black"
                    axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=9, color=colour)
            axes.set_xticks(
                range(len(columns)), columns, fontsize=9, rotation=45, ha="right", rotation_mode="anchor"
            )
            axes.set_yticks(range(len(rows)), rows, fontsize=9)
            axes.tick_params(length=0)
            axes.set(title=title, xlabel=across, ylabel=down)
        figure.colorbar(picture, ax=list(grid[: len(panels)]), shrink=0.8, label=label)
    return figure
