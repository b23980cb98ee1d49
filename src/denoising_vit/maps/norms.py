"""The length of each feature vector as a colour."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from denoising_vit.maps.colouring import lookup
from denoising_vit.maps.pca import RESOLUTION, Features, robust_range, to_arrays

NORM_COLOURS = "magma"


@dataclass(frozen=True)
class NormScale:
    """Lengths as colours, dark for short; where all lengths are equal every patch gets the middle colour.

    Attributes:
        low: the length that is drawn darkest.
        high: the length that is drawn brightest; lengths beyond are clipped.
    """

    low: float
    high: float

    @classmethod
    def fit(cls, *features: Features) -> NormScale:
        """The scale from the 1st to the 99th percentile of all lengths: a few outlier tokens do not darken the rest.

        Args:
            *features: maps (h, w, C).

        Raises:
            ValueError: if a map is not (h, w, C), channels differ, or values are not finite.
        """
        return cls(*robust_range(np.concatenate([_norms(array).ravel() for array in to_arrays(*features, maps=True)])))

    def colours(self, features: Features) -> np.ndarray:
        """The lengths of features (h, w, C) as a picture (h, w, 3) uint8.

        Raises:
            ValueError: if the shape is not (h, w, C), or values are not finite.
        """
        norms = _norms(*to_arrays(features, maps=True))
        span = self.high - self.low
        flat = span <= RESOLUTION * self.high
        return lookup(np.full_like(norms, 0.5) if flat else (norms - self.low) / span, NORM_COLOURS)


def norm_maps(*features: Features) -> tuple[list[np.ndarray], tuple[float, float]]:
    """The length of each feature vector as a colour, dark for short, on one scale for all maps.

    Args:
        *features: maps (h, w, C).

    Returns:
        One picture (h, w, 3) uint8 for each map, and (low, high), the lengths at the two ends of the scale.

    Raises:
        ValueError: if a map is not (h, w, C), channels differ, or values are not finite.
    """
    scale = NormScale.fit(*features)
    return [scale.colours(item) for item in features], (scale.low, scale.high)


def _norms(array: np.ndarray) -> np.ndarray:
    return np.sqrt(np.einsum("hwc,hwc->hw", array, array, dtype=np.float64))
