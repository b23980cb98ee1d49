"""Sheets of pictures in rows and columns with headings, labels and colour bars, as PNG, PDF or SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from denoising_vit.maps.canvas import Canvas, Words
from denoising_vit.maps.features import Bar, lookup

CELL, TALLEST = 330, 520  # pixels: width of a cell; greatest height of a picture
LEFT, RIGHT, GAP, ASIDE = 70, 26, 20, 28  # pixels: margins; space between columns; extra space before a column
TITLE, HEADING, BAR, BETWEEN, CAPTION = 62, 40, 36, 14, 62  # pixels: heights of the bands, from top to bottom
LINE, LETTER = 20, 9.5  # pixels: line height and letter width of the caption
INK, SOFT = "#1a1a1a", "#5c5c5c"
BESIDE = "  ·  "
"""Separator of the parts of a caption."""
STEEPEST = 4.0
"""Limit of aspect ratios: pictures beyond 4:1 or 1:4 are drawn at the limit."""


class Sheet:
    """A figure with rows and columns, laid out in whole pixels so that patches stay sharp.

    ``aspects`` are the aspect ratios (width / height) of the pictures of each row; column ``apart`` has extra space
    before it.
    """

    def __init__(
        self, aspects: Sequence[float], columns: int, title: str | None = None, *, apart: int | None = None
    ) -> None:
        self._boxes = [_box(drawn_aspect(aspect)) for aspect in aspects]
        self._apart = columns if apart is None else apart
        self._top = TITLE if title else BETWEEN
        rows = sum(HEADING + height + BAR for height, _ in self._boxes) + (len(aspects) - 1) * BETWEEN
        self._height = self._top + rows + CAPTION
        self._width = LEFT + columns * CELL + (columns - 1) * GAP + (ASIDE if self._apart < columns else 0) + RIGHT
        self._canvas = Canvas(self._width, self._height)
        self._last_photo: tuple[np.ndarray, tuple[int, int], np.ndarray] | None = None
        if title:
            self._text(LEFT, self._top * 0.5, shorten(title, 100), size=14, bold=True, align="left")

    def box(self, row: int) -> tuple[int, int]:
        """(height, width) in pixels of the pictures of a row."""
        return self._boxes[row]

    def picture(
        self,
        row: int,
        column: int,
        pixels: np.ndarray,
        heading: str,
        *,
        ring: tuple[float, float] | None = None,
        bar: Bar | None = None,
    ) -> None:
        """Draw (h, w, 3) uint8 with its heading, a ring at (y, x) in [0, 1], and a colour bar below."""
        left, top = self._corner(row, column)
        height, width = self.box(row)
        self._canvas.picture(pixels, left, top, width, height)
        if ring:
            self._canvas.ring(left + ring[1] * width, top + ring[0] * height)
        self._text(left + width / 2, top - HEADING * 0.42, heading, size=9.5)
        if bar:
            self._bar(left + (width - CELL) // 2, top + height + BAR // 2, *bar)

    def photo(self, row: int, pixels: np.ndarray, heading: str, ring: tuple[float, float] | None = None) -> None:
        """Draw a photo (H, W, 3) uint8 of any size in the first column."""
        box, last = self.box(row), self._last_photo
        if last is None or last[0] is not pixels or last[1] != box:  # most sheets repeat one photo
            self._last_photo = last = pixels, box, _resized(pixels, *box)
        self.picture(row, 0, last[2], heading, ring=ring)

    def row_label(self, row: int, label: str) -> None:
        """Write a label along the left edge of a row."""
        top = self._corner(row, 0)[1]
        self._text(LEFT * 0.55, top + self.box(row)[0] / 2, label, size=11, bold=True, upward=True)

    def caption(self, *lines: str) -> None:
        """Write lines at the bottom, each split in two if it is too long."""
        fitting = [part for line in lines for part in halved(line, int((self._width - LEFT - RIGHT) / LETTER))]
        for place, line in enumerate(fitting):
            below = (place - (len(fitting) - 1) / 2) * LINE
            self._text(LEFT, self._height - CAPTION * 0.5 + below, line, size=8, colour=SOFT, align="left")

    def save(self, path: str | Path, suffix: str = ".png") -> None:
        """Write a PNG, PDF or SVG, depending on the suffix."""
        self._canvas.save(path, suffix)

    def _bar(self, left: int, top: int, colours: str, span: tuple[float, float]) -> None:
        """A colour bar with the values at its ends, centred in a cell."""
        self._canvas.picture(lookup(np.linspace(0, 1, 256)[None], colours), left + CELL // 4, top - 4, CELL // 2, 8)
        for place, align, value in ((CELL // 4 - 8, "right", span[0]), (CELL * 3 // 4 + 8, "left", span[1])):
            self._text(left + place, top, number(value), size=7.5, colour=SOFT, align=align)

    def _corner(self, row: int, column: int) -> tuple[int, int]:
        """(left, top) in pixels of a picture, centred in its cell."""
        above = sum(HEADING + height + BAR + BETWEEN for height, _ in self._boxes[:row])
        aside = ASIDE if column >= self._apart else 0
        left = LEFT + column * (CELL + GAP) + aside + (CELL - self.box(row)[1]) // 2
        return left, self._top + HEADING + above

    def _text(self, left: float, top: float, text: str, *, size: float, colour: str = INK, **style: Any) -> None:
        self._canvas.words(Words(left, top, text, size, colour, **style))


def draw_rows(headings: Sequence[str], rows: Sequence[tuple[str, Sequence[np.ndarray]]], path: str | Path) -> None:
    """Draw named rows of pictures (H, W, 3) uint8 as a PNG; each row has the aspect ratio of its photo.

    Args:
        headings: headings of the columns after the photo's.
        rows: name and pictures of each row.
        path: the file; always a PNG.

    Raises:
        ValueError: if there are no rows, or one has the wrong number of pictures.
    """
    if not rows or any(len(pictures) != 1 + len(headings) for _, pictures in rows):
        raise ValueError(
            f"expected rows of {1 + len(headings)} pictures, got {[len(pictures) for _, pictures in rows]}"
        )
    sheet = Sheet([pictures[0].shape[1] / pictures[0].shape[0] for _, pictures in rows], 1 + len(headings))
    for row, (name, (photo, *pictures)) in enumerate(rows):
        sheet.photo(row, photo, shorten(name, 36))
        for column, (heading, picture) in enumerate(zip(headings, pictures, strict=True), 1):
            sheet.picture(row, column, picture, heading)
    sheet.save(path)


def drawn_aspect(aspect: float) -> float:
    """The aspect ratio at which a photo is drawn, 1:4 to 4:1."""
    return min(max(aspect, 1 / STEEPEST), STEEPEST)


def number(value: float) -> str:
    """Format with three significant digits, without an exponent if that is readable."""
    return f"{value:.0f}" if 1000 <= abs(value) < 1e5 else f"{value:.3g}".replace("-", "−")


def halved(line: str, longest: int) -> list[str]:
    """The line, or two lines if it is too long."""
    parts = line.split(BESIDE)
    if len(line) <= longest or len(parts) == 1:
        return [line]
    half = (len(parts) + 1) // 2
    return [BESIDE.join(parts[:half]), BESIDE.join(parts[half:])]


def shorten(text: str, longest: int) -> str:
    """The text, without its middle if it is too long."""
    half = (longest - 1) // 2
    return text if len(text) <= longest else f"{text[:half]}…{text[-half:]}"


def _resized(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """A photo (H, W, 3) uint8 as (height, width, 3)."""
    # Subsample before resizing, to avoid a 100-megapixel copy for a thumbnail.
    rows, columns = (max(1, side // (4 * goal)) for side, goal in zip(pixels.shape, (height, width), strict=False))
    image = Image.fromarray(np.ascontiguousarray(pixels[::rows, ::columns]))
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))


def _box(aspect: float) -> tuple[int, int]:
    wide = min(float(CELL), TALLEST * aspect)
    return round(wide / aspect), round(wide)
