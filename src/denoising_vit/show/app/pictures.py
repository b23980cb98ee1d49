"""What is seen of an answer: raw and denoised features in the same colours, the patch that was chosen, and a legend."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from denoising_vit.errors import AppError
from denoising_vit.maps import TITLES, Palette, similarity_maps
from denoising_vit.maps.sheet import drawn_aspect
from denoising_vit.show.app.answering import Answer

#: Longer side of a picture in pixels, about.
LONGER = 720

SIMILARITY = "similarity"

#: Kinds of maps, by heading; what each shows.
MAPS = {title: kind for kind, title in TITLES.items()} | {SIMILARITY: SIMILARITY}

LEGENDS = {
    "pca": "Three principal components as red, green and blue.",
    "kmeans": "Each colour is one of six clusters of patches.",
    "norm": "Length of the feature vectors: dark is short, bright is long. Single bright patches are outlier tokens.",
    "first": "The strongest principal component, from dark to bright.",
    "second": "The second principal component, from dark to bright.",
    "third": "The third principal component, from dark to bright.",
    "foreground-pca": "Principal components of the foreground alone; the rest is black.",
    "foreground": "White is what the first principal component takes for foreground.",
    SIMILARITY: "Cosine to the chosen patch: red is alike, white unrelated, blue opposite.",
}


@dataclass(frozen=True, eq=False)
class Scene:
    """An answer that is being looked at.

    Attributes:
        photo: (H, W, 3) uint8.
        raw: raw features on the patch grid, (h, w, C).
        clean: denoised ones, (scale h, scale w, C).
        palette: the colours of both.
    """

    photo: np.ndarray
    raw: np.ndarray
    clean: np.ndarray
    palette: Palette

    @classmethod
    def of(cls, found: Answer) -> Scene:
        """The scene of an answer; the palette is fitted on both sides as they are on the patch grid."""
        result = found.result
        raw, semantic = result.raw.numpy(), result.semantic.numpy()
        clean = semantic if found.scale == 1 else result.upsample(found.scale).numpy()
        return cls(found.photo, raw, clean, Palette.fit([raw, semantic]))

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the patches."""
        return self.raw.shape[0], self.raw.shape[1]

    @property
    def centre(self) -> tuple[int, int]:
        """(row, column) of the patch in the middle."""
        return self.grid[0] // 2, self.grid[1] // 2

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) in pixels of every picture: the photo's aspect, whole patches along the longer side."""
        aspect = drawn_aspect(self.photo.shape[1] / self.photo.shape[0])
        h, w = self.clean.shape[:2]
        if aspect >= 1:
            width = w * max(round(LONGER / w), 1)
            return max(round(width / aspect), h), width
        height = h * max(round(LONGER / h), 1)
        return height, max(round(height * aspect), w)

    def maps(self, kind: str, at: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Raw and denoised features as pictures (height, width, 3) uint8 with sharp patches.

        Args:
            kind: of :data:`LEGENDS`.
            at: (row, column) of the patch that similarity is to.

        Raises:
            AppError: if there is no such kind or patch.
        """
        if kind not in LEGENDS:
            raise AppError(f"no map named {kind!r}; there are {', '.join(LEGENDS)}")
        self.require_patch(at)
        if kind == SIMILARITY:
            raw, clean = similarity_maps(self.raw, self.clean, at=at)
        else:
            raw, clean = (self.palette.colours(kind, features) for features in (self.raw, self.clean))
        return self._enlarged(raw), self._enlarged(clean)

    def marked(self, at: tuple[int, int]) -> np.ndarray:
        """The photo, (height, width, 3) uint8, with a frame around a patch.

        Raises:
            AppError: if there is no such patch.
        """
        self.require_patch(at)
        height, width = self.shape
        image = Image.fromarray(self.photo).resize((width, height), Image.Resampling.LANCZOS)
        cell = height / self.grid[0], width / self.grid[1]
        top, left = at[0] * cell[0], at[1] * cell[1]
        draw = ImageDraw.Draw(image)
        for margin, colour, thick in ((8, "black", 8), (6, "white", 4)):  # seen on bright and on dark
            box = left - margin, top - margin, left + cell[1] + margin, top + cell[0] + margin
            draw.rectangle(box, outline=colour, width=thick)
        return np.array(image)

    def patch_at(self, x: float, y: float) -> tuple[int, int]:
        """(row, column) of the patch at a pixel of a picture; beyond its border the nearest."""
        (height, width), (h, w) = self.shape, self.grid
        return min(max(int(y * h // height), 0), h - 1), min(max(int(x * w // width), 0), w - 1)

    def require_patch(self, at: tuple[int, int]) -> None:
        """Refuses a patch that is not there.

        Raises:
            AppError: naming the grid.
        """
        if not (0 <= at[0] < self.grid[0] and 0 <= at[1] < self.grid[1]):
            raise AppError(
                f"row must be 0 to {self.grid[0] - 1} and column 0 to {self.grid[1] - 1} on this grid, got row {at[0]} "
                f"and column {at[1]}"
            )

    def _enlarged(self, picture: np.ndarray) -> np.ndarray:
        height, width = self.shape
        return np.array(Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST))


@functools.lru_cache(maxsize=4)  # a scene takes a few MB; a visitor looks at one
def scene_in(folder: Path) -> Scene:
    """The scene of the answer in a folder.

    Raises:
        AppError: if it has been removed since.
    """
    return Scene.of(Answer.load(folder))
