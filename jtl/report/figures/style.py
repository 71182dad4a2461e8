"""The style that all figures share, and their common helpers."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from jtl.report.result import Row, estimate

# Okabe and Ito, "Color Universal Design" (2008), without yellow, which is hard to see on white.
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000",
)  # fmt: skip
GREY = "#7F7F7F"
PALETTE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK)
# Tol, "Colour Schemes" (2021), muted, and grey: for more classes than the first palette has colours.
MANY = (
    "#332288", "#DDCC77", "#117733", "#CC6677", "#88CCEE", "#882255", "#44AA99", "#AA4499", "#999933", GREY,
)  # fmt: skip
MARKERS = "osD^vP*X"
MARKER = dict(zip((*PALETTE, GREY), MARKERS, strict=True))  # colour is never the only difference between arms
# The usual arms have the same colour in every figure.
ARMS = {
    "full": BLUE, "scratch": VERMILLION, "head": GREEN, "lp_ft": PURPLE, "probe": ORANGE, "lora": SKY, "majority": GREY,
}  # fmt: skip

STYLE: dict[str, Any] = {
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.1,
    "figure.constrained_layout.w_pad": 0.1,
    "font.size": 12,
    "text.parse_math": False,  # a "$" in a class name is a dollar sign
    "axes.titlesize": 13,
    "axes.labelsize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "lines.linewidth": 2.0,
    "lines.markersize": 7.0,
    "legend.frameon": False,
    "legend.fontsize": 11,
}


def png(figure: Figure) -> bytes:
    """Return the figure as the bytes of a PNG file."""
    file = io.BytesIO()
    with style():
        figure.savefig(file, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    return file.getvalue()


def style() -> Any:
    """Return the matplotlib context in which figures are made and written."""
    # The user's matplotlib settings must not change a report, except for the backend.
    settings: Any = {k: v for k, v in mpl.rcParamsDefault.items() if not k.startswith("backend")} | STYLE
    return mpl.rc_context(settings)


@contextmanager
def blank(width: float, height: float) -> Iterator[Figure]:
    """Yield an empty figure of this size in inches, inside the style."""
    with style():
        yield Figure(figsize=(width, height))


def colours(arms: Sequence[str]) -> dict[str, str]:
    """Assign a colour to every arm: the usual arms have their own, the others get the rest in order."""
    free = [colour for colour in PALETTE if colour not in {ARMS.get(arm) for arm in arms}] or list(PALETTE)
    others = [arm for arm in arms if arm not in ARMS]
    return {arm: ARMS[arm] if arm in ARMS else free[others.index(arm) % len(free)] for arm in arms}


def arms_of(rows: Sequence[Row]) -> list[str]:
    """Return the arms of the rows in order of appearance."""
    return list(dict.fromkeys(row["arm"] for row in rows))


def curve(
    rows: Sequence[Row], arm: str, x: str, y: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return an arm's x in order, and at each the mean of y with its 95 % interval: x, mean, low, high.

    Low and high are NaN where there is only one seed.

    Args:
        rows: flat dicts, see ``Result``.
        arm: whose rows to take.
        x: key of the horizontal axis.
        y: key of the metric.
    """
    groups: dict[Any, list[float]] = {}
    for row in rows:
        if row["arm"] == arm and row.get(x) is not None and y in row:
            groups.setdefault(row[x], []).append(row[y])
    at = sorted(groups)
    found = [estimate(groups[value]) for value in at]
    mean = np.array([np.nan if own["mean"] is None else own["mean"] for own in found])
    half = np.array([np.nan if own["ci95"] is None else own["ci95"] for own in found])
    return np.array(at, dtype=float), mean, mean - half, mean + half


def plain_ticks(axis: Any) -> None:
    """Write the numbers of a logarithmic axis in plain notation, on the major ticks only."""
    axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axis.set_minor_formatter(NullFormatter())


def spoken(name: str) -> str:
    """Return the name of a metric as a label."""
    return name.replace("_", " ")
