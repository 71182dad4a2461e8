"""Images with detected bounding boxes or segmentation masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from jtl.errors import InputError
from jtl.report.figures.style import BLACK, MANY, ORANGE, PALETTE, blank


def boxes(
    pictures: Sequence[Any],
    found: Sequence[Any],
    names: Sequence[Sequence[str]],
    true: Sequence[Any] | None = None,
    columns: int = 4,
) -> Figure:
    """Plot a grid of images with bounding boxes: detections in orange with their names, true boxes in dashed white.

    Args:
        pictures: N images, (H, W, 1) or (H, W, 3), uint8 or in [0, 1].
        found: boxes (n, 4) of each image: left, top, right and bottom in pixels.
        names: n names for each image, such as "7 (0.92)".
        true: boxes (m, 4) of each image; None if unknown.
        columns: of the grid.
    """
    if not len(pictures):
        raise InputError("there are no images to draw")
    columns = min(columns, len(pictures))
    with blank(3.0 * columns, 3.0 * -(-len(pictures) // columns)) as figure:
        grid = figure.subplots(-(-len(pictures) // columns), columns, squeeze=False).ravel()
        for axes in grid:
            axes.set_axis_off()
        for i, (axes, picture) in enumerate(zip(grid, pictures, strict=False)):
            axes.imshow(np.squeeze(np.asarray(picture)), cmap="gray")
            for box in [] if true is None else np.asarray(true[i]):
                axes.add_patch(_rectangle(box, edgecolor="black", linewidth=2.4))
                axes.add_patch(_rectangle(box, edgecolor="white", linewidth=1.4, linestyle=(0, (3, 2))))
            for box, name in zip(np.asarray(found[i]), names[i], strict=True):
                axes.add_patch(_rectangle(box, edgecolor=ORANGE, linewidth=1.8))
                axes.text(
                    box[0], box[1], name, fontsize=8.5, va="bottom", color="black", clip_on=True,
                    bbox={"facecolor": ORANGE, "edgecolor": "none", "boxstyle": "square,pad=0.1", "alpha": 0.85},
                )  # fmt: skip
    return figure


def _rectangle(box: Any, **style: Any) -> Rectangle:
    left, top, right, bottom = map(float, box)
    # In matplotlib images whole numbers are the centres of pixels, in boxes their edges.
    return Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False, **style)


def masks(
    pictures: Sequence[Any],
    rows: Mapping[str, Sequence[Any]],
    classes: Sequence[str],
    clear: int | None = 0,
) -> Figure:
    """Plot one column per image: the image, and below it a pale grey copy under each of its segmentation masks.

    Args:
        pictures: N images, (H, W, 1) or (H, W, 3), uint8 or in [0, 1].
        rows: N masks (H, W) of classes, by the name of the row: ``{"true": ..., "transfer": ...}``.
        classes: C names; pixels of any other value stay clear.
        clear: the class without a colour, such as background; None to colour all.
    """
    if not len(pictures):
        raise InputError("there are no images to draw")
    palette = PALETTE if len(classes) <= len(PALETTE) else (*MANY[:-1], BLACK)  # grey is used by the image
    shades = np.zeros((256, 4))
    drawn = [c for c in range(len(classes)) if c != clear]
    for i, c in enumerate(drawn):
        shades[c] = to_rgba(palette[i % len(palette)], 0.8)
    with blank(2.0 * len(pictures) + 1.4, 2.15 * (len(rows) + 1)) as figure:
        grid = figure.subplots(len(rows) + 1, len(pictures), squeeze=False)
        for axes in grid.ravel():
            axes.set(xticks=[], yticks=[])
            axes.grid(False)
            axes.spines[:].set_visible(False)
        for column, picture in zip(grid.T, pictures, strict=True):
            pixels = np.asarray(picture)
            column[0].imshow(np.squeeze(pixels), cmap="gray")
            grey = pixels.mean(-1) / (255 if pixels.dtype == np.uint8 else 1)
            for axes in column[1:]:
                axes.imshow(grey, cmap="gray", vmin=-1.5, vmax=1)
        for line, (name, own) in zip(grid[1:], rows.items(), strict=True):
            line[0].set_ylabel(name)
            for axes, mask in zip(line, own, strict=True):
                axes.imshow(shades[np.asarray(mask)], interpolation="nearest")
        patches = [Patch(color=shades[c], label=classes[c]) for c in drawn[:24]]
        figure.legend(handles=patches, loc="outside right center")
    return figure
