"""Features as colours: three principal components in one basis shared by everything that is compared."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

Features = Tensor | np.ndarray
"""A feature map, channels last: a tensor of any real dtype on any device, or an array."""

LEAST_SPAN = 0.05
"""A component that varies less than this share of the strongest one is not stretched to the full range of colours."""

RESOLUTION = 1e-6
"""Differences below this share of the features' own size are rounding, not structure."""


@dataclass(frozen=True, eq=False)
class PCABasis:
    """Three directions in feature space, and the ranges that become red, green and blue.

    The basis depends on the set of feature vectors only, not on where they are: an image that is mirrored or whose
    patches are permuted gets the same colours, patch for patch.

    Attributes:
        mean: (C,) float64, the centre of the features.
        components: (C, 3) float64, orthonormal columns, strongest first; columns beyond C are zero.
        low: (3,) float64, the projection that is drawn as 0.
        high: (3,) float64, the projection that is drawn as 255; above ``low``.
    """

    mean: np.ndarray
    components: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def fit(cls, *features: Features, bounds: tuple[float, float] = (1.0, 99.0)) -> PCABasis:
        """The basis of all ``features`` (..., C) together; every vector counts once.

        Args:
            *features: one or more maps with the same C; sizes may differ.
            bounds: percentiles of each projection that become the darkest and the brightest value.

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
        """Where each component of the features (h, w, C) lies in its range: (h, w, 3) float64 in [0, 1], clipped.

        Raises:
            ValueError: if the shape is not (h, w, C) with this basis's C, or values are not finite.
        """
        (rows,) = to_arrays(features, maps=True)
        require_channels(rows, len(self.mean))
        # Row by row, because a float64 copy of a finely sampled map of a large model takes gigabytes.
        projected = np.stack([(row.astype(np.float64) - self.mean) @ self.components for row in rows])  # (h, w, 3)
        return np.clip((projected - self.low) / (self.high - self.low), 0, 1)

    def colours(self, features: Features) -> np.ndarray:
        """The features (h, w, C) as a picture (h, w, 3) uint8; values beyond the bounds are clipped.

        Raises:
            ValueError: if the shape is not (h, w, C) with this basis's C, or values are not finite.
        """
        # A hair below, so that a component without structure, at 127.5 and some rounding, is one even grey.
        return np.rint(self.shares(features) * 255 - 1e-3).astype(np.uint8)


def require_channels(array: np.ndarray, channels: int) -> None:
    """Refuses a map with other channels than a colouring was fitted on.

    Raises:
        ValueError: saying what to do.
    """
    if array.shape[-1] != channels:
        raise ValueError(
            f"these colours were fitted on {channels} channels, got features of shape {array.shape}; "
            "fit them on all the maps you compare"
        )


def to_arrays(*features: Features, maps: bool = False) -> list[np.ndarray]:
    """The features as float32 arrays (..., C) on the CPU, checked to have one C and finite values.

    Args:
        *features: one or more feature maps.
        maps: whether each must be one (h, w, C) map.

    Raises:
        ValueError: if there are none, one is empty or of the wrong shape, channels differ, or values are not finite.
    """
    if not features:
        raise ValueError("expected at least one feature map, got none")
    arrays = []
    for item in features:
        array = item.detach().float().cpu().numpy() if isinstance(item, Tensor) else np.asarray(item, np.float32)
        if array.size == 0 or array.ndim < 1 or (maps and array.ndim != 3):
            shape = "(h, w, C)" if maps else "(..., C)"
            raise ValueError(f"expected features of shape {shape} that are not empty, got shape {tuple(array.shape)}")
        broken = array.size - int(np.count_nonzero(np.isfinite(array)))
        if broken:
            raise ValueError(
                f"features must be finite, but {broken:,} of {array.size:,} values are not; "
                "check the weights and the precision of the backbone"
            )
        arrays.append(array)
    if len({array.shape[-1] for array in arrays}) > 1:
        shapes = ", ".join(str(array.shape) for array in arrays)
        raise ValueError(f"maps that are compared must have the same number of channels, got shapes {shapes}")
    return arrays


def robust_range(values: np.ndarray, bounds: tuple[float, float] = (1.0, 99.0)) -> tuple[float, float]:
    """The two percentiles of the values; their least and greatest where all but a few values are the same."""
    low, high = np.percentile(values, bounds)
    least, greatest = values.min(), values.max()
    if high - low <= RESOLUTION * (greatest - least):
        low, high = least, greatest
    return float(low), float(high)


def settle_signs(directions: np.ndarray) -> np.ndarray:
    """Directions (C, k) with the sign at which each one's largest entry is positive; the first of several as large.

    Eigenvectors come with an arbitrary sign. Unlike the skew of the projections, this rule needs no data, so a
    symmetric distribution does not flip it.
    """
    sizes = np.abs(directions)
    largest = np.argmax(sizes >= (1 - 1e-6) * sizes.max(0), axis=0)
    return directions * np.where(np.take_along_axis(directions, largest[None], 0) < 0, -1.0, 1.0)


def _principal(covariance: np.ndarray) -> np.ndarray:
    """The three leading eigenvectors of (C, C) as columns (C, 3), zero where C < 3."""
    channels = len(covariance)
    # Among equally strong directions an eigensolver picks any rotation, by rounding. A tilt far below what can be seen,
    # and far above rounding, makes it always the same one.
    tilt = 1e-8 * np.trace(covariance) * np.linspace(1, 0, channels)
    _, vectors = np.linalg.eigh(covariance + np.diag(tilt))
    leading = settle_signs(vectors[:, ::-1][:, :3])
    return np.pad(leading, ((0, 0), (0, 3 - leading.shape[1])))
