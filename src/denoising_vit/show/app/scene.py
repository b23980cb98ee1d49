"""Content of the page for an answer: maps of raw and denoised features, the selected patch, and label-free metrics."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from denoising_vit.errors import AppError, EvaluationError
from denoising_vit.maps import TITLES, Palette, similarity_maps
from denoising_vit.maps.kinds import MAP_KINDS, SIMILARITY
from denoising_vit.maps.sheet import drawn_aspect
from denoising_vit.metrics.tokens import effective_rank, neighbour_similarity, outlier_share
from denoising_vit.show.app.answers import Answer

#: Approximate length in pixels of a picture's longer side.
LONGER = 720

#: Kinds of maps by heading.
MAPS = {title: kind for kind, title in TITLES.items()} | {SIMILARITY: SIMILARITY}

#: Meaning of the colours of each kind.
LEGENDS = {kind: MAP_KINDS[kind].legend for kind in MAPS.values()}


@dataclass(frozen=True, eq=False)
class Scene:
    """Displayed content of an answer: photo, raw and denoised features, and their colours, fitted on the patch grid."""

    photo: np.ndarray  # (H, W, 3) uint8
    raw: np.ndarray  # (h, w, C)
    clean: np.ndarray  # (scale h, scale w, C)
    palette: Palette

    @classmethod
    def of(cls, found: Answer) -> Scene:
        """The scene of an answer."""
        result = found.result
        raw, semantic = result.raw.numpy(), result.semantic.numpy()
        clean = semantic if found.scale == 1 else result.upsample(found.scale).numpy()
        return cls(found.photo, raw, clean, Palette([raw, semantic]))

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
        """(height, width) in pixels of every picture: the photo's aspect ratio, whole patches along the longer side."""
        aspect = drawn_aspect(self.photo.shape[1] / self.photo.shape[0])
        h, w = self.clean.shape[:2]
        if aspect >= 1:
            width = w * max(round(LONGER / w), 1)
            return max(round(width / aspect), h), width
        height = h * max(round(LONGER / h), 1)
        return height, max(round(height * aspect), w)

    def maps(self, kind: str, at: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Raw and denoised features as pictures (height, width, 3) uint8 with sharp patches.

        ``kind`` is one of :data:`LEGENDS`, and ``at`` the (row, column) of the patch for similarity; AppError if one of
        them does not exist.
        """
        if kind not in LEGENDS:
            raise AppError(f"unknown map {kind!r}; choose from {', '.join(LEGENDS)}")
        self.require_patch(at)
        if kind == SIMILARITY:
            raw, clean = similarity_maps(self.raw, self.clean, at=at)
        else:
            raw, clean = (self.palette.colours(kind, features) for features in (self.raw, self.clean))
        return self._resized(raw, Image.Resampling.NEAREST), self._resized(clean, Image.Resampling.NEAREST)

    def marked(self, at: tuple[int, int]) -> np.ndarray:
        """The photo, (height, width, 3) uint8, with a frame around a patch; AppError if the patch does not exist."""
        self.require_patch(at)
        height, width = self.shape
        image = Image.fromarray(self._resized(self.photo, Image.Resampling.LANCZOS))
        cell = height / self.grid[0], width / self.grid[1]
        top, left = at[0] * cell[0], at[1] * cell[1]
        draw = ImageDraw.Draw(image)
        for margin, colour, thick in ((8, "black", 8), (6, "white", 4)):  # visible on bright and dark photos
            box = left - margin, top - margin, left + cell[1] + margin, top + cell[0] + margin
            draw.rectangle(box, outline=colour, width=thick)
        return np.array(image)

    def patch_at(self, x: float, y: float) -> tuple[int, int]:
        """(row, column) of the patch nearest to a pixel of a picture."""
        (height, width), (h, w) = self.shape, self.grid
        return min(max(int(y * h // height), 0), h - 1), min(max(int(x * w // width), 0), w - 1)

    def require_patch(self, at: tuple[int, int]) -> None:
        """Raise AppError if the patch does not exist."""
        if not (0 <= at[0] < self.grid[0] and 0 <= at[1] < self.grid[1]):
            raise AppError(
                f"row must be 0 to {self.grid[0] - 1} and column 0 to {self.grid[1] - 1} on this grid, got row {at[0]} "
                f"and column {at[1]}"
            )

    def _resized(self, picture: np.ndarray, method: Image.Resampling) -> np.ndarray:
        height, width = self.shape
        return np.array(Image.fromarray(picture).resize((width, height), method))


@functools.lru_cache(maxsize=4)  # a scene takes a few MB
def scene_in(folder: Path) -> Scene:
    """The scene of the answer in a folder; AppError if it has been removed."""
    return Scene.of(Answer.load(folder))


#: Text for an undefined metric.
NONE = "–"


@dataclass(frozen=True)
class Figure:
    """A row of the table, as text; ``raw`` is None for a metric of raw and denoised features together."""

    name: str
    raw: str | None
    clean: str
    words: str


#: Metrics of raw and of denoised features: name, measure, number format, explanation.
_OF_BOTH: tuple[tuple[str, Callable[[Tensor], float], str, str], ...] = (
    (
        "outlier tokens",
        lambda features: outlier_share(features).total,
        ".1%",
        "Fraction of patches whose feature norm is much larger or smaller than the others'.",
    ),
    (
        "similarity of neighbours",
        neighbour_similarity,
        ".3f",
        "Mean cosine of adjacent patches. Noise lowers it and blur raises it, so neither extreme is good.",
    ),
    (
        "effective rank",
        effective_rank,
        ".0f",
        "Number of directions the features use. A large drop would mean lost content.",
    ),
)


def figures(found: Answer) -> list[Figure]:
    """Label-free metrics of one photo, without position metrics: one photo cannot separate position from content."""
    result = found.result
    raw, clean = result.raw[None], result.semantic[None]  # (1, h, w, C)
    rows = []
    if result.heldout_r2 is not None and result.heldout_cosine is not None:
        words = "Fraction of variance explained on held-out crops."
        rows.append(Figure("held-out R²", None, f"{result.heldout_r2:.3f}", words))
        words = "Mean cosine to the features of held-out crops."
        rows.append(Figure("held-out cosine", None, f"{result.heldout_cosine:.3f}", words))
    kept = float(torch.nn.functional.cosine_similarity(result.raw, result.semantic, dim=-1).mean())
    words = "Mean over patches; 1 means no change."
    rows.append(Figure("cosine of raw and denoised", None, f"{kept:.3f}", words))
    rows += [Figure(name, _text(of, raw, form), _text(of, clean, form), words) for name, of, form, words in _OF_BOTH]
    parts = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in found.seconds.items())
    words = f"{parts}; without drawing."
    return [*rows, Figure("time", None, f"{sum(found.seconds.values()):.2f} s", words)]


def _text(measure: Callable[[Tensor], float], features: Tensor, form: str) -> str:
    try:
        return format(measure(features), form)
    except EvaluationError:  # all features are equal
        return NONE
