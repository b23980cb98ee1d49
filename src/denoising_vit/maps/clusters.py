"""The k-means cluster of each feature as a colour, the same colour for the same cluster in every map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps

from denoising_vit.maps.pca import RESOLUTION, Features, require_channels, settle_signs, to_arrays

FIT_POINTS, MOST_POINTS = 4096, 16384
"""Vectors of each map, and of all, that k-means is fitted on; all of them are then assigned."""


@dataclass(frozen=True, eq=False)
class Clusters:
    """Cluster centres, in the order of their colours.

    Attributes:
        centres: (k, C) float64, in the units of the features.
    """

    centres: np.ndarray

    @classmethod
    def fit(cls, *features: Features, clusters: int = 6, seed: int = 0) -> Clusters:
        """Clusters of all maps together, of as many vectors of each: a finely sampled map does not outvote the others.

        They and their order depend on the set of vectors, not on where in the image they are; the order is that of the
        centres along their first principal direction.

        Args:
            *features: maps (h, w, C).
            clusters: how many; fewer are used where there are fewer distinct vectors.
            seed: of k-means.

        Raises:
            ValueError: if clusters < 1, a map is not (h, w, C), channels differ, or values are not finite.
        """
        from sklearn.cluster import KMeans  # seconds to import: only where it is used

        if clusters < 1:
            raise ValueError(f"clusters must be at least 1, got {clusters}")
        points = [array.reshape(-1, array.shape[-1]) for array in to_arrays(*features, maps=True)]
        count = min(FIT_POINTS, max(MOST_POINTS // len(points), clusters), *(len(vectors) for vectors in points))
        sample = _in_order(np.concatenate([_thin(vectors, count) for vectors in points]))
        centre = sample.mean(0, dtype=np.float64)
        scale = float(np.abs(sample - centre).max()) or 1.0
        sample = ((sample - centre) / scale).astype(np.float32)
        clusters = min(clusters, _distinct(sample, np.abs(centre).max() / scale))
        runs: Any = 3  # scikit-learn has no annotations: a checker takes the type of the default, a string
        model = KMeans(clusters, n_init=runs, random_state=seed).fit(sample)
        found = np.asarray(model.cluster_centers_, np.float64)
        return cls(found[_order(found)] * scale + centre)

    def labels(self, features: Features) -> np.ndarray:
        """The cluster of each feature: (h, w) int64, 0 to k - 1.

        Raises:
            ValueError: if the shape is not (h, w, C) with this C, or values are not finite.
        """
        (array,) = to_arrays(features, maps=True)
        require_channels(array, self.centres.shape[1])
        middle = self.centres.mean(0)
        centres = self.centres - middle
        # The least of |x|² - 2 x·c + |c|² needs no |x|²; row by row, because float64 copies are large.
        halves = np.einsum("kc,kc->k", centres, centres) / 2
        return np.stack([((row.astype(np.float64) - middle) @ centres.T - halves).argmax(1) for row in array])

    def colours(self, features: Features) -> np.ndarray:
        """The clusters of features (h, w, C) as a picture (h, w, 3) uint8.

        Raises:
            ValueError: if the shape is not (h, w, C) with this C, or values are not finite.
        """
        return _distinct_colours(len(self.centres))[self.labels(features)]


def cluster_maps(*features: Features, clusters: int = 6, seed: int = 0) -> list[np.ndarray]:
    """The k-means cluster of each patch as a colour, fitted on all maps together.

    Args:
        *features: maps (h, w, C).
        clusters: how many; fewer are used where there are fewer distinct vectors.
        seed: of k-means.

    Returns:
        One picture (h, w, 3) uint8 for each map.

    Raises:
        ValueError: if clusters < 1, a map is not (h, w, C), channels differ, or values are not finite.
    """
    found = Clusters.fit(*features, clusters=clusters, seed=seed)
    return [found.colours(item) for item in features]


def _keys(points: np.ndarray) -> np.ndarray:
    """One number (N,) for each point (N, C), on a fixed direction no data is aligned with: equal for equal points."""
    direction = np.random.default_rng(0).standard_normal(points.shape[1])
    return points.astype(np.float64) @ (direction / np.linalg.norm(direction))


def _in_order(points: np.ndarray) -> np.ndarray:
    """The points in an order of their own: the random choices of k-means then do not depend on places."""
    return points[np.argsort(_keys(points), kind="stable")]


def _thin(points: np.ndarray, count: int) -> np.ndarray:
    """``count`` of the points, evenly spread over their own order."""
    if len(points) == count:
        return points
    return _in_order(points)[(2 * np.arange(count) + 1) * len(points) // (2 * count)]


def _distinct(points: np.ndarray, offset: float) -> int:
    """How many of the ordered points (N, C) differ by more than rounding, given their distance from zero."""
    return 1 + int(np.count_nonzero(np.diff(np.sort(_keys(points))) > RESOLUTION * (1 + offset)))


def _order(centres: np.ndarray) -> np.ndarray:
    """The centres (k, C) in order along their first principal direction: indices (k,)."""
    centred = centres - centres.mean(0)
    direction = settle_signs(np.linalg.svd(centred, full_matrices=False)[2][:1].T)  # (C, 1)
    return np.argsort((centred @ direction)[:, 0], kind="stable")


def _distinct_colours(count: int) -> np.ndarray:
    """``count`` colours that are easy to tell apart, (count, 3) uint8."""
    if count <= 10:
        return np.asarray(colormaps["tab10"](np.arange(count), bytes=True))[:, :3]
    if count <= 20:
        return np.asarray(colormaps["tab20"](np.arange(count), bytes=True))[:, :3]
    return np.asarray(colormaps["turbo"](np.linspace(0, 1, count), bytes=True))[:, :3]
