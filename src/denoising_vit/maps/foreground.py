"""Foreground and background, told apart by the first principal component; and the foreground's own components."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from denoising_vit.maps.pca import RESOLUTION, Features, PCABasis, require_channels, to_arrays

_BINS = 256


@dataclass(frozen=True, eq=False)
class Foreground:
    """A stored mapping from features to foreground: one direction, and a threshold along it.

    Attributes:
        mean: (C,) float64, the centre of the features.
        direction: (C,) float64, the first principal component, pointing to the foreground; zero where nothing varies.
        threshold: projections above it are foreground.
    """

    mean: np.ndarray
    direction: np.ndarray
    threshold: float

    @classmethod
    def fit(cls, *features: Features) -> Foreground:
        """The threshold that parts the projections of all maps best (Otsu 1979), foreground on the inner side.

        Background reaches the border of a picture, and what it was taken of mostly does not: of the two sides, the one
        that holds less of the border than of the whole is the foreground.

        Args:
            *features: maps (h, w, C).

        Raises:
            ValueError: if a map is not (h, w, C), channels differ, or values are not finite.
        """
        arrays = to_arrays(*features, maps=True)
        basis = PCABasis.fit(*arrays)
        direction = basis.components[:, 0]
        found = [_project(array, basis.mean, direction) for array in arrays]
        values = np.concatenate([projections.ravel() for projections in found])
        # Where features do not vary but for rounding, any direction is arbitrary: nothing is foreground then.
        if values.max() - values.min() <= RESOLUTION * float(np.sqrt((basis.mean**2).sum())):
            return cls(basis.mean, np.zeros_like(direction), 0.0)
        threshold = _otsu(values)
        border = np.concatenate([_border(projections) for projections in found])
        if (border > threshold).mean() > (values > threshold).mean():
            return cls(basis.mean, -direction, -threshold)
        return cls(basis.mean, direction, threshold)

    def mask(self, features: Features) -> np.ndarray:
        """Which of the features (h, w, C) are foreground: (h, w) bool.

        Raises:
            ValueError: if the shape is not (h, w, C) with this C, or values are not finite.
        """
        (array,) = to_arrays(features, maps=True)
        require_channels(array, len(self.mean))
        return _project(array, self.mean, self.direction) > self.threshold

    def colours(self, features: Features) -> np.ndarray:
        """The foreground of features (h, w, C) in white, the rest in black: (h, w, 3) uint8.

        Raises:
            ValueError: if the shape is not (h, w, C) with this C, or values are not finite.
        """
        return np.where(self.mask(features)[..., None], 255, 0).astype(np.uint8).repeat(3, axis=-1)


@dataclass(frozen=True, eq=False)
class ForegroundPCA:
    """Principal components of the foreground alone, the rest black: parts of objects get colours of their own.

    Attributes:
        foreground: which features are coloured.
        basis: fitted on them.
    """

    foreground: Foreground
    basis: PCABasis

    @classmethod
    def fit(cls, *features: Features, foreground: Foreground | None = None) -> ForegroundPCA:
        """The basis of all foreground features of the maps; of all features where there is no foreground.

        Args:
            *features: maps (h, w, C).
            foreground: which features are foreground; fitted where it is not given.

        Raises:
            ValueError: if a map is not (h, w, C), channels differ, or values are not finite.
        """
        foreground = foreground or Foreground.fit(*features)
        arrays = to_arrays(*features, maps=True)
        inner = np.concatenate([array[foreground.mask(array)] for array in arrays])  # (N, C)
        return cls(foreground, PCABasis.fit(*(arrays if len(inner) == 0 else [inner])))

    def colours(self, features: Features) -> np.ndarray:
        """The foreground of features (h, w, C) in colours, the rest in black: (h, w, 3) uint8.

        Raises:
            ValueError: if the shape is not (h, w, C) with this C, or values are not finite.
        """
        return np.where(self.foreground.mask(features)[..., None], self.basis.colours(features), 0).astype(np.uint8)


def _project(array: np.ndarray, mean: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Projections (h, w) of features (h, w, C); row by row, because a float64 copy of a fine map is large."""
    return np.stack([(row.astype(np.float64) - mean) @ direction for row in array])


def _border(values: np.ndarray) -> np.ndarray:
    """The values (h, w) along the border, each once."""
    inner = np.zeros(values.shape, bool)
    inner[1:-1, 1:-1] = True
    return values[~inner]


def _otsu(values: np.ndarray) -> float:
    """The threshold with the greatest variance between the two sides of it."""
    counts, edges = np.histogram(values, _BINS)
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)[:-1].astype(np.float64)
    above = below[-1] + counts[-1] - below
    sums = np.cumsum(counts * centres)
    between = below * above * (sums[:-1] / below - (sums[-1] - sums[:-1]) / above) ** 2
    return float(edges[1 + int(between.argmax())])
