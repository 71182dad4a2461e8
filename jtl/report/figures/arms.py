"""Comparisons of arms: their scores, costs and overfitting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from jtl.errors import InputError
from jtl.report.figures.style import BLUE, MARKER, arms_of, blank, colours, curve, plain_ticks, spoken
from jtl.report.result import Row


def over_parameters(rows: Sequence[Row], metric: str, label: str | None = None) -> Figure:
    """Plot a metric with its 95 % interval and the number of trained parameters, one line per arm, the best on top.

    Args:
        rows: with ``arm``, ``seed``, ``trained_parameters`` and the metric.
        metric: its key.
        label: of its axis; by default the metric's name.
    """
    found = {arm: curve(rows, arm, "trained_parameters", metric) for arm in arms_of(rows)}
    arms = sorted(found, key=lambda arm: found[arm][1][-1])
    with blank(8.5, 1.6 + 0.34 * len(arms)) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        right.set_xscale("log")
        for place, (arm, colour) in enumerate(colours(arms).items()):
            x, mean, low, _ = found[arm]
            look = {"color": colour, "marker": MARKER[colour], "linestyle": "none"}
            left.errorbar(mean[-1], place, xerr=mean[-1] - low[-1], capsize=4, elinewidth=1.5, **look)
            right.plot(x[-1], place, **look)
        left.set_yticks(range(len(arms)), arms)
        plain_ticks(right.xaxis)
        left.set(xlabel=label or spoken(metric))
        right.set(xlabel="trained parameters")
    return figure


def gap_bars(
    rows: Sequence[Row], train: str = "train_accuracy", test: str = "accuracy", size: str = "size"
) -> Figure:
    """Plot train minus test score (overfitting) of every arm with 95 % intervals over seeds, grouped by size if there.

    Args:
        rows: with ``arm``, ``seed`` and both scores; rows without the training score are ignored.
        train: key of the training score.
        test: key of the test score.
        size: key of the number of training examples.

    Raises:
        ValueError: no row has the training score.
    """
    measured = [
        {**row, "gap": row[train] - row[test], size: row.get(size, 0)} for row in rows if train in row
    ]
    if not measured:
        raise InputError(f"no row has {train!r}")
    arms, sizes = arms_of(measured), sorted({row[size] for row in measured})
    width = 0.8 / len(arms)
    with blank(max(6.0, 1.5 + 0.45 * len(arms) * len(sizes)), 4.5) as figure:
        axes = figure.subplots()
        axes.grid(axis="x", visible=False)
        axes.axhline(0.0, color="black", linewidth=1)
        for i, (arm, colour) in enumerate(colours(arms).items()):
            x, mean, low, _ = curve(measured, arm, size, "gap")
            at = np.array([sizes.index(value) for value in x]) + width * (i - (len(arms) - 1) / 2)
            axes.bar(
                at, mean, 0.9 * width, yerr=mean - low, color=colour, capsize=3, label=arm,
                error_kw={"elinewidth": 1.5},
            )  # fmt: skip
        axes.set(ylabel=f"{spoken(train)} − test {spoken(test)}")
        if len(sizes) > 1:
            axes.set_xticks(range(len(sizes)), [f"{value:,}" for value in sizes])
            axes.set_xlabel("labelled training examples")
            figure.legend(loc="outside right center")
        else:
            axes.set_xticks([width * (i - (len(arms) - 1) / 2) for i in range(len(arms))], arms)
    return figure


def trade_off(rows: Sequence[Row], metric: str, costs: Mapping[str, str]) -> Figure:
    """Plot a metric with its 95 % interval over seeds against each cost, one point per arm.

    Args:
        rows: with ``arm``, ``seed``, the metric and the costs.
        metric: its key.
        costs: the axis label of each cost, by its key.
    """
    with blank(4.0 * len(costs) + 2.0, 4.5) as figure:
        panels = np.atleast_1d(figure.subplots(1, len(costs), sharey=True))
        for axes, (cost, label) in zip(panels, costs.items(), strict=True):
            for arm, colour in colours(arms_of(rows)).items():
                x, mean, low, _ = curve(rows, arm, cost, metric)
                name = arm if axes is panels[0] else None
                axes.errorbar(
                    x,
                    mean,
                    mean - low,
                    color=colour,
                    marker=MARKER[colour],
                    capsize=3,
                    linestyle="none",
                    label=name,
                )
            axes.set(xlabel=label)
            axes.set_xlim(0, 1.05 * axes.get_xlim()[1])
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.xaxis.set_major_formatter(EngFormatter())
        panels[0].set(ylabel=spoken(metric))
        figure.legend(loc="outside right center")
    return figure


def score_scatter(
    scores: Any,
    accuracies: Any,
    names: Sequence[str],
    score: str,
    tau: float,
) -> Figure:
    """Plot accuracy after fine-tuning against a transferability score, with their rank correlation in the title.

    Args:
        scores: one per candidate model.
        accuracies: one per candidate model.
        names: of the candidates.
        score: name of the score.
        tau: their weighted rank correlation, see ``jtl.features.scores.weighted_tau``.
    """
    with blank(6.5, 4.8) as figure:
        axes = figure.subplots()
        axes.scatter(scores, accuracies, s=70, color=BLUE, zorder=3)
        middle = (min(scores) + max(scores)) / 2
        for x, y, name in zip(scores, accuracies, names, strict=True):
            left = x > middle
            axes.annotate(name, (x, y), xytext=(-9 if left else 9, 0), textcoords="offset points", va="center",
                          ha="right" if left else "left", fontsize=11)  # fmt: skip
        axes.margins(0.1)
        axes.set(xlabel=score, ylabel="accuracy after fine-tuning", title=f"{score}: weighted τ = {tau:.2f}")
    return figure
