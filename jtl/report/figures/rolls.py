"""Piano rolls of music: time to the right, pitch upwards, one colour per voice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from jtl.errors import InputError
from jtl.report.figures.style import MANY, PALETTE, blank

SHARP = (1, 3, 6, 8, 10)  # pitch classes of a piano's black keys


def piano_rolls(
    pieces: Sequence[Any],
    titles: Sequence[str],
    bars: Sequence[tuple[int, int]],
    voices: Sequence[str],
    columns: int = 2,
) -> Figure:
    """Plot one panel per piece; vertical lines are bars, shaded rows the black keys of a piano.

    Args:
        pieces: notes (N, 4) of each piece: voice, start and length in sixteenths, MIDI pitch.
        titles: one per piece.
        bars: for each piece the length of its bars and the position in a bar where it begins, both in sixteenths.
        voices: their names, in order.
        columns: of the grid.
    """
    if not len(pieces):
        raise InputError("there are no pieces to draw")
    columns = min(columns, len(pieces))
    lines = -(-len(pieces) // columns)
    palette = PALETTE if len(voices) <= len(PALETTE) else MANY
    low = min(int(np.asarray(notes)[:, 3].min()) for notes in pieces) - 2
    high = max(int(np.asarray(notes)[:, 3].max()) for notes in pieces) + 2
    with blank(7.0 * columns + 0.6, 2.9 * lines + 0.5) as figure:
        grid = figure.subplots(lines, columns, squeeze=False).ravel()
        for axes in grid[len(pieces) :]:
            axes.set_axis_off()
        for axes, notes, title, (bar, upbeat) in zip(grid, pieces, titles, bars, strict=False):
            rows = np.asarray(notes)
            end = int((rows[:, 1] + rows[:, 2]).max())
            for pitch in range(low, high + 1):
                if pitch % 12 in SHARP:
                    axes.axhspan(pitch - 0.5, pitch + 0.5, color="#F2F2F2", linewidth=0)
            for voice in range(len(voices)):
                own = rows[rows[:, 0] == voice]
                axes.barh(
                    own[:, 3], own[:, 2] - 0.25, left=own[:, 1], height=0.9,
                    color=palette[voice % len(palette)], linewidth=0,
                )  # fmt: skip
            axes.set_title(title, fontsize=10, loc="left")
            octaves = [pitch for pitch in range(low, high + 1) if pitch % 12 == 0]
            axes.set(xlim=(0, end), ylim=(low, high), yticks=octaves)
            axes.set_yticklabels([f"C{pitch // 12 - 1}" for pitch in octaves])
            first = (bar - upbeat) % bar
            axes.set_xticks(range(first, end, bar), [str(1 + i) for i in range(len(range(first, end, bar)))])
            axes.tick_params(labelsize=8)
        patches = [Patch(color=palette[i % len(palette)], label=name) for i, name in enumerate(voices)]
        figure.legend(handles=patches, loc="outside lower center", ncols=len(voices))
    return figure
