"""The picture of one frame: rows of extractors, columns of panels, each under its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from denoising_vit.show.video.options import PANELS

#: Pixels between panels and around them, and height of a heading.
GAP, HEADING = 8, 26

#: Height of letters, and the least to which they shrink where a panel is narrow.
LETTERS, LEAST_LETTERS = 18, 9

_PAPER, _INK = (255, 255, 255), (32, 32, 32)


class Sheet:
    """A layout that is the same for all frames; what does not change is drawn once.

    Attributes:
        size: (H, W) in pixels of the whole, both even.

    Args:
        features: a row each.
        panels: a column each; the image is there once, midway between the rows.
        panel: (H, W) of each panel.
        smooth: whether maps are drawn smoothly instead of with sharp patches.
    """

    def __init__(self, features: Sequence[str], panels: Sequence[str], panel: tuple[int, int], *, smooth: bool) -> None:
        self._panel, self._smooth = panel, smooth
        alone = tuple(panels) == ("image",)
        rows = 1 if alone else len(features)
        cell = panel[0] + HEADING + GAP
        height, width = GAP + rows * cell, GAP + len(panels) * (panel[1] + GAP)
        self.size = height + height % 2, width + width % 2
        self._places: dict[tuple[str | None, str], tuple[int, int]] = {}
        headings = Image.new("RGB", (self.size[1], self.size[0]), _PAPER)
        draw = ImageDraw.Draw(headings)
        for column, kind in enumerate(panels):
            left = GAP + column * (panel[1] + GAP)
            for row, name in enumerate((None,) if kind == "image" else features):
                top = GAP + row * cell if name is not None else GAP + (rows - 1) * cell // 2
                self._places[name, kind] = top + HEADING, left
                heading = PANELS[kind] if name is None else f"{name}: {PANELS[kind]}"
                draw.text((left, top + HEADING // 2), heading, _INK, _font(heading, panel[1]), anchor="lm")
        self._pixels = np.array(headings)

    def draw(self, image: np.ndarray, maps: Mapping[tuple[str | None, str], np.ndarray]) -> np.ndarray:
        """The sheet (H, W, 3) uint8 of a frame; the same array every time.

        Args:
            image: the frame in the size of a panel, (H, W, 3) uint8.
            maps: pictures (h, w, 3) uint8 by features and panel.
        """
        for place, (top, left) in self._places.items():
            pixels = image if place[0] is None else self._enlarged(maps[place])
            self._pixels[top : top + self._panel[0], left : left + self._panel[1]] = pixels
        return self._pixels

    def _enlarged(self, picture: np.ndarray) -> np.ndarray:
        """(h, w, 3) in the size of a panel."""
        height, width = self._panel
        if self._smooth:
            return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))
        rows, columns = (
            ((2 * np.arange(goal) + 1) * side // (2 * goal))
            for goal, side in zip(self._panel, picture.shape, strict=False)
        )
        return picture[rows][:, columns]


def _font(text: str, width: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """As large as fits into a width in pixels."""
    for size in range(LETTERS, LEAST_LETTERS, -1):
        font = ImageFont.load_default(size)
        if font.getlength(text) <= width:
            return font
    return ImageFont.load_default(LEAST_LETTERS)
