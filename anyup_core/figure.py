"""Panels side by side in one picture file, drawn by matplotlib."""

from __future__ import annotations

import os
from collections.abc import Sequence

from anyup_core.files import replacing
from anyup_core.paths import printable
from anyup_core.visualize import Picture


def load_figure_class() -> type:
    """Return matplotlib's Figure. Raises ImportError if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError('Drawing needs matplotlib, which is not installed: pip install "anyup-jax[viz]".') from error
    return Figure


def draw_panels(
    path: str | os.PathLike,
    panels: Sequence[tuple[str, Picture]],
    *,
    columns: int | None = None,
    title: str = "",
    subtitle: str = "",
) -> None:
    """Draw titled pictures as a grid of equal panels into one image file, nearest-neighbour where they are small.

    Args:
        path: the file, .png; replaced once the new one is complete.
        panels: titles and pictures, row by row; a title may have several lines.
        columns: panels in a row; all of them in one row if None.
        title, subtitle: lines above the panels, large and small.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    figure_class = load_figure_class()
    columns = columns or len(panels)
    rows = -(-len(panels) // columns)
    aspect = max(picture.shape[0] / picture.shape[1] for _, picture in panels)
    lines = max(text.count("\n") for text, _ in panels) + 1
    # inches: a panel's width and height, the titles above it, the gap between panels, and the head of the figure
    wide, gap, margin = 3.0, 0.12, 0.2
    high, label = wide * aspect, 0.12 + 0.19 * lines
    head = 0.36 * bool(title) + 0.26 * bool(subtitle)
    width = 2 * margin + columns * wide + (columns - 1) * gap
    height = 2 * margin + head + rows * (high + label) + (rows - 1) * gap
    figure = figure_class(figsize=(width, height), dpi=150, facecolor="white")
    plain = dict(va="top", parse_math=False)  # names of files, whose dollars are dollars
    left, top, below = margin / width, 1 - margin / height, 1 - (margin + 0.36 * bool(title)) / height
    figure.text(left, top, printable(title), size=15, weight="bold", **plain)
    figure.text(left, below, printable(subtitle), size=11, color="0.35", **plain)
    for index, (text, picture) in enumerate(panels):
        row, column = divmod(index, columns)
        left = margin + column * (wide + gap)
        bottom = height - margin - head - (row + 1) * (high + label) - row * gap
        axes = figure.add_axes((left / width, bottom / height, wide / width, high / height))
        axes.imshow(picture, interpolation="nearest")
        axes.set_axis_off()
        axes.set_title(printable(text), size=10, loc="left", pad=5, parse_math=False)
    with replacing(path) as temporary:
        figure.savefig(temporary)
