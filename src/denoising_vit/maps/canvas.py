"""Pictures, rings and text at pixel positions: drawn by Pillow for PNG, by matplotlib for PDF or SVG.

matplotlib takes four times as long for a PNG, which is drawn during the forward passes of the next photo.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from denoising_vit.data.photos import PANEL_SOFTWARE

DPI, FINE_DPI = 150, 300
FONT = "DejaVu Sans"
FORMATS = (".png", ".pdf", ".svg")

#: A ring in points: its diameter, and the widths of its white line and of the black line below it.
RING, WHITE, BLACK = 8.0, 1.6, 3.2

#: zlib's strategy for runs: half the time of its default for enlarged patches, and no larger.
_RUNS = 3

_FINER = 8  # supersampling factor of rings

_ANCHORS = {"left": "lm", "center": "mm", "right": "rm"}


@dataclass(frozen=True)
class Words:
    """A line of text."""

    left: float  # of the anchor, in pixels
    top: float  # of the middle of the line, in pixels
    text: str
    size: float  # of the font, in points
    colour: str  # #rrggbb
    align: Literal["left", "center", "right"] = "center"  # end of the line where the anchor is
    bold: bool = False
    upward: bool = False  # rotated by 90 degrees to read upwards; centred


class Canvas:
    """A white canvas, in pixels; pictures are drawn first, then rings, then text."""

    def __init__(self, width: int, height: int) -> None:
        self._width, self._height = width, height
        self._pictures: list[tuple[np.ndarray, int, int, int, int]] = []
        self._rings: list[tuple[float, float]] = []
        self._words: list[Words] = []

    def picture(self, pixels: np.ndarray, left: int, top: int, width: int, height: int) -> None:
        """Add (h, w, 3) uint8 in a rectangle; enlarged pixels have sharp edges."""
        self._pictures.append((pixels, left, top, width, height))

    def ring(self, x: float, y: float) -> None:
        """Add a white ring with black edges around a point."""
        self._rings.append((x, y))

    def words(self, words: Words) -> None:
        """Add a line of text; a box replaces each character missing in the font."""
        self._words.append(words)

    def save(self, path: str | Path, suffix: str) -> None:
        """Write one of :data:`FORMATS`, deterministically; text remains text in PDF and SVG."""
        if suffix != ".png":
            return self._save_vectors(path, suffix.removeprefix("."))
        about = PngInfo()
        about.add_text("Software", PANEL_SOFTWARE)  # marks a PNG as a sheet, not a photo
        self._drawn().save(path, "PNG", compress_type=_RUNS, dpi=(DPI, DPI), pnginfo=about)

    def _drawn(self) -> Image.Image:
        """The canvas as pixels."""
        image = Image.new("RGB", (self._width, self._height), "white")
        for pixels, left, top, width, height in self._pictures:
            picture = Image.fromarray(np.ascontiguousarray(pixels))
            image.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, top))
        for x, y in self._rings:
            for colour, mask in (("black", _ring(BLACK)), ("white", _ring(WHITE))):
                image.paste(colour, (round(x - mask.width / 2), round(y - mask.height / 2)), mask)
        draw = ImageDraw.Draw(image)
        for words in self._words:
            font, text = _font(words.size, words.bold), printable(words.text)
            if not words.upward:
                draw.text((words.left, words.top), text, words.colour, font, anchor=_ANCHORS[words.align])
                continue
            length, height = round(font.getlength(text)) + 2, round(2 * font.size)
            mask = Image.new("L", (length, height))
            ImageDraw.Draw(mask).text((length / 2, height / 2), text, 255, font, anchor="mm")
            mask = mask.transpose(Image.Transpose.ROTATE_90)
            image.paste(words.colour, (round(words.left - height / 2), round(words.top - length / 2)), mask)
        return image

    def _save_vectors(self, path: str | Path, kind: str) -> None:
        from matplotlib.figure import Figure  # takes a fraction of a second to import
        from matplotlib.patheffects import withStroke

        figure = Figure((self._width / DPI, self._height / DPI), dpi=DPI, facecolor="white")
        # One set of axes in pixels for all pictures, because each set costs as much as a row of pictures.
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, self._width), ylim=(self._height, 0))
        axes.set_axis_off()
        for pixels, left, top, width, height in self._pictures:
            place = (left, left + width, top + height, top)
            axes.imshow(pixels, interpolation="nearest", aspect="auto", extent=place)
        stroke = [withStroke(linewidth=BLACK, foreground="black")]
        for x, y in self._rings:
            axes.plot(x, y, "o", ms=RING, mfc="none", mec="white", mew=WHITE, path_effects=stroke)
        for words in self._words:
            style: Any = {"fontsize": words.size, "color": words.colour, "ha": words.align, "va": "center"}
            style |= {"weight": "bold" if words.bold else "normal", "rotation": 90 if words.upward else 0}
            style |= {"family": FONT, "parse_math": False}
            figure.text(words.left / self._width, 1 - words.top / self._height, printable(words.text), **style)
        # No dates, so that files are reproducible.
        about = {"Creator": PANEL_SOFTWARE} | ({"CreationDate": None} if kind == "pdf" else {"Date": None})
        kept: Any = {"svg.fonttype": "none", "svg.hashsalt": "dvit", "pdf.fonttype": 42, "image.composite_image": False}
        with matplotlib.rc_context(kept):
            figure.savefig(path, format=kind, dpi=FINE_DPI, facecolor="white", metadata=about)


def printable(text: str) -> str:
    """The text on one line, with a box for each character missing in the font (matplotlib would warn about each)."""
    known = _characters()
    return "".join(mark if ord(mark) in known else "□" for mark in " ".join(text.split()))


def _file(bold: bool) -> Path:
    """The font's file, which comes with matplotlib."""
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"DejaVuSans{'-Bold' if bold else ''}.ttf"


@functools.cache
def _characters() -> frozenset[int]:
    return frozenset(FT2Font(str(_file(bold=False))).get_charmap())


@functools.cache
def _font(size: float, bold: bool) -> ImageFont.FreeTypeFont:
    # Basic layout, because the other one is not in every build of Pillow and would change files.
    return ImageFont.truetype(_file(bold), size * DPI / 72, layout_engine=ImageFont.Layout.BASIC)


@functools.cache
def _ring(line: float) -> Image.Image:
    """A ring with a line of this width in points, as a mask."""
    side = round((RING + line) * DPI / 72) + 2
    outer, inner = ((RING + sign * line) * DPI / 72 * _FINER / 2 for sign in (1, -1))
    fine = Image.new("L", (side * _FINER, side * _FINER))
    draw, middle = ImageDraw.Draw(fine), side * _FINER / 2
    for radius, value in ((outer, 255), (inner, 0)):
        draw.ellipse([middle - radius, middle - radius, middle + radius, middle + radius], fill=value)
    return fine.reduce(_FINER)
