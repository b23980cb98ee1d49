"""Features as colours on continuous scales: principal components, foreground, norms, similarity to one patch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from denoising_vit.maps.features import RESOLUTION, Bar, Features, lookup, project, robust_range, to_arrays, to_map

LEAST_SPAN = 0.05
"""Components that vary less than this fraction of the strongest one are not stretched to the full range of colours."""

NORM_COLOURS = "magma"

SIMILARITY_BAR: Bar = ("RdBu_r", (-1.0, 1.0))


@dataclass(frozen=True, eq=False)
class PCABasis:
    """Three directions in feature space, and the ranges that map to red, green and blue.

    The basis depends only on the set of feature vectors, not on their positions: mirrored or permuted patches keep
    their colours.

    Attributes:
        mean: (C,) float64.
        components: (C, 3) float64, orthonormal columns, strongest first; columns beyond C are zero.
        low: (3,) float64, projections drawn as 0.
        high: (3,) float64, projections drawn as 255; above ``low``.
    """

    mean: np.ndarray
    components: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def fit(cls, *features: Features, bounds: tuple[float, float] = (1.0, 99.0)) -> PCABasis:
        """Fit one basis to all ``features`` (..., C); every vector has the same weight.

        Args:
            *features: one or more maps with the same C; sizes may differ.
            bounds: percentiles of each projection that map to the darkest and the brightest value.

        Raises:
            ValueError: if there are no features, their channels differ, values are not finite, or bounds are not
                0 <= low < high <= 100.
        """
        if not 0 <= bounds[0] < bounds[1] <= 100:
            raise ValueError(f"bounds must be percentiles with 0 <= low < high <= 100, got {bounds}")
        vectors = np.concatenate([array.reshape(-1, array.shape[-1]) for array in to_arrays(*features)])  # (N, C)
        vectors = vectors.astype(np.float64)
        mean = vectors.mean(0)
        scale = float(np.sqrt(np.einsum("nc,nc->n", vectors, vectors).mean()))
        vectors -= mean
        components = _principal(vectors.T @ vectors / len(vectors))
        ranges = [robust_range(projection, bounds) for projection in (vectors @ components).T]
        low, high = np.array(ranges).T
        # Stretching every component to the full range would show a field of two colours as colourful noise.
        least = max(LEAST_SPAN * float((high - low).max()), RESOLUTION * scale) or 1.0
        middle, half = (low + high) / 2, np.maximum(high - low, least) / 2
        return cls(mean=mean, components=components, low=middle - half, high=middle + half)

    def shares(self, features: Features) -> np.ndarray:
        """Position of each component of features (h, w, C) in its range: (h, w, 3) float64 in [0, 1], clipped.

        ValueError as in :func:`to_map`.
        """
        projected = project(to_map(features, len(self.mean)), self.mean, self.components)  # (h, w, 3)
        return np.clip((projected - self.low) / (self.high - self.low), 0, 1)

    def colours(self, features: Features) -> np.ndarray:
        """Features (h, w, C) as a picture (h, w, 3) uint8; ValueError as in :func:`to_map`."""
        # Slightly below, so that a component without structure, at 127.5 plus rounding errors, is a uniform grey.
        return np.rint(self.shares(features) * 255 - 1e-3).astype(np.uint8)


def settle_signs(directions: np.ndarray) -> np.ndarray:
    """Flip directions (C, k) so that the largest entry of each is positive (the first of several equal ones).

    Eigenvectors have an arbitrary sign. Unlike the skew of the projections, this rule does not depend on data, so that
    symmetric data cannot change it.
    """
    sizes = np.abs(directions)
    largest = np.argmax(sizes >= (1 - 1e-6) * sizes.max(0), axis=0)
    return directions * np.where(np.take_along_axis(directions, largest[None], 0) < 0, -1.0, 1.0)


def _principal(covariance: np.ndarray) -> np.ndarray:
    """The three leading eigenvectors of (C, C) as columns (C, 3), zero where C < 3."""
    channels = len(covariance)
    # Among equally strong directions, rounding errors decide which rotation an eigensolver returns. A tilt far above
    # rounding errors, and far too small to be visible, makes the choice deterministic.
    tilt = 1e-8 * np.trace(covariance) * np.linspace(1, 0, channels)
    _, vectors = np.linalg.eigh(covariance + np.diag(tilt))
    leading = settle_signs(vectors[:, ::-1][:, :3])
    return np.pad(leading, ((0, 0), (0, 3 - leading.shape[1])))


@dataclass(frozen=True, eq=False)
class Foreground:
    """A direction in feature space, and a threshold along it.

    Attributes:
        mean: (C,) float64.
        direction: (C,) float64, the first principal component, pointing to the foreground; zero if nothing varies.
        threshold: projections above it are foreground.
    """

    mean: np.ndarray
    direction: np.ndarray
    threshold: float

    @classmethod
    def fit(cls, *features: Features) -> Foreground:
        """Fit Otsu's threshold (1979) to the projections of all maps (h, w, C).

        The background usually reaches the border of a picture and the subject does not, so the foreground is the side
        that covers less of the border than of the whole.

        Raises:
            ValueError: if a map is not (h, w, C), channels differ, or values are not finite.
        """
        arrays = to_arrays(*features, maps=True)
        basis = PCABasis.fit(*arrays)
        direction = basis.components[:, 0]
        projected = [project(array, basis.mean, direction) for array in arrays]
        values = np.concatenate([projections.ravel() for projections in projected])
        # If features vary only by rounding, the direction is arbitrary, so nothing is foreground.
        if values.max() - values.min() <= RESOLUTION * float(np.sqrt((basis.mean**2).sum())):
            return cls(basis.mean, np.zeros_like(direction), 0.0)
        threshold = _otsu(values)
        border = np.concatenate([_border(projections) for projections in projected])
        if (border > threshold).mean() > (values > threshold).mean():
            return cls(basis.mean, -direction, -threshold)
        return cls(basis.mean, direction, threshold)

    def mask(self, features: Features) -> np.ndarray:
        """Foreground of features (h, w, C) as (h, w) bool; ValueError as in :func:`to_map`."""
        return project(to_map(features, len(self.mean)), self.mean, self.direction) > self.threshold


def _border(values: np.ndarray) -> np.ndarray:
    """The values (h, w) along the border, each once."""
    inner = np.zeros(values.shape, bool)
    inner[1:-1, 1:-1] = True
    return values[~inner]


def _otsu(values: np.ndarray) -> float:
    """The threshold with the largest variance between both sides."""
    counts, edges = np.histogram(values, 256)
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)[:-1].astype(np.float64)
    above = below[-1] + counts[-1] - below
    sums = np.cumsum(counts * centres)
    between = below * above * (sums[:-1] / below - (sums[-1] - sums[:-1]) / above) ** 2
    return float(edges[1 + int(between.argmax())])


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
        """Norms of features (h, w, C) as a picture (h, w, 3) uint8; ValueError as in :func:`to_map`."""
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
