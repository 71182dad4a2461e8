"""Curves of a metric, one line per arm: over training steps, labelled examples, learning rates, weights or tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogFormatter, NullLocator, StrMethodFormatter

from jtl.errors import InputError
from jtl.report.figures.style import MARKER, arms_of, blank, colours, curve, plain_ticks, spoken
from jtl.report.result import Row


def learning_curves(
    rows: Sequence[Row],
    metric: str = "validation_accuracy",
    points: int = 100,
    loss: str = "training loss (nats)",
) -> Figure:
    """Plot training loss and a validation metric over the steps, one line per arm with its 95 % interval over seeds.

    Args:
        rows: the histories of ``fit``, each row with its ``arm`` and ``seed`` beside ``step``, ``loss`` (training) and,
            where it was validated, the metric.
        metric: key of the validation metric.
        points: a training loss with more steps than this is averaged in this many windows.
        loss: label of the loss.
    """
    measured = [
        {"arm": row["arm"], "step": row["step"], metric: row[metric]} for row in rows if metric in row
    ]
    rows = [*_windows(rows, points), *measured]
    with blank(12.0, 4.2) as figure:
        left, right = figure.subplots(1, 2)
        for arm, colour in colours(arms_of(rows)).items():
            for axes, y in ((left, "loss"), (right, metric)):
                x, mean, low, high = curve(rows, arm, "step", y)
                axes.plot(x, mean, color=colour, marker=MARKER[colour] if len(x) <= 20 else None, label=arm)
                if axes is right:
                    axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        if all(
            row["loss"] > 0 for row in rows if "loss" in row
        ):  # a loss may jump to many times its usual value
            left.set_yscale("log")
            plain_ticks(left.yaxis)
        ends = [max(row["step"] for row in rows if row["arm"] == arm) for arm in arms_of(rows)]
        if max(ends, default=1) > 5 * min(
            ends, default=1
        ):  # an arm of many cheap steps would squeeze the others
            for axes in (left, right):
                axes.set_xscale("log")
                plain_ticks(axes.xaxis)
        _within_bounds(right, metric)
        left.set(xlabel="optimiser step", ylabel=loss, title="Training")
        right.set(xlabel="optimiser step", ylabel=spoken(metric), title="Validation")
        figure.legend(*right.get_legend_handles_labels(), loc="outside right center")
    return figure


def _within_bounds(axes: Any, metric: str) -> None:
    """Clip the axis of an accuracy to [0, 1], which Student's interval may exceed."""
    if "accuracy" in metric:
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, 0.0), min(high, 1.0))


def _windows(rows: Sequence[Row], count: int) -> list[dict[str, Any]]:
    """The training losses, averaged within each seed over ``count`` windows of steps if there are more steps."""
    rows = [row for row in rows if "loss" in row]
    steps = np.unique([row["step"] for row in rows])
    if len(steps) <= count:
        return [{"arm": row["arm"], "step": row["step"], "loss": row["loss"]} for row in rows]
    window = {step: part for part, own in enumerate(np.array_split(steps, count)) for step in own}
    centre = [own.mean() for own in np.array_split(steps, count)]
    groups: dict[tuple, list[float]] = {}
    for row in rows:
        groups.setdefault((row["arm"], row.get("seed"), window[row["step"]]), []).append(row["loss"])
    return [
        {"arm": arm, "step": centre[part], "loss": np.mean(own)} for (arm, _, part), own in groups.items()
    ]


def over_sizes(
    rows: Sequence[Row], metric: str, label: str | None = None, log_y: bool = False, size: str = "size"
) -> Figure:
    """Plot a metric against the number of labelled examples (log scale), one line per arm, 95 % intervals over seeds.

    Args:
        rows: with ``arm``, ``seed``, ``size`` and the metric.
        metric: its key, such as ``"accuracy"`` or ``"seconds"``.
        label: of the y axis with its unit, such as ``"training time (s)"``; by default the metric's name.
        log_y: whether the y axis is logarithmic, for times.
        size: key of the number of examples.
    """
    figure = _over(rows, size, "labelled training examples", metric, label, "{x:,.0f}")
    if log_y:
        (axes,) = figure.axes
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
    return figure


def over_rates(rows: Sequence[Row], metric: str, label: str | None = None) -> Figure:
    """Plot a metric against the ``learning_rate``, like ``over_sizes``."""
    return _over(rows, "learning_rate", "peak learning rate", metric, label, "{x:.2g}")


def over_weights(rows: Sequence[Row], metric: str, label: str | None = None) -> Figure:
    """Plot a metric against the ``weight`` of a mixture, from 0 to 1, like ``over_sizes``."""
    return _over(rows, "weight", "weight", metric, label, "{x:.1f}", log_x=False)


def over_tasks(rows: Sequence[Row], metric: str, label: str | None = None) -> Figure:
    """Plot a metric against the number of ``tasks`` learned, like ``over_sizes``."""
    return _over(rows, "tasks", "tasks learned", metric, label, "{x:.0f}", log_x=False)


def over_steps(rows: Sequence[Row], metric: str, label: str | None = None) -> Figure:
    """Plot a metric that training reports at every step, one line per arm, as the mean over seeds."""
    rows = [row for row in rows if metric in row]
    with blank(7.5, 4.0) as figure:
        axes = figure.subplots()
        for arm, colour in colours(arms_of(rows)).items():
            x, mean, _, _ = curve(rows, arm, "step", metric)
            axes.plot(x, mean, color=colour, label=arm)
        axes.set(xlabel="optimiser step", ylabel=label or spoken(metric))
        figure.legend(loc="outside right center")
    return figure


def _over(
    rows: Sequence[Row], at: str, words: str, metric: str, label: str | None, ticks: str, log_x: bool = True
) -> Figure:
    arms = [arm for arm in arms_of(rows) if any(row["arm"] == arm and metric in row for row in rows)]
    places = sorted({row[at] for row in rows if row.get(at) is not None})
    if not arms or not places:
        raise InputError(f"no row has both {at!r} and {metric!r}")
    with blank(7.5, 4.8) as figure:
        axes = figure.subplots()
        axes.set_xscale("log" if log_x else "linear")
        for i, (arm, colour) in enumerate(colours(arms).items()):
            x, mean, low, _ = curve(rows, arm, at, metric)
            # A slight shift keeps the error bars of the arms apart.
            x = x * 1.03 ** (i - (len(arms) - 1) / 2) if log_x else x
            axes.errorbar(
                x, mean, mean - low, color=colour, marker=MARKER[colour], capsize=4,
                elinewidth=1.5, label=arm, linestyle="--" if arm == "majority" else "-",
            )  # fmt: skip
        axes.xaxis.set_major_locator(FixedLocator(places))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter(ticks))
        _within_bounds(axes, metric)
        axes.set(xlabel=words, ylabel=label or spoken(metric))
        figure.legend(loc="outside right center")
    return figure
