"""k-means clusters of features as colours, with the same colour for the same cluster in every map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps

from denoising_vit.maps.colours import settle_signs
from denoising_vit.maps.features import RESOLUTION, Features, to_arrays, to_map

FIT_POINTS, MOST_POINTS = 4096, 16384
"""Maximum numbers of vectors per map, and over all maps, to fit k-means on; all vectors are assigned to clusters."""

DIRECTIONS = 32
"""Number of principal directions for k-means: the first few separate clusters, and all take several times longer."""


@dataclass(frozen=True, eq=False)
class Clusters:
    """Cluster centres, in the order of their colours.

    Attributes:
        centres: (k, C) float64, in the units of the features.
    """

    centres: np.ndarray

    @classmethod
    def fit(cls, *features: Features, clusters: int = 6, seed: int = 0) -> Clusters:
        """Fit clusters to the same number of vectors of each map, so that a finer map does not have more weight.

        Clusters and their order (along the first principal direction of the centres) depend on the set of vectors, not
        on their positions in the image.

        Args:
            *features: maps (h, w, C).
            clusters: number of clusters; reduced if there are fewer distinct vectors.
            seed: seed of k-means.

        Raises:
            ValueError: if clusters < 1, a map is not (h, w, C), channels differ, or values are not finite.
        """
        from sklearn.cluster import KMeans  # takes seconds to import

        if clusters < 1:
            raise ValueError(f"clusters must be at least 1, got {clusters}")
        points = [array.reshape(-1, array.shape[-1]) for array in to_arrays(*features, maps=True)]
        count = min(FIT_POINTS, max(MOST_POINTS // len(points), clusters), *(len(vectors) for vectors in points))
        sample = _sorted(np.concatenate([_thin(vectors, count) for vectors in points]))
        centre = sample.mean(0, dtype=np.float64)
        sample = sample - centre.astype(np.float32)
        scale = float(np.abs(sample).max()) or 1.0
        sample /= scale
        clusters = min(clusters, _distinct(sample, np.abs(centre).max() / scale))
        runs: Any = 3  # scikit-learn has no annotations; the default is a string
        model = KMeans(clusters, n_init=runs, random_state=seed).fit(_strongest(sample))
        members = np.eye(clusters, dtype=np.float64)[model.labels_]  # (N, k)
        found = members.T @ sample / members.sum(0)[:, None]
        return cls(found[_order(found)] * scale + centre)

    def labels(self, features: Features) -> np.ndarray:
        """The cluster of each feature (h, w, C), 0 to k - 1: (h, w) int64; ValueError as in :func:`to_map`."""
        array = to_map(features, self.centres.shape[1])
        middle = self.centres.mean(0)
        centres = self.centres - middle
        # The minimum of |x|² - 2 x·c + |c|² over c needs no |x|²; row by row, because float64 copies are large.
        halves = np.einsum("kc,kc->k", centres, centres) / 2
        return np.stack([((row.astype(np.float64) - middle) @ centres.T - halves).argmax(1) for row in array])

    def colours(self, features: Features) -> np.ndarray:
        """Clusters of features (h, w, C) as a picture (h, w, 3) uint8; ValueError as in :func:`to_map`."""
        count = len(self.centres)
        if count <= 20:
            table = colormaps["tab10" if count <= 10 else "tab20"](np.arange(count), bytes=True)
        else:
            table = colormaps["turbo"](np.linspace(0, 1, count), bytes=True)
        return np.asarray(table)[:, :3][self.labels(features)]


def _keys(points: np.ndarray) -> np.ndarray:
    """One number (N,) for each point (N, C) along a fixed random direction: equal for equal points."""
    direction = np.random.default_rng(0).standard_normal(points.shape[1])
    return points.astype(np.float64) @ (direction / np.linalg.norm(direction))


def _sorted(points: np.ndarray) -> np.ndarray:
    """The points sorted by :func:`_keys`, so that the random choices of k-means do not depend on positions."""
    return points[np.argsort(_keys(points), kind="stable")]


def _thin(points: np.ndarray, count: int) -> np.ndarray:
    """``count`` of the points, spread evenly over their sorted order."""
    if len(points) == count:
        return points
    return _sorted(points)[(2 * np.arange(count) + 1) * len(points) // (2 * count)]


def _distinct(points: np.ndarray, offset: float) -> int:
    """Number of sorted points (N, C) that differ by more than rounding, given their distance from zero."""
    return 1 + int(np.count_nonzero(np.diff(np.sort(_keys(points))) > RESOLUTION * (1 + offset)))


def _strongest(points: np.ndarray) -> np.ndarray:
    """Centred points (N, C) along roughly their :data:`DIRECTIONS` strongest principal directions, if C is larger."""
    if points.shape[1] <= DIRECTIONS:
        return points
    random = np.random.default_rng(0).standard_normal((points.shape[1], DIRECTIONS)).astype(np.float32)
    found, _ = np.linalg.qr(points.T @ (points @ random))  # one step of subspace iteration
    return points @ found


def _order(centres: np.ndarray) -> np.ndarray:
    """Indices (k,) that sort centres (k, C) along their first principal direction."""
    centred = centres - centres.mean(0)
    direction = settle_signs(np.linalg.svd(centred, full_matrices=False)[2][:1].T)  # (C, 1)
    return np.argsort((centred @ direction)[:, 0], kind="stable")
