"""A sheet of pictures in rows and columns, for things that are compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from denoising_vit.data.photos import PANEL_SOFTWARE

_CELL, _TOP, _DPI = 2.4, 0.45, 100  # inches, inches, dots an inch

#: Characters of a row's name.
_NAME = 60


def draw_rows(headings: Sequence[str], rows: Sequence[tuple[str, Sequence[np.ndarray]]], path: str | Path) -> None:
    """Draws named rows of pictures (H, W, 3) uint8 as a PNG; each row at the aspect of its first picture.

    Args:
        headings: of the columns.
        rows: names and pictures, as many as there are headings.
        path: the file to write; always a PNG.

    Raises:
        ValueError: if there are no rows, or one has another number of pictures.
    """
    if not rows or any(len(pictures) != len(headings) for _, pictures in rows):
        raise ValueError(f"expected rows of {len(headings)} pictures, got {[len(pictures) for _, pictures in rows]}")
    aspects = [pictures[0].shape[0] / pictures[0].shape[1] for _, pictures in rows]
    height = sum(aspects) * _CELL + _TOP * (len(rows) + 1)
    figure = Figure(figsize=(_CELL * len(headings), height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), len(headings), squeeze=False, height_ratios=aspects)
    for line, (name, pictures), aspect in zip(grid, rows, aspects, strict=True):
        for axes, picture in zip(line, pictures, strict=True):
            axes.imshow(picture, aspect="auto", interpolation="nearest")
            axes.set_box_aspect(aspect)
            axes.set_axis_off()
        line[0].set_title(name[:_NAME].encode("ascii", "replace").decode(), fontsize=8, loc="left", color="#5c5c5c")
    for axes, heading in zip(grid[0], headings, strict=True):
        axes.set_title(f"{heading}\n{axes.get_title(loc='left')}", fontsize=9, loc="left")
    figure.savefig(path, format="png", metadata={"Software": PANEL_SOFTWARE})
