"""Norms of features, and their similarity to one patch, as colours on a shared scale."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from denoising_vit.maps.features import RESOLUTION, Bar, Features, lookup, robust_range, to_arrays, to_map

NORM_COLOURS = "magma"

SIMILARITY_BAR: Bar = ("RdBu_r", (-1.0, 1.0))


@dataclass(frozen=True)
class NormScale:
    """Norms as colours, dark for small; a single middle colour if all norms are equal.

    Attributes:
        low: norm drawn darkest.
        high: norm drawn brightest; larger norms are clipped.
    """

    low: float
    high: float

    @classmethod
    def fit(cls, *features: Features) -> NormScale:
        """The 1st to the 99th percentile of all norms of maps (h, w, C), which a few outlier tokens hardly affect.

        Raises:
            ValueError: if a map is not (h, w, C), channels differ, or values are not finite.
        """
        return cls(*robust_range(np.concatenate([_norms(array).ravel() for array in to_arrays(*features, maps=True)])))

    @property
    def bar(self) -> Bar:
        """The colour bar."""
        return NORM_COLOURS, (self.low, self.high)

    def colours(self, features: Features) -> np.ndarray:
        """Norms of features (h, w, C) as a picture (h, w, 3) uint8.

        Raises:
            ValueError: if the shape is not (h, w, C), or values are not finite.
        """
        norms = _norms(to_map(features))
        span = self.high - self.low
        flat = span <= RESOLUTION * self.high
        return lookup(np.full_like(norms, 0.5) if flat else (norms - self.low) / span, NORM_COLOURS)


def _norms(array: np.ndarray) -> np.ndarray:
    return np.sqrt(np.einsum("hwc,hwc->hw", array, array, dtype=np.float64))


def similarity_maps(*features: Features, at: tuple[int, int] | None = None) -> list[np.ndarray]:
    """Cosine of each feature with the feature of one patch of the same map: red similar, white unrelated, blue opposed.

    ViT features share a large mean that brings all cosines close to 1, so the mean over all maps (with equal weight per
    map) is subtracted first. Colours span [-1, 1]; where a centred feature is zero, the similarity is 0.

    Args:
        *features: maps (h, w, C).
        at: (row, column) of the patch in the first map, by default the centre; other maps use the same position.

    Returns:
        One picture (h, w, 3) uint8 per map.

    Raises:
        ValueError: if ``at`` is outside the first map, a map is not (h, w, C), channels differ, or values are not
            finite.
    """
    arrays = to_arrays(*features, maps=True)
    height, width = arrays[0].shape[:2]
    row, column = at if at is not None else (height // 2, width // 2)
    if not (0 <= row < height and 0 <= column < width):
        raise ValueError(f"at must be (row, column) within the {height} x {width} grid of the first map, got {at}")
    mean = np.mean([array.mean((0, 1), dtype=np.float64) for array in arrays], axis=0).astype(np.float32)
    pictures = []
    for array in arrays:
        scale = float(np.abs(array).max()) or 1.0
        centred = (array - mean) / scale
        place = (2 * row + 1) * len(array) // (2 * height), (2 * column + 1) * array.shape[1] // (2 * width)
        lengths = np.linalg.norm(centred, axis=-1)
        products = lengths * lengths[place]
        nonzero = (lengths > RESOLUTION) & (lengths[place] > RESOLUTION)
        cosines = np.divide(centred @ centred[place], products, out=np.zeros_like(products), where=nonzero)
        pictures.append(lookup((cosines + 1) / 2, SIMILARITY_BAR[0]))
    return pictures
