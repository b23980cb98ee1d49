"""Helpers for all maps: checked feature arrays, robust ranges and colormaps."""

from __future__ import annotations

import numpy as np
from matplotlib import colormaps
from torch import Tensor

Features = Tensor | np.ndarray
"""A feature map, channels last: a tensor of any real dtype on any device, or an array."""

Bar = tuple[str, tuple[float, float]]
"""A colour bar: the name of its colormap, and the values at its two ends."""

RESOLUTION = 1e-6
"""Differences below this fraction of the features' magnitude are rounding errors."""


def to_arrays(*features: Features, maps: bool = False) -> list[np.ndarray]:
    """Features as float32 arrays (..., C) on the CPU, checked for equal C and finite values.

    Args:
        *features: one or more feature maps.
        maps: require each to be one (h, w, C) map.

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
            raise ValueError(f"expected non-empty features of shape {shape}, got shape {tuple(array.shape)}")
        broken = array.size - int(np.count_nonzero(np.isfinite(array)))
        if broken:
            raise ValueError(
                f"features must be finite, but {broken:,} of {array.size:,} values are not; "
                "check the weights and the precision of the backbone"
            )
        arrays.append(array)
    if len({array.shape[-1] for array in arrays}) > 1:
        shapes = ", ".join(str(array.shape) for array in arrays)
        raise ValueError(f"compared maps must have the same number of channels, got shapes {shapes}")
    return arrays


def to_map(features: Features, channels: int | None = None) -> np.ndarray:
    """One map as a float32 array (h, w, C), checked for the number of channels that its colours were fitted on.

    Raises:
        ValueError: if the shape is wrong or values are not finite.
    """
    (array,) = to_arrays(features, maps=True)
    if channels is not None and array.shape[-1] != channels:
        raise ValueError(
            f"these colours were fitted on {channels} channels, got features of shape {array.shape}; "
            "fit them on all the maps you compare"
        )
    return array


def project(array: np.ndarray, mean: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """(array - mean) @ directions in float64; row by row, because a float64 copy of a fine map takes gigabytes."""
    return np.stack([(row.astype(np.float64) - mean) @ directions for row in array])


def robust_range(values: np.ndarray, bounds: tuple[float, float] = (1.0, 99.0)) -> tuple[float, float]:
    """Two percentiles of the values, or minimum and maximum if nearly all values are equal."""
    low, high = np.percentile(values, bounds)
    least, greatest = values.min(), values.max()
    if high - low <= RESOLUTION * (greatest - least):
        low, high = least, greatest
    return float(low), float(high)


def lookup(shares: np.ndarray, name: str) -> np.ndarray:
    """Values (h, w) in [0, 1], clipped, as colours (h, w, 3) uint8 of a colormap."""
    return np.asarray(colormaps[name](np.clip(shares, 0, 1), bytes=True))[..., :3]
