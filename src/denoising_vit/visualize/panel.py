"""One sheet that shows a decomposition: the photo, its raw and its denoised features, the artifact, what is left.

A denoiser's result has no artifact of its own to show: its sheet compares it with raw features and with stage 1's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.patheffects import withStroke
from PIL import Image
from torch import Tensor

from denoising_vit.decomposition.result import Decomposition
from denoising_vit.photos import PANEL_SOFTWARE
from denoising_vit.visualize.clusters import cluster_maps
from denoising_vit.visualize.colouring import lookup
from denoising_vit.visualize.norms import NORM_COLOURS, norm_maps
from denoising_vit.visualize.pca import Features, PCABasis, to_arrays
from denoising_vit.visualize.similarity import SIMILARITY_COLOURS, similarity_maps

DPI = 150
CELL, TALLEST = 330, 520  # pixels: the width of a cell; the greatest height of a picture in it
LEFT, RIGHT, GAP, ASIDE = 70, 26, 20, 28  # pixels: margins; space between columns; more of it before the last one
TITLE, HEADING, BAR, BETWEEN, CAPTION = 62, 40, 36, 14, 62  # pixels: heights of the bands, from top to bottom
LINE, LETTER = 20, 9.5  # pixels: from one line of the caption to the next; the width of a letter in it
INK, SOFT, FONT = "#1a1a1a", "#5c5c5c", "DejaVu Sans"
BESIDE = "  ·  "
"""Between the parts of the caption."""
FINER = 4
"""How finely the first denoised picture is sampled, where a picture has the pixels to show it."""
ROUNDING = 1e-4
"""A residual below this share of the raw features' length is rounding."""
STEEPEST = 4.0
"""Aspects beyond 4:1 or 1:4 are drawn at that."""


def draw_panel(
    photo: np.ndarray,
    result: Decomposition,
    path: str | Path,
    *,
    upsample: int = 1,
    title: str | None = None,
    exact: Decomposition | None = None,
) -> None:
    """Draw one decomposition as a PNG of about 2,200 pixels' width.

    Upper row: the photo, raw features (PCA, norm, k-means, similarity to the centre patch), the artifact G. Lower row:
    denoised features, finely sampled and then the same four maps in the same colours, and the norm of the residual.
    G has a PCA basis of its own, because it is small beside the rest. Patches are drawn with sharp edges: smoothing
    would hide the artifacts.

    A denoiser's result is drawn in columns instead, about 1,500 pixels wide: the photo, raw features, the denoiser's
    and, where given, stage 1's. Each row is one kind of map (PCA, norm, k-means, similarity to the centre patch), in
    the same basis, scale and clusters for all of its columns.

    Args:
        photo: (H, W, 3) uint8, the photo at its own aspect and any resolution.
        result: its decomposition.
        path: the file to write; always a PNG, whatever the name ends in.
        upsample: draw maps of denoised features on a grid this many times as fine as the patch grid.
        title: a line above the pictures.
        exact: stage 1's decomposition of the same photo, to be drawn beside a denoiser's result.

    Raises:
        ValueError: if the photo is not (H, W, 3) uint8, ``upsample`` is not a positive whole number, features are not
            finite, or ``exact`` is given beside a result that is no denoiser's.
        OSError: if the file cannot be written.
    """
    if photo.ndim != 3 or photo.shape[2] != 3 or photo.dtype != np.uint8 or photo.size == 0:
        raise ValueError(f"photo must be an (H, W, 3) uint8 array, got {photo.dtype} of shape {photo.shape}")
    aspect = photo.shape[1] / photo.shape[0]
    drawn_aspect = min(max(aspect, 1 / STEEPEST), STEEPEST)
    if result.info.get("method") == "denoiser":
        sheet = _Sheet(drawn_aspect, title, rows=4, columns=3 if exact is None else 4)
        _draw_columns(sheet, photo, result, exact, upsample)
    elif exact is not None:
        raise ValueError("exact is drawn beside the result of a denoiser only; this result is of another method")
    else:
        sheet = _Sheet(drawn_aspect, title)
        sheet.picture(0, 0, _shrink(photo, sheet.box), "photo")
        _draw_features(sheet, result, upsample)
        _draw_rest(sheet, result)
        sheet.row_label(0, "raw")
        sheet.row_label(1, "denoised")
    sheet.caption(_caption(result, aspect), *_compared(result, exact))
    sheet.save(path)


def _draw_columns(
    sheet: _Sheet, photo: np.ndarray, result: Decomposition, exact: Decomposition | None, upsample: int
) -> None:
    """The photo beside raw features, the denoiser's, and stage 1's where they are given: one kind of map a row."""
    found = {"raw": result.raw, "denoiser": _sampled(result, upsample)}
    if exact is not None:
        found["exact"] = _sampled(exact, upsample)
    maps: tuple[Features, ...] = tuple(found.values())
    basis = PCABasis.fit(result.raw, *(one.semantic for one in (result, exact) if one is not None))
    norms, span = norm_maps(*maps)
    colours = [basis.colours(features) for features in maps], norms, cluster_maps(*maps), similarity_maps(*maps)
    height, width = result.raw.shape[:2]
    centre = (height // 2 + 0.5) / height, (width // 2 + 0.5) / width
    small = _shrink(photo, sheet.box)
    for row, (label, pictures) in enumerate(zip(("PCA", "norm", "k-means", "similarity to ○"), colours, strict=True)):
        ring = centre if row == 3 else None
        sheet.row_label(row, label)
        sheet.picture(row, 0, small, "photo", ring)
        for column, (name, picture) in enumerate(zip(found, pictures, strict=True), 1):
            sheet.picture(row, column, picture, name, ring)
            if row in (1, 3):
                sheet.bar(row, column, *((NORM_COLOURS, span) if row == 1 else (SIMILARITY_COLOURS, (-1, 1))))


def _sampled(result: Decomposition, upsample: int) -> Tensor:
    """F on the patch grid, or on one that is so many times as fine: (n h, n w, C)."""
    return result.semantic if upsample == 1 else result.upsample(upsample)


def _draw_features(sheet: _Sheet, result: Decomposition, upsample: int) -> None:
    """Raw and denoised maps, in the same colours for both."""
    semantic = _sampled(result, upsample)
    height, width = result.raw.shape[:2]
    finer = max(upsample, min(FINER, CELL // max(height, width)), 1)
    basis = PCABasis.fit(result.raw, result.semantic)
    sheet.picture(
        1, 0, basis.colours(result.upsample(finer)), f"denoised, {finer} × finer" if finer > 1 else "denoised"
    )
    maps: tuple[Features, Features] = (result.raw, semantic)
    norms, span = norm_maps(*maps)
    clusters, likeness = cluster_maps(*maps), similarity_maps(*maps)
    centre = (height // 2 + 0.5) / height, (width // 2 + 0.5) / width
    for row, features in enumerate(maps):
        sheet.picture(row, 1, basis.colours(features), "PCA" if row == 0 else "PCA, same basis")
        sheet.picture(row, 2, norms[row], "norm" if row == 0 else "norm, same scale")
        sheet.bar(row, 2, NORM_COLOURS, span)
        sheet.picture(row, 3, clusters[row], "k-means" if row == 0 else "k-means, same clusters")
        sheet.picture(row, 4, likeness[row], "similarity to ○", ring=centre)
        sheet.bar(row, 4, SIMILARITY_COLOURS, (-1, 1))


def _draw_rest(sheet: _Sheet, result: Decomposition) -> None:
    """The artifact and the residual, each on a scale of its own."""
    (artifact,) = to_arrays(result.artifact, maps=True)
    size = float(np.sqrt(np.square(artifact, dtype=np.float64).sum(-1).mean()))
    sheet.picture(0, 5, PCABasis.fit(artifact).colours(artifact), f"artifact G, RMS {_number(size)}")
    residual = result.residual
    if float(residual.norm(dim=-1).max()) < ROUNDING * float(result.raw.norm(dim=-1).max()):
        residual = residual * 0  # nothing is left after a subtraction; rounding is not to be drawn as if it were
    (left,), span = norm_maps(residual)
    sheet.picture(1, 5, left, f"residual norm, {_number(span[0])} to {_number(span[1])}")
    sheet.bar(1, 5, NORM_COLOURS, span)


class _Sheet:
    """A figure of rows and columns, two and six unless told, laid out in whole pixels so that patches stay sharp.

    Attributes:
        box: (height, width) in pixels of every picture.
    """

    def __init__(self, aspect: float, title: str | None, rows: int = 2, columns: int = 6) -> None:
        wide = min(float(CELL), TALLEST * aspect)
        self.box = round(wide / aspect), round(wide)
        self._top = TITLE if title else BETWEEN
        self._height = self._top + rows * (HEADING + self.box[0] + BAR) + (rows - 1) * BETWEEN + CAPTION
        self._width = LEFT + columns * CELL + (columns - 1) * GAP + (ASIDE if columns == 6 else 0) + RIGHT
        self._figure = Figure((self._width / DPI, self._height / DPI), dpi=DPI, facecolor="white")
        if title:
            self._text(LEFT, self._top * 0.5, _shorten(title, 100), size=14, weight="bold", ha="left")

    def picture(
        self, row: int, column: int, pixels: np.ndarray, heading: str, ring: tuple[float, float] | None = None
    ) -> None:
        """Draw (h, w, 3) uint8 under its heading, with a ring at (y, x) in [0, 1] of it."""
        left, top = self._corner(row, column)
        axes = self._axes(left, top, self.box[1], self.box[0])
        axes.imshow(pixels, interpolation="nearest", aspect="auto", extent=(0, 1, 1, 0))
        if ring:
            stroke = [withStroke(linewidth=3.2, foreground="black")]
            axes.plot(ring[1], ring[0], "o", ms=8, mfc="none", mec="white", mew=1.6, path_effects=stroke, clip_on=False)
        self._text(left + self.box[1] / 2, top - HEADING * 0.42, heading, size=9.5)

    def bar(self, row: int, column: int, colours: str, span: tuple[float, float]) -> None:
        """Draw a colour bar with its two ends under a picture."""
        left, top = self._corner(row, column)
        left, top = left + (self.box[1] - CELL) // 2, top + self.box[0] + BAR // 2
        axes = self._axes(left + CELL // 4, top - 4, CELL // 2, 8)
        axes.imshow(lookup(np.linspace(0, 1, 256)[None], colours), aspect="auto", extent=(0, 1, 1, 0))
        for place, align, value in ((CELL // 4 - 8, "right", span[0]), (CELL * 3 // 4 + 8, "left", span[1])):
            self._text(left + place, top, _number(value), size=7.5, colour=SOFT, ha=align)

    def row_label(self, row: int, label: str) -> None:
        """Write what a row shows along its left edge."""
        top = self._corner(row, 0)[1]
        self._text(LEFT * 0.55, top + self.box[0] / 2, label, size=11, weight="bold", rotation=90)

    def caption(self, *lines: str) -> None:
        """Write lines at the bottom, in two where one is too long for the sheet."""
        fitting = [part for line in lines for part in _halved(line, int((self._width - LEFT - RIGHT) / LETTER))]
        for number, line in enumerate(fitting):
            below = (number - (len(fitting) - 1) / 2) * LINE
            self._text(LEFT, self._height - CAPTION * 0.5 + below, line, size=8, colour=SOFT, ha="left")

    def save(self, path: str | Path) -> None:
        """Render and write the PNG."""
        FigureCanvasAgg(self._figure)
        software = {"Software": PANEL_SOFTWARE}  # by which it is known, and not taken for a photo
        self._figure.savefig(path, format="png", dpi=DPI, facecolor="white", metadata=software)

    def _corner(self, row: int, column: int) -> tuple[int, int]:
        """(left, top) in pixels of a picture, centred in its cell."""
        left = LEFT + column * (CELL + GAP) + (ASIDE if column == 5 else 0) + (CELL - self.box[1]) // 2
        return left, self._top + HEADING + row * (HEADING + self.box[0] + BAR + BETWEEN)

    def _axes(self, left: int, top: int, width: int, height: int) -> Any:
        place = (
            left / self._width,
            1 - (top + height) / self._height,
            width / self._width,
            height / self._height,
        )
        axes = self._figure.add_axes(place)
        axes.set_axis_off()
        return axes

    def _text(
        self, left: float, top: float, text: str, *, size: float, colour: str = INK, ha: str = "center", **style: Any
    ) -> None:
        self._figure.text(
            left / self._width,
            1 - top / self._height,
            _printable(text),
            fontsize=size,
            color=colour,
            ha=ha,
            va="center",
            family=FONT,
            parse_math=False,
            **style,
        )


def _shrink(photo: np.ndarray, box: tuple[int, int]) -> np.ndarray:
    """The photo at the size of the box; thinned first, because a 100-megapixel copy for a thumbnail is wasteful."""
    rows, columns = (max(1, side // (4 * goal)) for side, goal in zip(photo.shape[:2], box, strict=True))
    thinned = np.ascontiguousarray(photo[::rows, ::columns])
    return np.asarray(Image.fromarray(thinned).resize((box[1], box[0]), Image.Resampling.LANCZOS))


def _caption(result: Decomposition, aspect: float) -> str:
    """What was run on what, and how well it predicts held-out views; whatever of it is known."""
    info, (height, width, channels) = result.info, result.raw.shape
    backbone = info.get("backbone", {})
    parts = [_shorten(str(backbone[key]), 48) for key in ("name", "weights") if backbone.get(key)]
    if info.get("views"):
        parts.append(f"{info['views']} views")
    parts.append(f"{result.size[1]} × {result.size[0]} px, {width} × {height} patches, {channels} channels")
    if result.heldout_r2 is not None:
        parts.append(f"held-out R² {result.heldout_r2:.3f}")
    if result.heldout_cosine is not None:
        parts.append(f"held-out cosine {result.heldout_cosine:.3f}")
    if not 1 / STEEPEST <= aspect <= STEEPEST:
        real, drawn = (f"{aspect:.4g}:1", "4:1") if aspect > 1 else (f"1:{1 / aspect:.4g}", "1:4")
        parts.append(f"photo of {real} drawn at {drawn}")
    return BESIDE.join(parts)


def _compared(result: Decomposition, exact: Decomposition | None) -> list[str]:
    """What a denoiser's result came from, and what was run beside it: a line, or none for results of other methods."""
    denoiser = result.info.get("denoiser", {})
    parts = [f"denoiser {_shorten(str(denoiser['source']), 40)}, {denoiser['digest'][:8]}"] if denoiser else []
    if exact is not None:
        views, r2, cosine = exact.info.get("views"), exact.heldout_r2, exact.heldout_cosine
        known = [f"exact of {views} views" if views else "exact"]
        known += [f"held-out R² {r2:.3f}"] if r2 is not None else []
        known += [f"held-out cosine {cosine:.3f}"] if cosine is not None else []
        parts.append(", ".join(known))
    return [BESIDE.join(parts)] if parts else []


def _number(value: float) -> str:
    """Three significant digits, without an exponent where that is readable."""
    return f"{value:.0f}" if 1000 <= abs(value) < 1e5 else f"{value:.3g}".replace("-", "−")


def _halved(line: str, longest: int) -> list[str]:
    """The line, or its parts on two lines where it is too long."""
    parts = line.split(BESIDE)
    if len(line) <= longest or len(parts) == 1:
        return [line]
    half = (len(parts) + 1) // 2
    return [BESIDE.join(parts[:half]), BESIDE.join(parts[half:])]


def _shorten(text: str, longest: int) -> str:
    """The text without its middle where it is too long for the sheet."""
    half = (longest - 1) // 2
    return text if len(text) <= longest else f"{text[:half]}…{text[-half:]}"


def _printable(text: str) -> str:
    """The text on one line, with a box for each character the font lacks (matplotlib would warn about each)."""
    font = get_font(findfont(FONT))
    return "".join(mark if font.get_char_index(ord(mark)) else "□" for mark in " ".join(text.split()))
