"""Pictures of one property of features each: their norm, their clusters, their similarity to one patch."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib import colormaps

from denoising_vit.visualize.pca import RESOLUTION, Features, robust_range, settle_signs, to_arrays

NORM_COLOURS = "magma"
SIMILARITY_COLOURS = "RdBu_r"
FIT_POINTS = 4096
"""Vectors of each map that k-means is fitted on; all of them are then assigned."""


def norm_maps(*features: Features) -> tuple[list[np.ndarray], tuple[float, float]]:
    """The length of each feature vector as a colour, dark for short, on one scale for all maps.

    The scale runs from the 1st to the 99th percentile of all lengths, so that a few outlier tokens do not darken
    everything else; lengths beyond are clipped. Where all lengths are equal every patch gets the middle colour.

    Args:
        *features: maps (h, w, C).

    Returns:
        One picture (h, w, 3) uint8 for each map, and (low, high), the lengths at the two ends of the scale.

    Raises:
        ValueError: if a map is not (h, w, C), channels differ, or values are not finite.
    """
    norms = [
        np.sqrt(np.einsum("hwc,hwc->hw", array, array, dtype=np.float64)) for array in to_arrays(*features, maps=True)
    ]
    low, high = robust_range(np.concatenate([norm.ravel() for norm in norms]))
    flat = high - low <= RESOLUTION * high
    shares = [np.full_like(norm, 0.5) if flat else (norm - low) / (high - low) for norm in norms]
    return [lookup(share, NORM_COLOURS) for share in shares], (low, high)


def cluster_maps(*features: Features, clusters: int = 6, seed: int = 0) -> list[np.ndarray]:
    """The k-means cluster of each patch as a colour; the same colour is the same cluster in every map.

    Clusters are fitted on all maps together, on as many vectors of each (so that a finely sampled map does not
    outvote the others). They and their colours depend on the set of vectors, not on where in the image they are;
    colours go by the order of the cluster centres along their first principal direction.

    Args:
        *features: maps (h, w, C).
        clusters: how many; fewer are used where there are fewer distinct vectors.
        seed: of k-means.

    Returns:
        One picture (h, w, 3) uint8 for each map.

    Raises:
        ValueError: if clusters < 1, a map is not (h, w, C), channels differ, or values are not finite.
    """
    from sklearn.cluster import KMeans  # seconds to import: only where it is used

    if clusters < 1:
        raise ValueError(f"clusters must be at least 1, got {clusters}")
    arrays = to_arrays(*features, maps=True)
    points = [array.reshape(-1, array.shape[-1]) for array in arrays]  # (h, w, C) -> (h w, C)
    count = min(FIT_POINTS, *(len(vectors) for vectors in points))
    sample = _in_order(np.concatenate([_thin(vectors, count) for vectors in points]))
    centre = sample.mean(0, dtype=np.float64)
    scale = float(np.abs(sample - centre).max()) or 1.0
    sample = ((sample - centre) / scale).astype(np.float32)
    clusters = min(clusters, _distinct(sample, np.abs(centre).max() / scale))
    runs: Any = 3  # scikit-learn has no annotations: a checker takes the type of the default, a string
    model = KMeans(clusters, n_init=runs, random_state=seed).fit(sample)
    ranks = _ranks(np.asarray(model.cluster_centers_, np.float64))
    palette = _palette(clusters)
    labels = [model.predict(((vectors - centre) / scale).astype(np.float32)) for vectors in points]
    return [palette[ranks[label]].reshape(*array.shape[:2], 3) for label, array in zip(labels, arrays, strict=True)]


def similarity_maps(*features: Features, at: tuple[int, int] | None = None) -> list[np.ndarray]:
    """The cosine of each feature with its own map's feature at one patch: red alike, white unrelated, blue opposite.

    Features of a ViT share a large mean, next to which all cosines are close to 1. The mean over all maps is
    therefore taken off first (one mean for all, each map counting alike, so that the maps stay comparable), and 0
    means "no more alike than any two patches". The colours always span [-1, 1]. Where a centred feature is zero,
    as it is everywhere in a constant map, the similarity is drawn as 0.

    Args:
        *features: maps (h, w, C).
        at: (row, column) of the patch in the first map, the centre if None; in maps of another size the patch at
            the same place of the image.

    Returns:
        One picture (h, w, 3) uint8 for each map.

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
        real = (lengths > RESOLUTION) & (lengths[place] > RESOLUTION)
        cosines = np.divide(centred @ centred[place], products, out=np.zeros_like(products), where=real)
        pictures.append(lookup((cosines + 1) / 2, SIMILARITY_COLOURS))
    return pictures


def lookup(shares: np.ndarray, name: str) -> np.ndarray:
    """Values (h, w) as colours (h, w, 3) uint8 of the named colormap: 0 its first colour, 1 its last; clipped."""
    return np.asarray(colormaps[name](np.clip(shares, 0, 1), bytes=True))[..., :3]


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


def _ranks(centres: np.ndarray) -> np.ndarray:
    """The place of each of the centres (k, C) along their first principal direction, (k,)."""
    centred = centres - centres.mean(0)
    direction = settle_signs(np.linalg.svd(centred, full_matrices=False)[2][:1].T)  # (C, 1)
    return np.argsort(np.argsort((centred @ direction)[:, 0], kind="stable"))


def _palette(count: int) -> np.ndarray:
    """``count`` colours that are easy to tell apart, (count, 3) uint8."""
    if count <= 10:
        return np.asarray(colormaps["tab10"](np.arange(count), bytes=True))[:, :3]
    if count <= 20:
        return np.asarray(colormaps["tab20"](np.arange(count), bytes=True))[:, :3]
    return np.asarray(colormaps["turbo"](np.linspace(0, 1, count), bytes=True))[:, :3]
