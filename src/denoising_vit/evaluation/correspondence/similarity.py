"""How alike two masks of an object are: J and F of DAVIS (Perazzi et al., CVPR 2016; Pont-Tuset et al. 2017)."""

from __future__ import annotations

import math

import numpy as np

#: How far apart contours may be and still agree, as a share of the image's diagonal.
BOUND = 0.008


def region_similarity(truth: np.ndarray, found: np.ndarray, void: np.ndarray | None = None) -> float:
    """J, intersection over union in [0, 1]; 1 where both are empty.

    Args:
        truth: (H, W) bool.
        found: (H, W) bool.
        void: (H, W) bool, pixels that count for nothing.
    """
    truth, found = _without(truth, void), _without(found, void)
    union = int((truth | found).sum())
    return int((truth & found).sum()) / union if union else 1.0


def contour_accuracy(
    truth: np.ndarray, found: np.ndarray, void: np.ndarray | None = None, *, bound: float = BOUND
) -> float:
    """F, the harmonic mean of how much of each contour lies near the other one, in [0, 1].

    Near is within ``bound`` of the image's diagonal, rounded up to whole pixels, Euclidean. Where one mask has no
    contour, F is 0; where both have none, 1.

    Args:
        truth: (H, W) bool.
        found: (H, W) bool.
        void: (H, W) bool, pixels that belong to neither mask.
        bound: share of the diagonal.
    """
    ours, theirs = boundary(_without(found, void)), boundary(_without(truth, void))
    count, wanted = int(ours.sum()), int(theirs.sum())
    if not count or not wanted:
        return float(count == wanted)
    radius = math.ceil(bound * math.hypot(*truth.shape))
    precision, recall = _near(ours, theirs, radius) / count, _near(theirs, ours, radius) / wanted
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def boundary(mask: np.ndarray) -> np.ndarray:
    """Pixels (H, W) that differ from the one to the right, below, or below to the right: contours one pixel wide.

    The image's border is no contour.

    Args:
        mask: (H, W) bool.
    """
    beyond = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    right, below, across = beyond[:-1, 1:], beyond[1:, :-1], beyond[1:, 1:]
    return (mask != right) | (mask != below) | (mask != across)


def _without(mask: np.ndarray, void: np.ndarray | None) -> np.ndarray:
    return mask if void is None else mask & ~void


def _near(contour: np.ndarray, other: np.ndarray, radius: int) -> int:
    """How many pixels of a contour lie within a disk around one of another: a dilation, at these pixels alone."""
    height, width = other.shape
    before = np.zeros((height, width + 1), dtype=np.int32)  # [y, x]: how many of row y lie left of x
    np.cumsum(other, axis=1, out=before[:, 1:])
    rows, columns = np.nonzero(contour)
    near = np.zeros(len(rows), dtype=bool)
    for down in range(-radius, radius + 1):
        across = math.isqrt(radius**2 - down**2)
        row, inside = np.clip(rows + down, 0, height - 1), (rows + down >= 0) & (rows + down < height)
        left, right = np.clip(columns - across, 0, width), np.clip(columns + across + 1, 0, width)
        near |= inside & (before[row, right] > before[row, left])
    return int(near.sum())
