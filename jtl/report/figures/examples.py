"""Single examples: images with predictions, 2-D projections of features, calibration, and attributions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure

from jtl.errors import InputError
from jtl.report.figures.style import BLACK, BLUE, MANY, MARKER, MARKERS, PALETTE, VERMILLION, blank, colours


def reliability(found: Mapping[str, tuple[Any, Any]], bins: int = 10) -> Figure:
    """Plot accuracy against confidence in bins of equal width, one line per arm.

    A reliability diagram: Guo et al. 2017, "On Calibration of Modern Neural Networks",
    https://arxiv.org/abs/1706.04599.

    Args:
        found: (logits (N, C), labels (N,)) of each arm.
        bins: number of bins; those with fewer than ten rows are left out.
    """
    with blank(6.5, 4.5) as figure:
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


def embeddings(features: Mapping[str, Any], labels: Any, classes: Sequence[str], limit: int = 2000) -> Figure:
    """Plot the first two principal components of features, one panel per set: ``{"before": (N, D), "after": (N, D)}``.

    Args:
        features: by panel title; every panel has its own axes.
        labels: (N,).
        classes: C names.
        limit: maximum number of rows drawn; the components are those of all rows.
    """
    labels = np.asarray(labels)
    palette = PALETTE if len(classes) <= len(PALETTE) else MANY
    drawn = np.random.default_rng(0).permutation(len(labels))[:limit]
    with blank(5.2 * len(features) + 1.2, 4.8) as figure:
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
    """Return the scores of the first two principal components (N, 2) and their shares of the variance (2,)."""
    matrix = np.asarray(features, np.float64)
    matrix = matrix - matrix.mean(0)
    left, singular, _ = np.linalg.svd(matrix, full_matrices=False)
    return left[:, :2] * singular[:2], (singular**2 / np.sum(singular**2))[:2]


def images(pictures: Any, true: Sequence[str], predicted: Sequence[str], columns: int = 6) -> Figure:
    """Plot a grid of images with their true and predicted class names, the wrong ones in vermillion.

    Args:
        pictures: (N, H, W), (N, H, W, 1) or (N, H, W, 3) in [0, 1] or [0, 255], not normalised for a model; or a
            sequence of N such images of different sizes.
        true: N names.
        predicted: N names.
        columns: of the grid.
    """
    if not len(pictures):
        raise InputError("there are no images to draw")
    columns = min(columns, len(pictures))
    lines = -(-len(pictures) // columns)
    with blank(2.1 * columns, 2.55 * lines) as figure:
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


def strips(rows: Mapping[str, Any], columns: int = 10, gap: int = 1) -> Figure:
    """Plot small images side by side without titles: for each name its images, on as many lines as needed.

    Args:
        rows: images (N, H, W, 1) or (N, H, W, 3) by name, uint8 or in [0, 1], all of the same H and W.
        columns: images per line.
        gap: pixels between two images.
    """
    if not rows:
        raise InputError("there are no images to draw")
    lines = {name: -(-len(own) // columns) for name, own in rows.items()}
    with blank(1.6 + 0.62 * columns, 0.62 * sum(lines.values()) + 0.1 * len(rows)) as figure:
        panels = figure.subplots(len(rows), 1, squeeze=False, height_ratios=list(lines.values()))[:, 0]
        for axes, (name, own) in zip(panels, rows.items(), strict=True):
            pictures = np.asarray(own)
            pictures = pictures / 255 if pictures.dtype == np.uint8 else pictures
            pictures = np.broadcast_to(pictures, (*pictures.shape[:3], 3))
            height, width = np.array(pictures.shape[1:3]) + gap
            sheet = np.ones((lines[name] * height - gap, columns * width - gap, 3))
            for i, picture in enumerate(pictures):
                top, left = i // columns * height, i % columns * width
                sheet[top : top + height - gap, left : left + width - gap] = picture
            axes.imshow(sheet, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.grid(False)
            axes.spines[:].set_visible(False)
            axes.set_ylabel(name, rotation=0, ha="right", va="center")
    return figure


def attributed(
    words: Sequence[Sequence[str]],
    scores: Sequence[Sequence[float]],
    titles: Sequence[str],
    width: float = 9.0,
) -> Figure:
    """Plot texts whose words are shaded by score: blue above 0, vermillion below, darkest for a text's largest score.

    Args:
        words: of each text.
        scores: one per word.
        titles: one per text.
        width: of the figure in inches.
    """
    if not len(words):
        raise InputError("there are no texts to draw")
    line, gap, size = 0.3, 0.06, 10.5
    with blank(width, 1.0) as figure:
        figure.set_layout_engine("none")
        renderer = FigureCanvasAgg(figure).get_renderer()

        def inches(word: str) -> float:
            text = figure.text(0, 0, word, fontsize=size)
            extent = text.get_window_extent(renderer).width / figure.dpi
            text.remove()
            return extent

        placed: list[tuple[float, float, str, float | None]] = []
        top = 0.1
        for title, own, score in zip(titles, words, scores, strict=True):
            placed.append((0.1, top, title, None))
            x, top = 0.1, top + line
            most = max(map(abs, score), default=0.0) or 1.0
            for word, value in zip(own, score, strict=True):
                extent = inches(word)
                if x > 0.1 and x + extent > width - 0.1:
                    x, top = 0.1, top + line
                placed.append((x, top, word, value / most))
                x += extent + gap
            top += 1.7 * line
        figure.set_size_inches(width, top)
        for x, y, word, share in placed:
            colour = "none" if share is None else to_rgba(BLUE if share > 0 else VERMILLION, 0.6 * abs(share))
            figure.text(
                x / width, 1 - y / top, word, fontsize=size, va="top", weight="bold" if share is None else None,
                bbox={"facecolor": colour, "edgecolor": "none", "boxstyle": "square,pad=0.12"},
            )  # fmt: skip
    return figure


def saliency(pictures: Sequence[Any], maps: Sequence[Any], titles: Sequence[str], columns: int = 6) -> Figure:
    """Plot images, and below each the same image under its attribution map: blue above 0, vermillion below.

    Args:
        pictures: N images, as for ``images``.
        maps: N maps (h, w) of any resolution, resized to the image; the largest absolute value of each is darkest.
        titles: one per image.
        columns: of the grid.
    """
    if not len(pictures):
        raise InputError("there are no images to draw")
    shades = LinearSegmentedColormap.from_list(
        "leans", [to_rgba(VERMILLION), to_rgba("white"), to_rgba(BLUE)]
    )
    columns = min(columns, len(pictures))
    lines = -(-len(pictures) // columns)
    with blank(2.1 * columns, 4.4 * lines) as figure:
        grid = figure.subplots(2 * lines, columns, squeeze=False)
        for axes in grid.ravel():
            axes.set_axis_off()
        for i, (picture, own, title) in enumerate(zip(pictures, maps, titles, strict=True)):
            top, below = grid[2 * (i // columns), i % columns], grid[2 * (i // columns) + 1, i % columns]
            picture, own = np.squeeze(np.asarray(picture)), np.asarray(own)
            extent = (0, picture.shape[1], picture.shape[0], 0)
            most = float(np.abs(own).max()) or 1.0
            for axes in (top, below):
                axes.imshow(picture, cmap="gray", extent=extent)
            below.imshow(
                own, cmap=shades, vmin=-most, vmax=most, alpha=0.6, extent=extent, interpolation="bilinear"
            )
            top.set_title(title, fontsize=10, loc="left")
    return figure


def _short(name: str, length: int = 18) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
