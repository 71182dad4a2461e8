"""Figures of the reports: one style, colours that colour-blind readers tell apart, intervals wherever seeds allow.

Every function returns a matplotlib ``Figure`` and leaves pyplot's state alone: show it in a notebook or give it
to a report's ``Section``. "Rows" are a result's: flat dicts with ``arm``, ``seed`` and what was measured.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import (
    EngFormatter,
    FixedLocator,
    LogFormatter,
    MaxNLocator,
    NullFormatter,
    NullLocator,
    StrMethodFormatter,
)

from jtl.train.result import Row, estimate

# Okabe and Ito, "Color Universal Design" (2008), without the yellow, which white paper swallows.
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000",
)  # fmt: skip
GREY = "#7F7F7F"
PALETTE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK)
# Tol, "Colour Schemes" (2021), muted, and grey: for more classes than the first palette tells apart.
MANY = (
    "#332288", "#DDCC77", "#117733", "#CC6677", "#88CCEE", "#882255", "#44AA99", "#AA4499", "#999933", GREY,
)  # fmt: skip
MARKERS = "osD^vP*X"
MARKER = dict(zip((*PALETTE, GREY), MARKERS, strict=True))  # colour is never the only difference of two arms
# The arms of most reports keep their colour from figure to figure.
ARMS = {
    "full": BLUE, "scratch": VERMILLION, "head": GREEN, "lp_ft": PURPLE, "probe": ORANGE, "lora": SKY, "majority": GREY,
}  # fmt: skip

STYLE: dict[str, Any] = {
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.1,
    "figure.constrained_layout.w_pad": 0.1,
    "font.size": 12,
    "text.parse_math": False,  # a "$" in the name of a class is a dollar
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
    """The figure as the bytes of a PNG file."""
    file = io.BytesIO()
    with _style():
        figure.savefig(file, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    return file.getvalue()


def _style() -> Any:
    # The user's own matplotlib settings must not change a report; the backend is theirs.
    settings: Any = {k: v for k, v in mpl.rcParamsDefault.items() if not k.startswith("backend")} | STYLE
    return mpl.rc_context(settings)


@contextmanager
def _figure(width: float, height: float) -> Iterator[Figure]:
    with _style():
        yield Figure(figsize=(width, height))


def colours(arms: Sequence[str]) -> dict[str, str]:
    """A colour for every arm: the usual arms their own, the others what is left, in order."""
    free = [colour for colour in PALETTE if colour not in {ARMS.get(arm) for arm in arms}] or list(PALETTE)
    others = [arm for arm in arms if arm not in ARMS]
    return {arm: ARMS[arm] if arm in ARMS else free[others.index(arm) % len(free)] for arm in arms}


def _arms(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["arm"] for row in rows))


def _curve(
    rows: Sequence[Row], arm: str, x: str, y: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The arm's x in order, and the mean of y at each with its 95 % interval: x, mean, low, high.

    Low and high are NaN where one seed alone was measured.
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


def learning_curves(rows: Sequence[Row], metric: str = "validation_accuracy", points: int = 100) -> Figure:
    """Training loss and a validation metric over the steps, one line an arm; its band the 95 % interval over seeds.

    Args:
        rows: the histories of ``fit``, each row with its ``arm`` and ``seed`` beside ``step``, ``loss`` (training)
            and, where it was validated, the metric.
        metric: key of the validation metric.
        points: a training loss of more steps than this is averaged in so many windows.
    """
    measured = [
        {"arm": row["arm"], "step": row["step"], metric: row[metric]} for row in rows if metric in row
    ]
    rows = [*_windows(rows, points), *measured]
    with _figure(12.0, 4.2) as figure:
        left, right = figure.subplots(1, 2)
        for arm, colour in colours(_arms(rows)).items():
            for axes, y in ((left, "loss"), (right, metric)):
                x, mean, low, high = _curve(rows, arm, "step", y)
                axes.plot(x, mean, color=colour, marker=MARKER[colour] if len(x) <= 20 else None, label=arm)
                if axes is right:
                    axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        if all(
            row["loss"] > 0 for row in rows if "loss" in row
        ):  # a loss may jump to many times its usual size
            left.set_yscale("log")
            _plain_ticks(left.yaxis)
        ends = [max(row["step"] for row in rows if row["arm"] == arm) for arm in _arms(rows)]
        if max(ends, default=1) > 5 * min(
            ends, default=1
        ):  # an arm of many cheap steps would squeeze the others
            for axes in (left, right):
                axes.set_xscale("log")
                _plain_ticks(axes.xaxis)
        _within_bounds(right, metric)
        left.set(xlabel="optimiser step", ylabel="training loss (nats)", title="Training")
        right.set(xlabel="optimiser step", ylabel=_words(metric), title="Validation")
        figure.legend(*right.get_legend_handles_labels(), loc="outside right center")
    return figure


def _plain_ticks(axis: Any) -> None:
    """Numbers on a logarithmic axis as they are spoken, on the main ticks alone."""
    axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axis.set_minor_formatter(NullFormatter())


def _within_bounds(axes: Any, metric: str) -> None:
    """An accuracy ends at 1, though Student's interval around it may not."""
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
    """A metric against the number of labelled examples (log scale), one line an arm, 95 % intervals over seeds.

    Args:
        rows: with ``arm``, ``seed``, ``size`` and the metric.
        metric: its key, e.g. ``"accuracy"`` or ``"seconds"``.
        label: of the y axis with its unit, e.g. ``"training time (s)"``; left out, the metric's name.
        log_y: a logarithmic y axis, for times.
        size: the key of the number of examples.
    """
    figure = _over(rows, size, "labelled training examples", metric, label, "{x:,.0f}")
    if log_y:
        (axes,) = figure.axes
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
    return figure


def over_rates(rows: Sequence[Row], metric: str, label: str | None = None) -> Figure:
    """A metric against the ``learning_rate``, as ``over_sizes`` against the number of examples."""
    return _over(rows, "learning_rate", "peak learning rate", metric, label, "{x:.2g}")


def over_weights(rows: Sequence[Row], metric: str, label: str | None = None) -> Figure:
    """A metric against the ``weight`` of a mixture, from 0 to 1, as ``over_sizes`` against the number of examples."""
    return _over(rows, "weight", "weight", metric, label, "{x:.1f}", log_x=False)


def over_tasks(rows: Sequence[Row], metric: str, label: str | None = None) -> Figure:
    """A metric against the number of ``tasks`` learned, as ``over_sizes`` against the number of examples."""
    return _over(rows, "tasks", "tasks learned", metric, label, "{x:.0f}", log_x=False)


def over_steps(rows: Sequence[Row], metric: str, label: str | None = None) -> Figure:
    """A metric that training reports at every step, one line an arm, the mean over seeds."""
    rows = [row for row in rows if metric in row]
    with _figure(7.5, 4.0) as figure:
        axes = figure.subplots()
        for arm, colour in colours(_arms(rows)).items():
            x, mean, _, _ = _curve(rows, arm, "step", metric)
            axes.plot(x, mean, color=colour, label=arm)
        axes.set(xlabel="optimiser step", ylabel=label or _words(metric))
        figure.legend(loc="outside right center")
    return figure


def over_parameters(rows: Sequence[Row], metric: str, label: str | None = None) -> Figure:
    """A line an arm, the best on top: a metric with its 95 % interval, and the number of trained parameters."""
    found = {arm: _curve(rows, arm, "trained_parameters", metric) for arm in _arms(rows)}
    arms = sorted(found, key=lambda arm: found[arm][1][-1])
    with _figure(8.5, 1.6 + 0.34 * len(arms)) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        right.set_xscale("log")
        for place, (arm, colour) in enumerate(colours(arms).items()):
            x, mean, low, _ = found[arm]
            look = {"color": colour, "marker": MARKER[colour], "linestyle": "none"}
            left.errorbar(mean[-1], place, xerr=mean[-1] - low[-1], capsize=4, elinewidth=1.5, **look)
            right.plot(x[-1], place, **look)
        left.set_yticks(range(len(arms)), arms)
        _plain_ticks(right.xaxis)
        left.set(xlabel=label or _words(metric))
        right.set(xlabel="trained parameters")
    return figure


def _over(
    rows: Sequence[Row], at: str, words: str, metric: str, label: str | None, ticks: str, log_x: bool = True
) -> Figure:
    arms = [arm for arm in _arms(rows) if any(row["arm"] == arm and metric in row for row in rows)]
    places = sorted({row[at] for row in rows if row.get(at) is not None})
    if not arms or not places:
        raise ValueError(f"no row has both {at!r} and {metric!r}")
    with _figure(7.5, 4.8) as figure:
        axes = figure.subplots()
        axes.set_xscale("log" if log_x else "linear")
        for i, (arm, colour) in enumerate(colours(arms).items()):
            x, mean, low, _ = _curve(rows, arm, at, metric)
            # A slight shift keeps the bars of two arms apart.
            x = x * 1.03 ** (i - (len(arms) - 1) / 2) if log_x else x
            axes.errorbar(
                x, mean, mean - low, color=colour, marker=MARKER[colour], capsize=4,
                elinewidth=1.5, label=arm, linestyle="--" if arm == "majority" else "-",
            )  # fmt: skip
        axes.xaxis.set_major_locator(FixedLocator(places))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter(ticks))
        _within_bounds(axes, metric)
        axes.set(xlabel=words, ylabel=label or _words(metric))
        figure.legend(loc="outside right center")
    return figure


def gap_bars(
    rows: Sequence[Row], train: str = "train_accuracy", test: str = "accuracy", size: str = "size"
) -> Figure:
    """Train minus test of every arm (overfitting), with 95 % intervals over seeds; grouped by size if rows have one."""
    measured = [
        {**row, "gap": row[train] - row[test], size: row.get(size, 0)} for row in rows if train in row
    ]
    if not measured:
        raise ValueError(f"no row has {train!r}")
    arms, sizes = _arms(measured), sorted({row[size] for row in measured})
    width = 0.8 / len(arms)
    with _figure(max(6.0, 1.5 + 0.45 * len(arms) * len(sizes)), 4.5) as figure:
        axes = figure.subplots()
        axes.grid(axis="x", visible=False)
        axes.axhline(0.0, color="black", linewidth=1)
        for i, (arm, colour) in enumerate(colours(arms).items()):
            x, mean, low, _ = _curve(measured, arm, size, "gap")
            at = np.array([sizes.index(value) for value in x]) + width * (i - (len(arms) - 1) / 2)
            axes.bar(
                at, mean, 0.9 * width, yerr=mean - low, color=colour, capsize=3, label=arm,
                error_kw={"elinewidth": 1.5},
            )  # fmt: skip
        axes.set(ylabel=f"{_words(train)} − test {_words(test)}")
        if len(sizes) > 1:
            axes.set_xticks(range(len(sizes)), [f"{value:,}" for value in sizes])
            axes.set_xlabel("labelled training examples")
            figure.legend(loc="outside right center")
        else:
            axes.set_xticks([width * (i - (len(arms) - 1) / 2) for i in range(len(arms))], arms)
    return figure


def trade_off(rows: Sequence[Row], metric: str, costs: Mapping[str, str]) -> Figure:
    """A metric with its 95 % interval over seeds against each cost: a point an arm.

    Args:
        rows: with ``arm``, ``seed``, the metric and the costs.
        metric: its key.
        costs: the label of each cost's axis, by its key.
    """
    with _figure(4.0 * len(costs) + 2.0, 4.5) as figure:
        panels = np.atleast_1d(figure.subplots(1, len(costs), sharey=True))
        for axes, (cost, label) in zip(panels, costs.items(), strict=True):
            for arm, colour in colours(_arms(rows)).items():
                x, mean, low, _ = _curve(rows, arm, cost, metric)
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
        panels[0].set(ylabel=_words(metric))
        figure.legend(loc="outside right center")
    return figure


def reliability(found: Mapping[str, tuple[Any, Any]], bins: int = 10) -> Figure:
    """Accuracy against confidence in bins of equal width (Guo et al. 2017, 1706.04599), one line an arm.

    Args:
        found: (logits (N, C), labels (N,)) of each arm.
        bins: how many; those of fewer than ten rows are left out.
    """
    with _figure(6.5, 4.5) as figure:
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color="black", linewidth=1)
        for arm, colour in colours(list(found)).items():
            logits, labels = (np.asarray(x) for x in found[arm])
            shifted = np.exp(logits - logits.max(-1, keepdims=True))
            sure = (shifted / shifted.sum(-1, keepdims=True)).max(-1)
            hit = logits.argmax(-1) == labels
            place = np.minimum((sure * bins).astype(int), bins - 1)
            kept = [b for b in range(bins) if (place == b).sum() >= 10]
            axes.plot(
                [sure[place == b].mean() for b in kept], [hit[place == b].mean() for b in kept],
                color=colour, marker=MARKER[colour], label=arm,
            )  # fmt: skip
        axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
        figure.legend(loc="outside right center")
    return figure


def confusion(true: Any, predicted: Any, classes: Sequence[str]) -> Figure:
    """Counts of predicted against true class; the shade is the share of the true class.

    Args:
        true: labels (N,).
        predicted: labels (N,).
        classes: C names.
    """
    counts = np.zeros((len(classes), len(classes)), int)
    np.add.at(counts, (np.asarray(true), np.asarray(predicted)), 1)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(12.0, 3.2 + 0.48 * len(classes))
    with _figure(side + 1.2, side) as figure:
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
    """Matrices of shares or accuracies side by side, each cell with its value; NaN is left white.

    Args:
        panels: by title of the panel, values in [0, 1], (R, C).
        rows: R names.
        columns: C names.
        label: of the colour, with its unit.
        across: what the columns are.
        down: what the rows are.
    """
    per_line = min(3, len(panels))
    lines = -(-len(panels) // per_line)
    wide, high = 2.0 + 0.62 * len(columns), 1.4 + 0.5 * len(rows)
    with _figure(max(5.0, wide * per_line + 1.2), max(2.6, high * lines)) as figure:
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


def embeddings(features: Mapping[str, Any], labels: Any, classes: Sequence[str], limit: int = 2000) -> Figure:
    """The first two principal components of features, one panel a set: ``{"before": (N, D), "after": (N, D)}``.

    Args:
        features: by title of the panel; every panel has axes of its own.
        labels: (N,).
        classes: C names.
        limit: rows drawn at most; the components are those of all rows.
    """
    labels = np.asarray(labels)
    palette = PALETTE if len(classes) <= len(PALETTE) else MANY
    drawn = np.random.default_rng(0).permutation(len(labels))[:limit]
    with _figure(5.2 * len(features) + 1.2, 4.8) as figure:
        panels = figure.subplots(1, len(features), squeeze=False)[0]
        for axes, (title, matrix) in zip(panels, features.items(), strict=True):
            points, shares = principal_components(matrix)
            for c in range(len(classes)):
                own = drawn[labels[drawn] == c]
                look = {"color": palette[c % len(palette)], "marker": MARKERS[c % len(MARKERS)]}
                axes.scatter(*points[own].T, s=16, alpha=0.7, linewidth=0, label=classes[c], **look)
            axes.set(title=title, xlabel=f"component 1 ({shares[0]:.1%} of variance)",
                     ylabel=f"component 2 ({shares[1]:.1%})", xticks=[], yticks=[])  # fmt: skip
        handles, names = panels[0].get_legend_handles_labels()
        legend = figure.legend(
            handles,
            names,
            loc="outside right center",
            markerscale=1.8,
            fontsize=11 if len(classes) <= 12 else 9,
        )
        for handle in filter(None, legend.legend_handles):
            handle.set_alpha(1.0)
    return figure


def principal_components(features: Any) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the first two principal components (N, 2) and their shares of the variance (2,)."""
    matrix = np.asarray(features, np.float64)
    matrix = matrix - matrix.mean(0)
    left, singular, _ = np.linalg.svd(matrix, full_matrices=False)
    return left[:, :2] * singular[:2], (singular**2 / np.sum(singular**2))[:2]


def images(pictures: Any, true: Sequence[str], predicted: Sequence[str], columns: int = 6) -> Figure:
    """A grid of images with their true and predicted names; the wrong ones in vermillion.

    Args:
        pictures: (N, H, W), (N, H, W, 1) or (N, H, W, 3) in [0, 1] or [0, 255], not normalised for a model; or a
            sequence of N such images of different sizes.
        true: N names.
        predicted: N names.
        columns: of the grid.
    """
    if not len(pictures):
        raise ValueError("there are no images to draw")
    columns = min(columns, len(pictures))
    lines = -(-len(pictures) // columns)
    with _figure(2.1 * columns, 2.55 * lines) as figure:
        grid = figure.subplots(lines, columns, squeeze=False).ravel()
        for axes in grid:
            axes.set_axis_off()
        for axes, picture, label, guess in zip(grid, pictures, true, predicted, strict=False):
            picture = np.asarray(picture)
            picture = picture if picture.dtype == np.uint8 or picture.max() <= 1 else picture / 255
            axes.imshow(np.squeeze(picture), cmap="gray")
            axes.set_title(f"true: {_short(label)}\npredicted: {_short(guess)}", fontsize=10, loc="left",
                           color=BLACK if label == guess else VERMILLION)  # fmt: skip
    return figure


def score_scatter(
    scores: Any,
    accuracies: Any,
    names: Sequence[str],
    score: str,
    tau: float,
) -> Figure:
    """Accuracy after fine-tuning against a transferability score, with their rank correlation in the title.

    Args:
        scores: one a candidate model.
        accuracies: one a candidate model.
        names: of the candidates.
        score: name of the score.
        tau: their weighted rank correlation, see ``jtl.features.scores.weighted_tau``.
    """
    with _figure(6.5, 4.8) as figure:
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


def _words(name: str) -> str:
    return name.replace("_", " ")


def _short(name: str, length: int = 18) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


__all__ = [
    "colours",
    "confusion",
    "embeddings",
    "gap_bars",
    "heatmaps",
    "images",
    "learning_curves",
    "over_parameters",
    "over_rates",
    "over_sizes",
    "over_tasks",
    "over_weights",
    "png",
    "principal_components",
    "score_scatter",
]
